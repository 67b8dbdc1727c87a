"""Makes _proc, the pages that Quarto renders. nbdev's own command would fetch Quarto first.

To nbdev's processors come: a sidebar in sections, the install line kept, the first use of a glossary term linked, names
linked in prose alone and within the site, names that stand in two modules linked to the right one, no cell run that
isn't needed for the reference, code folded that isn't the lesson, exported code kept (folded), the pictures beside the
pages, a card for each headline page, the page for a wrong address, and llms.txt.
"""

import ast
import importlib
import json
import re
import runpy
import shutil
import subprocess
import warnings
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import _fm2dict, _md2dict
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, _do_eval, add_fold, add_links, clean_magics, exec_show_docs
from nbdev.quarto import refresh_quarto_yml

# The sections of the sidebar. Pages that are named stand in this order; the others follow by their numbers.
SECTIONS = {
    "Start": "index quickstart real_model takeaways troubleshooting",
    "Learn": "lora nf4 qlora memory recommend exam",
    "Workflow": "plan model data template preflight training loop several_gpus generate evaluation scorers"
    " forgetting diagnose merge gguf ollama certificate session answers publish model_card manifest",
    "Engine room": "engine kernels line layers passes loss checkpointing forwards replay decoding",
    "Evidence": "full_lora_qlora measure_memory why_it_is_fast tiny_base promises limits",
    "Reference": "api glossary older_tutorial doctor cli changelog figures javascript signals processes template_limits"
    " exam_key",
}
# Where a page that is not named belongs, by its number; one without a number is Reference.
ROOMS = ((1, "Reference"), (6, "Learn"), (8, "Engine room"), (30, "Workflow"), (50, "Evidence"), (60, "Reference"))
ROOMS += ((70, "Engine room"), (100, "Reference"))
# Pages that people link to: their social cards show their own titles.
HEADLINES = ("quickstart", "takeaways", "real_model", *SECTIONS["Learn"].split(), "training", "gguf", "ollama")
HEADLINES += ("certificate", "engine", "why_it_is_fast", "full_lora_qlora")


# --- the order of the pages -------------------------------------------------------------------------------------------


def page_name(path):
    "The page's name without its number, as in its address."
    return re.sub(r"^\d+_", "", Path(path).stem)


def section_of(path):
    "The sidebar's section for a source: by its name, else by its number."
    name, number = page_name(path), re.match(r"\d+", Path(path).stem)
    for section, names in SECTIONS.items():
        if name in names.split():
            return section
    return next(room for end, room in ROOMS if int(number.group()) < end) if number else "Reference"


def sources(folder):
    "All pages in their reading order."
    kinds, order = (".ipynb", ".md", ".qmd"), " ".join(SECTIONS.values()).split()
    found = [path for path in Path(folder).iterdir() if path.suffix in kinds and path.stem[0] not in "_."]

    def key(path):
        name, section = page_name(path), section_of(path)
        return list(SECTIONS).index(section), order.index(name) if name in order else len(order), path.name

    return sorted((path for path in found if path.stem != "404"), key=key)


def short_title(path):
    "What the sidebar calls a page: its notebook's number, and its title up to the first colon or comma."
    number = re.match(r"\d+(?=_)", Path(path).stem)
    title = "Overview" if page_name(path) == "index" else front_matter(path).get("title", page_name(path))
    if not re.match(r"Step \d+:", title):
        title = re.split(r"[:?] ", title)[0]
    return f"{number.group()} {title}" if number else title


def sidebar(folder):
    "The sidebar as Quarto reads it; the previous and next page follow its order."
    parts = {name: [] for name in SECTIONS}
    for path in sources(folder):
        parts[section_of(path)].append({"text": short_title(path), "href": path.name})
    return [{"section": name, "contents": pages} for name, pages in parts.items() if pages]


def website(folder, config):
    "What of the site's settings depends on its pages, the version and the owner."
    web = {"sidebar": {"contents": sidebar(folder)}, "navbar": {"right": [{"text": f"v{config.version}"}]}}
    if (folder / "changelog.md").exists():
        web["navbar"]["right"][0]["href"] = "changelog.md"
    if config.user:
        web["repo-actions"] = ["source", "issue"]
        code = {"icon": "github", "href": config.git_url, "aria-label": "The repository on GitHub"}
        web["navbar"]["right"].append(code)
    stamp = ["git", "log", "-1", "--format=%cd", "--date=format:%-d %B %Y"]
    date = subprocess.run(stamp, capture_output=True, text=True, cwd=folder).stdout.strip()
    web["page-footer"] = {"left": f"{config.title} {config.version}" + f", {date}" * bool(date), "right": "Apache-2.0"}
    return {"website": web}


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
            lines.append(f"- [{front['title']}]({site}{address(path)}): {front['description']}")
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
SOURCE_LINK = re.compile(r"^\[source\]\([^)]*\)\{[^}]*\}\n", re.M)
BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)[ \t]*$", re.M)


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
                text = "".join(data["text/markdown"])
                text = text if get_config().user else SOURCE_LINK.sub("", text)
                data["text/markdown"] = link_names(text, self.lookup.doc)


