"""Fills the pages that are made of something else than notebooks: the public interface, and the changelog.

nbs/ holds what stands above the marker of such a page. What follows the marker is for those who read the file itself:
whenever the site is prepared, it gives way to what is read from the package, or from CHANGELOG.md.
"""

import dataclasses
import importlib
import inspect
import json
import re
import types
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- filled in when the site is made -->\n"
# The workflow comes first; then the rooms of the house in their order.
FIRST = ("load_model", "add_lora", "load_sft_dataset", "check_dataset", "train", "chat", "export_gguf")
# What these are wherever nothing else is said.
COMMON = {
    "model": "from `load_model`, `add_lora` or `open_run`",
    "tokenizer": "the model's",
    "data": "from `load_sft_dataset`",
    "run": "a `Run`, or its folder",
    "ax": "what is drawn on; None makes one",
}
METHODS = (types.FunctionType, classmethod, staticmethod)


def notebook_titles():
    "The title of each page, by its address."
    found = {}
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").splitlines()[0]
        found[re.sub(r"^\d+_", "", path.stem) + ".html"] = title.removeprefix("# ")
    return found


def type_name(annotation):
    "An annotation as it is spoken: str or Path or None."
    if annotation in (inspect.Parameter.empty, None):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", text).strip("'").replace(" | ", " or ")


def default_value(value):
    if value is inspect.Parameter.empty:
        return "required"
    text = repr(value)
    if text.startswith("<the "):  # a stand-in, as `train` has them
        return text.strip("<>")
    return f"`{text}`" if len(text) < 30 else "`TARGET_MODULES`" if value and "q_proj" in value else f"`{text[:26]}…`"


def cell(text):
    "A text as the cell of a pipe table."
    text = " ".join(str(text).split()).replace("|", "\\|")
    return re.sub(r"`[^`]*`|<", lambda found: r"\<" if found[0] == "<" else found[0], text)


def parameters(thing, settings):
    "(name, default, meaning and type) of each parameter, a run's settings among them."
    said = {name: found["docment"] for name, found in docments(thing, full=True).items()}
    for name, found in inspect.signature(thing).parameters.items():
        if name in ("self", "cls") or found.kind == found.VAR_KEYWORD:
            continue
        said[name] = "" if (said.get(name) or "").startswith("->") else said.get(name)  # what a one-line head returns
        meaning = said[name] or re.sub(r" \[[^\]]*\]$", "", settings.get(name, "")) or COMMON.get(name, "")
        kind = type_name(found.annotation)
        yield name, default_value(found.default), f"{meaning} *({kind})*" if kind else meaning


def split_docstring(thing):
    "What a thing does, and what it raises."
    text = (inspect.getdoc(thing) or "").partition("\nSettings, with their defaults")[0].strip()
    raised = re.findall(r"\bRaise (.+?\.)(?=\s|$)", text, re.S)
    does = re.sub(r"\s*\bRaise .+?\.(?=\s|$)", "", text, flags=re.S).strip()
    return (does, [" ".join(part.split()) for part in raised]) if does else (text, [])


def call(name, thing):
    "How a thing is called: what it needs, and the first of what it takes besides."
    words, more = [], False
    for found in inspect.signature(thing).parameters.values():
        if found.name in ("self", "cls"):
            continue
        if found.kind == found.VAR_KEYWORD:
            more = True
            continue
        if found.kind == found.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        if found.default is found.empty:
            words.append(found.name)
        elif "*" in words or len(words) >= 4:
            more = True
        else:
            words.append(f"{found.name}={default_value(found.default).strip('`')}")
    words += ["…"] * more
    return f"{name}({', '.join(words)})"


def described(heading, name, thing, settings):
    "What a function, a class or a method does: its call, its parameters as a table, what it returns and raises."
    does, raised = split_docstring(thing)
    lines = [heading, "", does, ""]
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        lines += ["```python", call(name, thing), "```", ""]
        rows = list(parameters(thing, settings))
        lines += ["| parameter | default | meaning |", "|-----|---|-----------|"] if rows else []
        lines += ["| " + " | ".join([f"`{row[0]}`", *map(cell, row[1:])]) + " |" for row in rows] + [""] * bool(rows)
    if not inspect.isclass(thing) and (returned := type_name(inspect.signature(thing).return_annotation)):
        # fastcore takes the comment on **settings for the one on what is returned.
        has_settings = thing.__code__.co_flags & inspect.CO_VARKEYWORDS
        said = None if has_settings else docments(thing, full=True)["return"]["docment"]
        lines += [f"**Returns** {returned}{f': {said}' if said else ''}", ""]
    return lines + ([f"**Raises** {' '.join(raised)}", ""] if raised else [])


