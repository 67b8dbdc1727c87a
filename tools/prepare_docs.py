"""Makes _proc, the pages that Quarto renders. nbdev's own command would fetch Quarto first.

To nbdev's processors come: a sidebar in sections, the install line kept, the first use of a glossary term linked, names
linked in prose alone and within the site, names that stand in two modules linked to the right one, no cell run that
isn't needed for the reference, the pictures beside the pages, and llms.txt.
"""

import ast
import importlib
import json
import re
import shutil
import warnings
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import _fm2dict, _md2dict
from nbdev.processors import FilterDefaults, _do_eval, add_links, exec_show_docs
from nbdev.quarto import refresh_quarto_yml

FRONT = ("index", "quickstart", "takeaways")
REFERENCE = ("glossary", "older_tutorial", "limits")
SECTIONS = ("Start", "Mathematics", "Workflow", "Engine room", "Recipes", "Reference")
ROOMS = (
    (6, "Mathematics"),
    (8, "Engine room"),
    (30, "Workflow"),
    (50, "Recipes"),
    (60, "Reference"),
    (70, "Engine room"),
)


# --- the order of the pages -------------------------------------------------------------------------------------------


def page_name(path):
    "The page's name without its number, as in its address."
    return re.sub(r"^\d+_", "", Path(path).stem)


def section_of(path):
    "The sidebar's section for a source: by its number, a few pages by name."
    path, name = Path(path), page_name(path)
    number = re.match(r"\d+", path.stem)
    if name in FRONT:
        return "Start"
    if number is None or number.group() == "00":
        return "Reference"
    return next((name for end, name in ROOMS if int(number.group()) < end), "Reference")


def sources(folder):
    "All pages in their order: by section, then by number, the pages with no number as listed above."
    kinds = (".ipynb", ".md", ".qmd")
    found = [path for path in Path(folder).iterdir() if path.suffix in kinds and path.stem[0] not in "_."]

    def key(path):
        name = page_name(path)
        listed = FRONT.index(name) if name in FRONT else REFERENCE.index(name) if name in REFERENCE else 9
        return SECTIONS.index(section_of(path)), listed if path.stem[0].isalpha() or name in FRONT else 9, path.name

    return sorted(found, key=key)


def sidebar(folder):
    "The sidebar as Quarto reads it; the previous and next page follow its order."
    parts = {name: [] for name in SECTIONS}
    for path in sources(folder):
        parts[section_of(path)].append(path.name)
    contents = [{"section": name, "contents": files} for name, files in parts.items() if files]
    return {"website": {"sidebar": {"contents": contents}}}


# --- what each page says of itself ------------------------------------------------------------------------------------


