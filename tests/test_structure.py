"""The shape of the repository: requirements, module order, cells, stored outputs."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import (
    MODULES,
    NBS,
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    body,
    cells,
    dotted,
    module_of,
    parse,
    read,
    settings,
    tool,
    top_level_imports,
)

pytestmark = pytest.mark.quick

PACKAGES = "nbdev jupyter unsloth torch transformers trl peft datasets bitsandbytes matplotlib".split()
# An absolute path begins here: not in the middle of an address, but also after the "\n" of a JSON text.
PATH_START = r"(?:(?<![\w.-])|(?<=\\n))"
HEAVY = {"transformers", "trl", "peft", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo", "matplotlib"}
EXPORTED = {module_of(path) for path in NOTEBOOKS if module_of(path)}

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=dotted)


def test_notebooks_and_modules_were_found():
    assert "index" in {path.stem for path in NOTEBOOKS} and len(NOTEBOOKS) > 1
    assert set(map(dotted, MODULES)) == EXPORTED, "a module without a notebook, or the other way round"


# --- settings -------------------------------------------------------------------------------------------------------


def test_packages_are_declared():
    keys = [key for key in settings() if key == "requirements" or key.endswith("_requirements")]
    declared = {re.match(r"[\w-]+", word).group().lower() for key in keys for word in settings()[key].split()}
    assert set(PACKAGES) <= declared


def test_constraints_lie_within_the_requirements():
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for key in ("requirements", "unsloth_requirements", "gguf_requirements", "serve_requirements", "dev_requirements"):
        for requirement in map(Requirement, settings()[key].split()):
            version = pins[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"


def test_min_python():
    assert settings()["min_python"] == "3.11"


# --- modules --------------------------------------------------------------------------------------------------------


def imported_modules(node, path=PACKAGE / "x.py"):
    "The modules of this package that an import statement of this file takes in, and the top-level names of others."
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        folder = ["qlora_nb", *path.relative_to(PACKAGE).parts[:-1]]
        parts = (folder[: len(folder) + 1 - node.level] if node.level else []) + (node.module or "").split(".") * bool(
            node.module
        )
        # What is imported from a package may be a module of it.
        names = (
            [".".join(parts)]
            if not (ROOT / Path(*parts)).is_dir()
            else [".".join([*parts, a.name]) for a in node.names]
        )
    ours = [name.removeprefix("qlora_nb.") for name in names if name.startswith("qlora_nb.")]
    return ours, {name.split(".")[0] for name in names}


def test_imports_are_read_as_python_reads_them():
    inside, line = PACKAGE / "core.py", PACKAGE / "engine" / "line.py"
    for text, path, ours in (
        ("import qlora_nb.core", inside, ["core"]),
        ("from .core import UserError", inside, ["core"]),
        ("from qlora_nb import core, kernels", inside, ["core", "kernels"]),
        ("from qlora_nb.engine.loss import labelled_loss", inside, ["engine.loss"]),
        ("from qlora_nb.engine import loss, passes", inside, ["engine.loss", "engine.passes"]),
        ("from .loss import labelled_loss", line, ["engine.loss"]),
        ("from . import loss", line, ["engine.loss"]),
        ("from ..core import UserError", line, ["core"]),
        ("from .. import core", line, ["core"]),
        ("from torch import nn", line, []),
    ):
        assert imported_modules(ast.parse(text).body[0], path)[0] == ours, text


ABOVE_ALL = {"workflow", "cli"}  # what may import every module, beside __init__ and __main__


def import_graph():
    "module: those of this package that it imports, inside functions, too. The package itself counts as `qlora_nb`."
    graph = {}
    for name, path in tool("house")["modules"]():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        graph[name] = {found for node in imports for found in imported_modules(node, path)[0]} - {name}
    return graph


def test_imports_have_no_circle():
    graph = {name: found for name, found in import_graph().items() if name not in ABOVE_ALL}
    circles = []
    while free := [name for name, found in graph.items() if not found & set(graph)]:
        for name in free:
            del graph[name]
    circles = {name: sorted(found & set(graph)) for name, found in graph.items()}
    assert not circles, f"these modules import each other: {circles}"


def test_processes_know_nothing_of_what_they_work_on():
    "Whatever is shared out: it is named, and only its own module knows it."
    graph = import_graph()
    assert graph["processes"] == {"core", "signals"} and "processes" in graph["parallel"]


def test_only_the_command_line_looks_at_the_workflow():
    users = {name: found & ABOVE_ALL for name, found in import_graph().items() if name not in ABOVE_ALL}
    assert not {name: found for name, found in users.items() if found}


def defined_names():
    "(module, name) of what each module defines at its top level, names with an underscore left out."
    for module, path in tool("house")["modules"]():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            else:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                found = [name for target in targets if target for name in ast.walk(target)]
                names = [name.id for name in found if isinstance(name, ast.Name)]
            yield from ((module, name) for name in names if not name.startswith("_"))


PUBLIC = ROOT / "tests" / "public_names.txt"


def test_public_names_are_those_of_the_reviewed_list():
    "What a user may call is decided, not grown: a name is added to, or taken from, the list on purpose."
    house = tool("house")
    names = [
        f"{module}.{name}" for module, path in house["modules"]() for name in house["public_names"](path.read_text())
    ]
    assert sorted(names) == PUBLIC.read_text(encoding="utf-8").split(), "look at the names, then change the list"
    assert len(names) <= 150


# The interface's own verbs and nouns; any other name says more than one everyday word can.
ONE_WORD = set(
    """train chat evaluate certify recommend diagnose compare profile check plan export modelfile report doctor