DRAWING = re.compile(r"^!\[[^\]]+\]\(images/[^)]+\)$", re.M)


def keep_pictures(cell):
    """The badge is the site's own picture: no request leaves the site.

    A blank after a picture: alone in its paragraph it would be a figure, with its alt text as the caption.
    """
    if cell.cell_type == "markdown" and cell.source:
        cell.source = BADGE.sub(r"[![Open in Colab](images/badge.svg)](\1)\\ ", cell.source)
        cell.source = DRAWING.sub(r"\g<0>\\ ", cell.source)


def inline_html(cell):
    """HTML that a cell puts out becomes raw HTML of the page, and wins over the picture that stands for it elsewhere.

    As an output of its own Quarto would load two libraries from another site for it.
    """
    for output in cell.get("outputs", []):
        if html := "".join(output.get("data", {}).get("text/html", [])):
            ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", html)), default=0))
            output["data"] = {"text/markdown": f"{ticks}{{=html}}\n{html}\n{ticks}"}


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


# --- what is folded ---------------------------------------------------------------------------------------------------

# Lines of code: more are folded where they check something, or where they are more than a definition.
FEW, LONG = 8, 10
CHECKS = re.compile(r"test_|assert_|raises$|shows_error$|refuses$|check")
DRAWS = {"plt", "ax", "axes", "fig", "draw", "Figure"}
TABLES = {"Markdown", "HTML", "display", "DataFrame", "to_html", "to_markdown"}


def called(node):
    "The name of what a call calls; nothing for anything else."
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, "attr", None) or getattr(node, "id", "")


def is_check(node):
    "Whether a statement does nothing but check."
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr):
        return bool(CHECKS.match(called(node.value)))
    if isinstance(node, ast.With):
        return any(called(item.context_expr) == "raises" for item in node.items)
    if isinstance(node, (ast.For, ast.If)):
        return all(isinstance(one, ast.Assign) or is_check(one) for one in node.body) and is_check(node.body[-1])
    return False


def lines_of(nodes):
    return sum(node.end_lineno - node.lineno + 1 for node in nodes)


def names_in(tree):
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def summary_of(source, kinds):
    """What a cell is, where it is not the lesson itself: the line that a reader opens it by; else None.

    `kinds` are the MIME types of its outputs.
    """
    body = ast.parse(source).body
    definitions = (ast.FunctionDef, ast.ClassDef)
    if not body:
        return None
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        return "Imports"
    names, size = names_in(ast.Module(body, [])), lines_of(body)
    defined = [node.name for node in body if isinstance(node, definitions)]
    checks = lines_of(node for node in body if is_check(node))
    # What mainly defines something is to be read.
    pure = 2 * lines_of(node for node in body if isinstance(node, definitions)) > size
    if not kinds and not pure and checks and (2 * checks >= size or size > FEW):
        return "Checks"
    if names & DRAWS and any(kind.startswith("image/") for kind in kinds):
        return "Code: the figure"
    if names & DRAWS and defined and not kinds:
        return f"Code: {', '.join(defined)}"
    if names & TABLES and size > 3 and "text/markdown" in kinds:
        return "Code: the table"
    if size > LONG and not pure:
        return f"Code, {size} lines"
    return None


def fold(cell):
    "Fold what isn't the lesson, where the cell doesn't say itself whether it is folded."
    said = set(re.findall(r"^#\| *([\w-]+):", cell.source or "", re.M))
    shown = re.search(r"^#\| *code-fold: *false", cell.source or "", re.M)
    if cell.cell_type != "code" or shown or said & {"echo", "include", "code-summary"}:
        return
    outputs = cell.get("outputs", [])
    kinds = {kind for output in outputs for kind in output.get("data", {output.get("name"): ""})}
    summary = summary_of(cell.source, kinds)
    if "code-fold" not in said and summary:
        cell.source = f"#| code-fold: true\n{cell.source}"
    if "code-fold" in said or summary:
        cell.source = f"#| code-summary: {json.dumps(summary or 'Code')}\n{cell.source}"