def front_matter(path):
    "Title and description of a source."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return _fm2dict(text, nb=False)
    texts = ("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return next(filter(None, map(_md2dict, texts)), {})


def address(path):
    "The page's file name on the site."
    return f"{page_name(path)}.html"


def llms_txt(folder, site, title, description):
    "The site for language models: https://llmstxt.org."
    lines = [f"# {title}", "", f"> {description}"]
    for name in SECTIONS:
        pages = [path for path in sources(folder) if section_of(path) == name]
        if pages:
            lines += ["", f"## {name}", ""]
        for path in pages:
            front = front_matter(path)
            lines.append(f"- [{front['title']}]({site}/{address(path)}): {front['description']}")
    return "\n".join(lines) + "\n"


# --- processors -------------------------------------------------------------------------------------------------------

TERM = re.compile(r"^## (.+?)(?:\s*\{#([\w-]+)\})?\s*$", re.M)
FENCE = r"^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)\s*$"
LINK = r"!?\[(?:[^\[\]\n]|\n(?!\n)|!?\[[^\]]*\](?:\([^)]*\))?)*\](?:\([^)]*\)|\[[^\]]*\])"  # a picture may be its text
# What is not prose: fences, code, formulas, links and pictures, raw HTML, headings, addresses.
NOT_PROSE = re.compile(
    rf"{FENCE}|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|{LINK}|<[^>\n]+>|^#+ [^\n]*$|https?://\S+|\{{[^}}\n]*\}}", re.M | re.S
)
# Where a name in backticks is no link: fences and other code, links and pictures, formulas, raw links.
NOT_LINKED = re.compile(rf"{FENCE}|^    [^\n]*$|``.*?``|{LINK}|\$\$.*?\$\$|<a\b.*?</a>", re.M | re.S)
NAME = re.compile(r"`([^`\s]+?)(\(\))?`")
BADGE = re.compile(r"^(\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\))[ \t]*$", re.M)


def glossary_terms(text):
    "Each term of the glossary (a heading may name several, with commas) and the id of its heading."
    found = {}
    for heading, name in TERM.findall(text):
        anchor = name or re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        found |= {term.strip(): anchor for term in heading.split(",")}
    return found


def outside(pattern, text, change):
    "The text, changed wherever the pattern does not match."
    out, at = [], 0
    for kept in pattern.finditer(text):
        out += [change(text[at : kept.start()]), kept.group()]
        at = kept.end()
    return "".join([*out, change(text[at:])])


def link_first(text, terms, page="glossary.md"):
    "The text with the first use of each term linked, and the terms that are left."
    left = dict(terms)
    if not left:
        return text, left
    # A small word may begin a sentence; a name such as PEFT is not the library peft.
    known = left | {term.capitalize(): anchor for term, anchor in left.items() if term.islower()}
    words = "|".join(re.escape(term) for term in sorted(known, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w/.-])({words})(?![\w/-]|\.\w)")

    def link(match):
        anchor = known[match.group()]
        if anchor not in left.values():
            return match.group()
        for term in [term for term, other in left.items() if other == anchor]:
            del left[term]
        return f"[{match.group()}]({page}#{anchor})"

    return outside(NOT_PROSE, text, lambda prose: pattern.sub(link, prose)), left


class LinkTerms:
    "The first use of a glossary term on a page becomes a link."

    def __init__(self, nb):
        glossary = get_config().nbs_path / "glossary.md"
        self.terms = glossary_terms(glossary.read_text(encoding="utf-8")) if glossary.exists() else {}

    def __call__(self, cell):
        if cell.cell_type == "markdown" and cell.source:
            cell.source, self.terms = link_first(cell.source, self.terms)


def link_names(text, find):
    """The text with the names in its backticks linked to where `find(name)` says that they are documented, if it does.

    Only in prose: nbdev also links names inside links, and inside the signatures of the reference. A plain word is
    mostly an option or an English word: it is linked only if it is in the public API, or written as a call.
    """
    public = importlib.import_module(get_config().lib_name).__all__

    def link(match):
        name, call = match.groups()
        plain = re.fullmatch(r"[a-z]+", name) and name not in public and not call
        place = None if plain else find(name)
        return f"[{match.group()}]({place})" if place else match.group()

    return outside(NOT_LINKED, text, lambda prose: NAME.sub(link, prose))


class LinkNames:
    "Names in backticks become links: in texts, and in what cells put out as Markdown."

    def __init__(self, nb):
        self.lookup = Lookup()

    def __call__(self, cell):
        if cell.cell_type == "markdown" and cell.source:
            cell.source = link_names(cell.source, self.lookup.doc)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = link_names("".join(data["text/markdown"]), self.lookup.doc)


def keep_badge(cell):
    "A blank after the badge: alone in its paragraph it would be a figure, with its alt text as the caption."
    if cell.cell_type == "markdown" and cell.source:
        cell.source = BADGE.sub(r"\1\\ ", cell.source)


class KeepInstall:
    "nbdev takes magics out; the install line is what a reader wants to copy."

    def __init__(self, nb): ...

    def __call__(self, cell):
        line = cell.cell_type == "code" and re.search(r"^%pip install.*$", cell.source or "", re.M)
        if line:
            cell.cell_type, cell.source = "markdown", f"```python\n{line.group().strip()}\n```"
            cell.pop("outputs", None)


class Lookup(NbdevLookup):
    """Where a name is documented, as an address within the site: nowhere for what modules share among themselves.

    nbdev's index lists that, too, but no page shows it.
    """

    def __getitem__(self, name):
        known = importlib.import_module(f"{get_config().lib_name}._modidx").d["syms"]
        places = [module for module, names in known.items() if f"{module}.{name}" in names]
        public = [place for place in places if name.partition(".")[0] in importlib.import_module(place).__all__]
        if places and not public:
            return None
        return super().__getitem__(f"{public[0]}.{name}" if public else name)

    def doc(self, name):
        config = get_config()
        place = super().doc(name)
        return place and place.removeprefix(f"{config.doc_host}{config.doc_baseurl}/")


def needed(cell):
    "Exports, show_doc, and cells that hold imports alone: all that the reference on a page is made from."
    if not _do_eval(cell):
        return False
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"} or "show_doc(" in cell.source:
        return True
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.parsed_())


def stand_in(node):
    "Code that defines the names of an import of types: by the import itself for Python's own, else as empty classes."
    if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] in ("collections", "typing"):
        return ast.unparse(node)
    kind = "type({!r}, (), {{'__class_getitem__': classmethod(lambda cls, item: cls)}})"
    return "\n".join(f"{alias.asname or alias.name} = {kind.format(alias.name)}" for alias in node.names)


class RunNeeded(exec_show_docs):
    "nbdev also runs each cell with an import anywhere in it, functions included: half of an experiment."

    def __call__(self, cell):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = needed(cell)
        if wanted:
            stored = cell.get("outputs")
            super().__call__(cell)
            for node in cell.parsed_():  # signatures name types that only type checkers import
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    self.k.run("\n".join(map(stand_in, node.body)))
            # What an import says here is no part of the page: outputs are those that the notebook stores.
            if not re.search(r"^show_doc\(", cell.source, re.M):
                cell["outputs"] = stored


class Pages(FilterDefaults):
    "nbdev's processors and ours."

    def base_procs(self):
        ours = {exec_show_docs: RunNeeded, add_links: LinkNames}
        procs = [ours.get(proc, proc) for proc in super().base_procs()]
        at = next(i for i, proc in enumerate(procs) if proc.__name__ == "clean_magics")
        return [*procs[:at], KeepInstall, LinkTerms, keep_badge, *procs[at:]]


def main():
    import nbdev.serve

    # One process: torch and the like are imported once for all pages.
    nbdev.processors.NbdevLookup = nbdev.showdoc.NbdevLookup = Lookup
    config = get_config()
    source = config.nbs_path
    refresh_quarto_yml()
    (source / "sidebar.yml").write_text(yaml.dump(sidebar(source), sort_keys=False), encoding="utf-8")
    nbdev.serve.FilterDefaults = Pages
    made = nbdev.serve.proc_nbs(force=True, n_workers=0)
    shutil.copytree(source / "images", made / "images", dirs_exist_ok=True)
    site = f"{config.doc_host}{config.doc_baseurl}"
    (made / "llms.txt").write_text(llms_txt(source, site, config.title, config.description), encoding="utf-8")
    print(f"prepared {made}")


if __name__ == "__main__":
    main()