answer publish info main app render encode fingerprint PROFILES""".split()
)


def test_no_name_is_an_everyday_word():
    found = [f"{module}.{name}" for module, name in defined_names() if re.fullmatch("[a-z]+|[A-Z]+", name)]
    assert [name for name in found if name.split(".")[-1] not in ONE_WORD] == []


def test_a_name_has_one_meaning():
    "The commands of the command line have the names of what they call."
    homes = {}
    for module, name in defined_names():
        if module != "cli":
            homes.setdefault(name, set()).add(module)
    assert {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", [PACKAGE / "__init__.py", *MODULES], ids=dotted)
def test_no_heavy_import_at_the_top(module):
    heavy = HEAVY | {"torch"} if module.stem == "__init__" else HEAVY
    for node in top_level_imports(ast.parse(module.read_text(encoding="utf-8"))):
        assert not imported_modules(node, module)[1] & heavy, f"{module.name}: {ast.unparse(node)}"


def test_public_names_are_not_hidden_by_modules():
    script = """
import importlib, pkgutil, qlora_nb
for info in pkgutil.walk_packages(qlora_nb.__path__, "qlora_nb."):
    if info.name != "qlora_nb.__main__":
        importlib.import_module(info.name)
assert qlora_nb.__all__
wrong = [name for name in qlora_nb.__all__ if name != "__version__" and not callable(getattr(qlora_nb, name))]
assert not wrong, f"not callable once every module is imported: {wrong}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@each_module
def test_all_lists_what_exists(module):
    names = importlib.import_module(f"qlora_nb.{dotted(module)}")
    assert [name for name in names.__all__ if not hasattr(names, name)] == []


# --- notebooks ------------------------------------------------------------------------------------------------------


def test_names_are_flat_numbered_and_unique():
    assert [p for p in NBS.rglob("*.ipynb") if p.parent != NBS and ".ipynb_checkpoints" not in p.parts] == []
    for path in NOTEBOOKS:
        assert path.stem == "index" or re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), path.name
    pages = [re.sub(r"^\d\d_", "", path.stem) for path in NOTEBOOKS]
    assert len(pages) == len(set(pages)), "the site drops the numbers: two pages would have one name"


NBDEV = re.compile(
    r"#\s*\|\s*(hide|exports?|exporti|cuda|slow|heavy|default_exp [\w.]+)\s*$"
)  # nbdev takes these lines out


@each_notebook
def test_heads_are_yaml(notebook):
    "What Quarto finds at the head of a cell is one YAML mapping: one caption with a bare colon, and there is no site."
    read_directives = tool("plain_pages")["read_directives"]
    for cell, source in cells(notebook, "code"):
        try:
            options, _ = read_directives("\n".join(line for line in source.splitlines() if not NBDEV.match(line)))
        except (ValueError, yaml.YAMLError) as error:
            pytest.fail(f"{notebook.name} cell {cell}: {error}", pytrace=False)
        for name in options.keys() & {"label", "fig-cap", "fig-alt", "code-summary"}:
            assert isinstance(options[name], str), f"{notebook.name} cell {cell}: {name} is not a string: quote it"
            # A blank and a # begin a comment.
            said = re.search(rf"^#\s*\|\s*{name}:\s*(.*?)\s*$", source, re.M)[1]
            assert said[0] in "\"'" or said == options[name], f"{notebook.name} cell {cell}: quote {name}"