class KeepSources(Processor):
    "nbdev drops exported cells, of which a page shows the signatures: their code is kept, folded, below these."

    def cell(self, cell):
        exported = cell.cell_type == "code" and cell.directives_.keys() & {"export", "exporti"}
        if not exported or "hide" in cell.directives_:
            return
        names = [node.name for node in cell.parsed_() if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        if names:
            for name in exported:
                del cell.directives_[name]
            code = re.sub(r"^#\| *code-\w+:.*\n", "", cell.source, flags=re.M)
            summary = json.dumps(f"Source: {', '.join(names)}")
            cell.source = f"#| code-fold: true\n#| code-summary: {summary}\n{code}"
            cell.outputs, cell.kept = [], True

    def end(self):
        cells = self.nb.cells
        for i in reversed(range(len(cells))):
            end = i + 1
            while getattr(cells[i], "kept", False) and end < len(cells) and getattr(cells[end], "has_sd", False):
                end += 1
            cells[i:end] = [*cells[i + 1 : end], cells[i]]


class Pages(FilterDefaults):
    "nbdev's processors and ours."

    def base_procs(self):
        ours = {exec_show_docs: (RunNeeded, KeepSources), add_links: (LinkNames,), add_fold: (fold,)}
        ours[clean_magics] = (KeepInstall, LinkTerms, keep_pictures, inline_html, clean_magics)
        return [ours_or_its for proc in super().base_procs() for ours_or_its in ours.get(proc, (proc,))]


# --- what is added to the prepared pages ------------------------------------------------------------------------------

WRONG_ADDRESS = """---
title: No such page
description: The address leads nowhere on this site; the search or the list of pages has what you look for.
search: false
---

The page has moved, or the link is wrong. The search above finds pages by their words; the [overview](index.ipynb) lists
them all, and the [glossary](glossary.md) explains the terms.
"""


def add_cards(made, draw_card):
    "Give each headline page a social card with its own title."
    for path in sources(made):
        name, text = page_name(path), path.read_text(encoding="utf-8")
        if name in HEADLINES and path.suffix == ".ipynb":
            front = front_matter_cell(nb := json.loads(text))
            meta = yaml.safe_load("".join(front["source"]).strip().strip("-"))
            draw_card(made / f"images/card-{name}.png", meta["title"].partition(":")[0], meta["description"])
            meta["image"] = f"images/card-{name}.png"
            front["source"] = f"---\n{yaml.dump(meta, sort_keys=False, allow_unicode=True)}---\n".splitlines(True)
            path.write_text(json.dumps(nb), encoding="utf-8")


def front_matter_cell(nb):
    return next(cell for cell in nb["cells"] if cell["cell_type"] == "raw")


def main():
    import nbdev.serve

    # One process: torch and the like are imported once for all pages.
    nbdev.processors.NbdevLookup = nbdev.showdoc.NbdevLookup = Lookup
    config = get_config()
    source = config.nbs_path
    refresh_quarto_yml()
    if not config.user:  # no address of the site or the repository is known
        lines = (source / "nbdev.yml").read_text(encoding="utf-8").splitlines(True)
        kept = "".join(line for line in lines if not re.match(r"  (site-url|repo-\w+):", line))
        (source / "nbdev.yml").write_text(kept, encoding="utf-8")
    settings = yaml.dump(website(source, config), sort_keys=False, allow_unicode=True)
    (source / "sidebar.yml").write_text(settings, encoding="utf-8")
    nbdev.serve.FilterDefaults = Pages
    made = nbdev.serve.proc_nbs(force=True, n_workers=0)
    shutil.copytree(source / "images", made / "images", dirs_exist_ok=True)
    runpy.run_path(str(Path(__file__).with_name("site_pages.py")))["fill"](made)
    shutil.copy(source / "theme.scss", made)
    images = runpy.run_path(str(Path(__file__).with_name("make_images.py")))
    (made / "images/badge.svg").write_text(images["BADGE"], encoding="utf-8")
    (made / "404.md").write_text(WRONG_ADDRESS, encoding="utf-8")
    add_cards(made, images["draw_card"])
    site = f"{config.doc_host}{config.doc_baseurl}/" if config.user else ""
    (made / "llms.txt").write_text(llms_txt(source, site, config.title, config.description), encoding="utf-8")
    print(f"prepared {made}")


if __name__ == "__main__":
    main()