def returned_class(thing):
    "The package's own class that a function returns, where it is no public name itself."
    if inspect.isclass(thing):
        return None
    name = inspect.signature(thing).return_annotation
    found = inspect.unwrap(thing).__globals__.get(name) if isinstance(name, str) else name
    own = inspect.isclass(found) and found.__module__.startswith("qlora_nb.")
    return found if own and found.__name__ not in importlib.import_module("qlora_nb").__all__ else None


def members(thing):
    "A class's own public properties and methods that have a docstring: two mappings by name."
    own = {name: (found, getattr(thing, name)) for name, found in vars(thing).items() if name[0] != "_"}
    kinds = ((property,), METHODS)
    return [{name: it for name, (found, it) in own.items() if isinstance(found, kind) and it.__doc__} for kind in kinds]


def fields(thing):
    "What is said of each field of a dataclass: a mapping by name."
    found = docments(thing, full=True) if dataclasses.is_dataclass(thing) else {}
    names = [field.name for field in dataclasses.fields(thing)] if found else ()
    return {name: found[name]["docment"] for name in names if name[0] != "_" and found[name]["docment"]}


def described_class(thing, public):
    "What the objects of a class hold, and each of its methods; what a public one is, and takes, stands above."
    name, (properties, methods) = thing.__name__, members(thing)
    held = {} if public else fields(thing)
    held |= {key: inspect.getdoc(found) for key, found in properties.items()}
    rows = [f"| `{key}` | {cell(text)} |" for key, text in held.items()]
    lines = [] if public else [f"**`{name}`**: {inspect.getdoc(thing)}", ""]
    lines += [f"| attribute of `{name}` | what it is |", "|---|--------|", *rows, ""] if rows else []
    for key, method in methods.items():
        whole = f"{name}.{key}"
        lines += described(f"### {whole} {{#{whole}}}", whole, method, {})  # `dtype` is no setting here
    return lines


def entry(name, thing, place, title, settings):
    "The part of the page on one public name: with a class's methods, or those of what a function returns."
    lines = described(f"## {name} {{#{name}}}", name, thing, settings)
    lines += [f"**Explained in** [{title}]({place})", ""]
    found = thing if inspect.isclass(thing) else returned_class(thing)
    return lines + (described_class(found, found is thing) if found else [])


def api_page():
    "The public interface: each name that `import qlora_nb` gives, then what the modules offer besides."
    package = importlib.import_module("qlora_nb")
    modules, titles = importlib.import_module("qlora_nb._modidx").d["syms"], notebook_titles()
    places = {name: place for names in modules.values() for name, (place, _) in names.items()}
    things = {name: getattr(package, name) for name in dict.fromkeys([*FIRST, *package._WHERE])}
    settings = {field.name: field.metadata["help"] for field in dataclasses.fields(package.Settings)}
    found = {name: places[f"{thing.__module__}.{thing.__qualname__}"] for name, thing in things.items()}
    lines = ["| name | what it does |", "|---|--------|"]
    lines += [
        f"| [`{name}`](#{name}) | {cell(split_docstring(thing)[0].split('. ')[0].splitlines()[0]).rstrip('.')} |"
        for name, thing in things.items()
    ]
    for name, thing in things.items():
        lines += ["", *entry(name, thing, found[name], titles[found[name].partition("#")[0]], settings)]
    lines += ["## What the modules offer besides {#modules}", "", "| module | names |", "|---|--------|"]
    for module in sorted(modules):
        names = [name for name in importlib.import_module(module).__all__ if name not in things]
        names = [
            f"[`{name}`]({places[f'{module}.{name}']})" if f"{module}.{name}" in places else f"`{name}`"
            for name in names
        ]
        if names:
            lines += [f"| `{module}` | {', '.join(names)} |"]
    return "\n".join(lines) + "\n"


def changelog_page():
    "CHANGELOG.md without its title and first paragraph, which the page has."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text[text.index("\n## ") + 1 :]


PAGES = {"api.md": api_page, "changelog.md": changelog_page}


def fill(folder):
    "Put each page's text in the place of its marker."
    for name, make in PAGES.items():
        path = Path(folder, name)
        before, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
        if not marker:
            raise SystemExit(f"{path} has no line {MARKER.strip()}")
        path.write_text(before + make(), encoding="utf-8")