@pytest.mark.parametrize(
    "head",
    ["#| fig-cap: Its bits. Orange: K-quants", "#| echo: true\n#| echo: false", "#| hide\n#| echo: false", "#| a:b"],
)
def test_a_head_that_is_no_mapping_is_seen(head):
    read_directives = tool("plain_pages")["read_directives"]
    with pytest.raises((ValueError, yaml.YAMLError)):
        read_directives(f"{head}\n1 + 1")
    assert read_directives('#| fig-cap: "Orange: K-quants"\n#| echo: false\n\nx') == (
        {"fig-cap": "Orange: K-quants", "echo": False}, "x",
    )  # fmt: skip


# Folders of the repository, and what else a notebook that is opened alone doesn't have beside it.
BESIDE = re.compile(r"(results|images|nbs|qlora_nb|benchmarks|tests|tools|runs|settings\.ini)(/|$)|.*\.ipynb$")


def places_beside(source):
    "What a cell takes for granted near the notebook: `../x`, files that are there, what it opens by such a path."
    tree, found = parse(source), []
    for node in ast.walk(tree) if tree else ():
        called = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        opened = ast.walk(node.args[0]) if called in ("Path", "open") and node.args else ()
        texts = [n.value for n in opened if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found += [text for text in texts if BESIDE.match(text)]
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        named = re.fullmatch(r"[\w./-]+\.\w+", text) and (NBS / text).is_file()
        found += [text] * bool(named or re.search(r"(^|/)\.\.(/|$)", text))
    return found if ".exists()" not in source else []


@each_notebook
def test_notebooks_need_no_place_beside_them(notebook):
    "Colab opens a notebook alone. A cell may look whether it stands in a checkout (`.exists()`), and do without."
    for cell, source in cells(notebook, "code"):
        assert places_beside(source) == [], f"{notebook.name} cell {cell}: take it from the package, or ask .exists()"


def test_a_place_beside_a_notebook_is_seen():
    for source in (
        'Path("../qlora_nb/embedded").resolve()',
        'subprocess.run(["python", "../benchmarks/study.py"])',
        'Path("results").glob("*.json")',
        'open("images/a.png")',
        'read_code("index.ipynb")',
        'Path(f"{name}.ipynb").read_text()',
    ):
        assert places_beside(source), source
    for source in ('Path("a.csv")', 'RESULTS / "x.json"', 'other = Path("../x.ini")\nif other.exists():\n    1'):
        assert not places_beside(source), source


@each_notebook
def test_title_and_subtitle(notebook):
    _, first = cells(notebook, "markdown")[0]
    lines = [line for line in first.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and len(lines) > 1 and lines[1].startswith("> ")


@each_notebook
def test_cells_are_short(notebook):
    for cell, source in cells(notebook, "code"):
        if not any(re.match(r"class\s", line) for line in body(source)):  # a class is one cell, however long
            assert len(body(source)) <= 40, f"{notebook.name} cell {cell}: {len(body(source))} lines, limit 40"


@each_notebook
def test_imports_stand_alone(notebook):
    "The docs build runs every cell with an import, where the notebook exports anything."
    if module_of(notebook) is None:
        return
    for cell, source in cells(notebook, "code"):
        tree = None if "nbdev_export(" in source else parse(source)
        if tree and any(top_level_imports(tree)):
            others = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not others, f"{notebook.name} cell {cell}: imports beside {ast.unparse(others[0])[:80]}"


@each_notebook
def test_cell_ids(notebook):
    ids = [cell for cell, _ in cells(notebook)]
    assert read(notebook)["nbformat_minor"] >= 5
    assert all(ids) and len(ids) == len(set(ids))


@each_notebook
def test_metadata(notebook):
    "No more than `nbdev_clean` leaves."
    allowed = {"kernelspec", "jekyll", "jupytext", "doc", "widgets", *settings()["allowed_metadata_keys"].split()}
    nb = read(notebook)
    assert set(nb["metadata"]) <= allowed
    for cell in nb["cells"]:
        assert set(cell["metadata"]) <= {"hide_input"}, cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


def machine_paths():
    places = [str(ROOT), str(Path.home()), "/tmp", "/root", "/home", "/Users", "/var/folders"]
    return re.compile(PATH_START + "(?:" + "|".join(re.escape(place.rstrip("/") + "/") for place in places) + ")")


@each_notebook
def test_stored_outputs(notebook):
    for cell in read(notebook)["cells"]:
        for output in cell.get("outputs", []):
            where = f"{notebook.name} cell {cell['id']}"
            assert output["output_type"] != "error", where
            assert output.get("name") != "stderr", f"{where}: stderr is stored"
            data = {k: v for k, v in output.get("data", {}).items() if k == "image/svg+xml" or "image/" not in k}
            found = machine_paths().search(json.dumps([data, output.get("text", "")]))
            assert not found, f"{where}: an output holds a path of the machine, {found.group()}"


PHONE = 350  # CSS pixels that a figure has on a screen of 390
GLYPHS = re.compile(r"scale\((0\.\d+) -\1\)")  # matplotlib's text as paths: its size in points, divided by 100


def smallest_text(svg):
    "The size of the smallest text of a figure in CSS pixels, on a phone's screen."
    if points := re.search(r'<svg[^>]* width="([\d.]+)pt"', svg):  # matplotlib's
        return 100 * min(map(float, GLYPHS.findall(svg))) * min(PHONE / float(points[1]), 4 / 3)
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])
    return min(map(float, re.findall(r'font-size="([\d.]+)"', svg))) * PHONE / width


