"""Makes README.md from nbs/index.ipynb, without Quarto."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")


def split_directives(source):
    "The directives at the head of a cell (`#| hide` as 'hide'), and the rest of it."
    lines = source.splitlines()
    matches = [DIRECTIVE.match(line) for line in lines]
    directives = {re.sub(r":\s*", ": ", m.group(1)) for m in matches if m}
    return directives, "\n".join(line for line, m in zip(lines, matches) if not m).strip("\n")


def prose(source):
    "Markdown without what only Quarto reads, its links going out from the repository's top level."
    out, fenced = [], False
    for line in source.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not fenced:
            if line.lstrip().startswith(":::"):
                continue
            line = re.sub(r"(?<=[\])\w`])\s*\{[#.][^}]*\}", "", line)
            line = re.sub(r"\]\((?![a-z]+:|[#/])(?:\./)?", "](nbs/", line).replace("](nbs/../", "](")
        out.append(line)
    return "\n".join(out).strip("\n")


def fence(text, language):
    return f"```{language}\n{text}\n```"


def output_text(output):
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    return "".join(output.get("data", {}).get("text/plain", ""))


def code(cell):
    directives, source = split_directives("".join(cell["source"]))
    if directives & {"hide", "default_exp", "include: false"} or any(d.startswith("default_exp") for d in directives):
        return []
    parts = []
    if source and not directives & {"echo: false", "hide_input"}:
        parts.append(fence(source, "python"))
    if not directives & {"output: false", "hide_output"}:
        texts = [output_text(o) for o in cell["outputs"] if not any(k.startswith("image/") for k in o.get("data", {}))]
        if text := "".join(t if t.endswith("\n") else t + "\n" for t in texts if t.strip()).strip("\n"):
            parts.append(fence(text, "text"))
    return parts


def readme(notebook):
    "The text of README.md for a notebook, given as its JSON."
    parts = ["<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit the notebook. -->"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(prose("".join(cell["source"])))
        elif cell["cell_type"] == "code":
            parts.extend(code(cell))
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    notebook = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(readme(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
