"""Makes README.md, and the pictures in it, from nbs/index.ipynb, without Quarto."""

import base64
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
            line = line.replace("](nbs/changelog.md", "](CHANGELOG.md")  # the site's page is made from it
        out.append(line)
    return "\n".join(out).strip("\n")


def fence(text, language):
    return f"```{language}\n{text}\n```"


def output_text(output):
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    return "".join(output.get("data", {}).get("text/plain", ""))


def picture(data, directives, images):
    "A picture of the notebook as a file beside it: {name: bytes} goes into `images`."
    options = dict(d.split(": ", 1) for d in directives if ": " in d)
    label = options["label"]
    svg = "".join(data.get("image/svg+xml", ""))
    name = f"{label}.{'svg' if svg else 'png'}"
    images[name] = svg.encode() if svg else base64.b64decode("".join(data["image/png"]))
    alt, caption = (options.get(name, "").strip('"') for name in ("fig-alt", "fig-cap"))
    return f"![{alt}](nbs/images/{name})" + f"\n\n*{caption}*" * bool(caption)


def code(cell, images):
    directives, source = split_directives("".join(cell["source"]))
    if directives & {"hide", "default_exp", "include: false"} or any(d.startswith("default_exp") for d in directives):
        return []
    parts = []
    if source and not directives & {"echo: false", "hide_input"}:
        parts.append(fence(source, "python"))
    if not directives & {"output: false", "hide_output"}:
        texts = []
        for output in cell["outputs"]:
            data = output.get("data", {})
            if {"image/svg+xml", "image/png"} & set(data) and any(d.startswith("label: ") for d in directives):
                parts.append(picture(data, directives, images))
            elif "text/markdown" in data:
                parts.append(prose("".join(data["text/markdown"])))
            elif not any(kind.startswith("image/") for kind in data):
                texts.append(output_text(output))
        if text := "".join(t if t.endswith("\n") else t + "\n" for t in texts if t.strip()).strip("\n"):
            parts.append(fence(text, "text"))
    return parts


def readme(notebook, images=None):
    "The text of README.md for a notebook, given as its JSON; its pictures go into `images`."
    images = {} if images is None else images
    parts = ["<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit the notebook. -->"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(prose("".join(cell["source"])))
        elif cell["cell_type"] == "code":
            parts.extend(code(cell, images))
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    notebook, images = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")), {}
    (ROOT / "README.md").write_text(readme(notebook, images), encoding="utf-8")
    for name, content in images.items():
        (ROOT / "nbs/images" / name).write_bytes(content)


if __name__ == "__main__":
    main()