@each_notebook
def test_figures_are_legible_on_a_phone(notebook):
    "Text is at least 9 pixels high; a figure too large for SVG has twice the screen's resolution and a phone's width."
    for cell in read(notebook)["cells"]:
        for output in cell.get("outputs", []):
            data, where = output.get("data", {}), f"{notebook.name} cell {cell['id']}"
            if "image/svg+xml" in data:
                size = smallest_text("".join(data["image/svg+xml"]))
                assert size >= 9, f"{where}: text of {size:.1f} pixels; make the figure narrower or the text larger"
            elif "image/png" in data:
                size = output["metadata"].get("image/png", {})
                assert size, f"{where}: an image at the screen's resolution; store it with tools/execute.py"
                assert size["width"] <= 490, f"{where}: {size['width']} pixels wide"


@pytest.mark.parametrize("path", sorted((NBS / "images").glob("*-*.svg")), ids=lambda path: path.stem)
def test_pictures_are_legible_on_a_phone(path):
    text = path.read_text(encoding="utf-8")
    assert smallest_text(text) >= 9
    if "</text>" in text:  # a drawing: it brings a ground of its own, for dark pages; a title too, or a page's alt text
        assert re.search(r'<rect width="\d+" height="\d+"( rx="6")? fill="#fff"/>', text)
        assert "<title>" in text or path.stem.startswith("fig-")


def test_small_text_is_found():
    import io

    import matplotlib
    from matplotlib.figure import Figure

    style = matplotlib.rc_params_from_file(str(ROOT / "tools/matplotlibrc"), use_default_template=True)
    for width, size, legible in ((4.8, 9, True), (4.8, 8, False), (6, 9, False), (3, 7, True)):
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(width, 2))
            figure.text(0.5, 0.5, "small $x_1$", fontsize=size)
            figure.text(0.5, 0.2, "large", fontsize=20)
            figure.savefig(drawn := io.StringIO(), format="svg")
        assert (smallest_text(drawn.getvalue()) >= 9) is legible, (width, size)
    drawing = '<svg viewBox="0 0 {} 100" font-size="12"><text font-size="{}">a</text></svg>'
    assert smallest_text(drawing.format(360, 11)) > 9 > smallest_text(drawing.format(500, 12))


def test_skipped_cells_are_listed():
    names = tool("skipped_cells")
    assert names["skipped_cells"]() == names["LISTED"].read_text(encoding="utf-8").splitlines(), (
        "the cells that no test runs have changed: look at them, then run `python tools/skipped_cells.py`"
    )


# --- what is committed ----------------------------------------------------------------------------------------------


def test_no_secrets_and_no_paths_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    files = [path for path in paths if path.is_file()]
    assert ROOT / "settings.ini" in files
    places = "|".join(re.escape(place) for place in (f"{ROOT}/", f"{Path.home()}/", "/tmp/bash" + "_"))
    secrets = rb"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    pattern = re.compile(f"{PATH_START}(?:{places})".encode() + b"|" + secrets)
    found = [(path.relative_to(ROOT), m.group()) for path in files if (m := pattern.search(path.read_bytes()))]
    assert found == []
