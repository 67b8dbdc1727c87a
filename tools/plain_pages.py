"""The prepared pages as plain HTML, by pandoc and our stylesheet alone: python tools/plain_pages.py _proc OUT

Not the site: Quarto's navigation, search and theme are missing, but for the theme's rule that makes code wide. It is
what the tests look at, and what one can read where Quarto is not installed. Directives, cross-references and links are
resolved as Quarto does.
"""

import base64
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

DIRECTIVE = re.compile(r"^#\s*\| ?(.*)$")
KINDS = {"fig": "Figure", "eq": "Equation", "tbl": "Table", "sec": "Section"}
CROSS = re.compile(r"(?<![\w@/.`\[])@((fig|eq|tbl|sec)-[\w-]+)")
LABELLED_MATH = re.compile(r"(\$\$[^$]+\$\$)\s*\{#(eq-[\w-]+)\}")


def pages(folder):
    return sorted(path for path in Path(folder).iterdir() if path.suffix in (".ipynb", ".md", ".qmd"))


def page_name(path):
    return f"{re.sub(r'^[0-9]+_', '', Path(path).stem)}.html"


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def fence(text, kind=""):
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {{{kind}}}\n{text.rstrip()}\n{ticks}"


def read_directives(source):
    "The options at the head of a cell, as Quarto reads them (all lines are one YAML mapping), and the code below them."
    lines, head = source.splitlines(), []
    while lines and (match := DIRECTIVE.match(lines[0])):
        head.append(match[1])
        lines.pop(0)
    options = yaml.safe_load("\n".join(head)) or {}
    # An option a line: one that is there twice Quarto refuses, and PyYAML does not.
    if not isinstance(options, dict) or len(options) != len(head):
        raise ValueError(f"not one option a line: {head}")
    return options, "\n".join(lines).strip("\n")


def attribute(text):
    return html.escape(str(text), quote=True).replace("\n", " ")


def picture(data, options, place, number):
    "A figure as pandoc reads it; the picture becomes a file."
    label = options.get("label") or f"unlabelled-{number}"
    svg = data.get("image/svg+xml")
    name = f"{label}.{'svg' if svg else 'png'}"
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(text_of(svg).encode() if svg else base64.b64decode(text_of(data["image/png"])))
    alt = f'fig-alt="{attribute(options["fig-alt"])}"' if options.get("fig-alt") else ""
    return f"\n![{options.get('fig-cap', '')}]({place.name}/{name}){{#{label} {alt}}}\n"


def show(output, options, place, number):
    "One output; the richest form that the page can hold."
    if output["output_type"] == "error":
        return fence("\n".join(output["traceback"]), ".output .error")
    if output["output_type"] == "stream":
        return fence(text_of(output["text"]), f".output .{output['name']}")
    data = output["data"]
    if {"image/png", "image/svg+xml"} & set(data):
        return picture(data, options, place, number)
    if "text/html" in data:
        return f"\n```{{=html}}\n{text_of(data['text/html'])}\n```\n"
    if "text/markdown" in data:
        return f"\n{text_of(data['text/markdown'])}\n"
    return fence(text_of(data["text/plain"]), ".output") if "text/plain" in data else ""


def code(cell, place, number):
    options, source = read_directives(text_of(cell["source"]))
    parts = []
    if options.get("include") is False:
        return ""
    if source and options.get("echo") is not False:
        block = fence(source, ".python")
        if options.get("code-fold"):
            title = html.escape(str(options.get("code-summary", "Code")))
            block = f"<details><summary>{title}</summary>\n\n{block}\n\n</details>"
        parts.append(block)
    if options.get("output") is not False:
        parts += [show(output, options, place, f"{number}-{i}") for i, output in enumerate(cell["outputs"])]
    return "\n\n".join(part for part in parts if part)


def number_labels(text):
    "Labelled equations get their number, references their text."
    numbers = {}
    for label, kind in re.findall(r"\{#((fig|eq|tbl|sec)-[\w-]+)", text):
        numbers.setdefault(label, 1 + sum(other.startswith(f"{kind}-") for other in numbers))

    def equation(match):
        return f"[{match[1][:-2]}\\qquad({numbers[match[2]]})$$]{{#{match[2]}}}"

    def refer(match):
        if match[1] not in numbers:
            return match[0]
        return f"[{KINDS[match[2]]} {numbers[match[1]]}](#{match[1]})"

    return CROSS.sub(refer, LABELLED_MATH.sub(equation, text))


def to_markdown(path, place):
    "A prepared page as one Markdown text; its pictures go to `place`."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        parts = []
        for number, cell in enumerate(json.loads(text)["cells"]):
            is_code = cell["cell_type"] == "code"
            parts.append(code(cell, place, number) if is_code else text_of(cell["source"]).strip("\n"))
        text = "\n\n".join(part for part in parts if part)
    return number_labels(text)


def site_links(text):
    "Links between sources become links between pages."
    link = re.compile(r'href="([\w.-]+)\.(?:ipynb|md|qmd)(#[^"]*)?"')
    return link.sub(lambda m: f'href="{page_name(m[1] + ".x")}{m[2] or ""}"', text)


def pandoc():
    import pypandoc

    return pypandoc.get_pandoc_path()


def to_html(path, out, template, highlight):
    "Write the page; returns what pandoc said."
    place = out / f"{page_name(path).removesuffix('.html')}_files"
    text = to_markdown(path, place)
    command = [pandoc(), "-f", "markdown-smart", "-t", "html5", "--mathml", "--toc", "--toc-depth=3", "--standalone"]
    command += ["--wrap=none", "--template", str(template)]
    command += ["--syntax-highlighting=pygments" if highlight else "--syntax-highlighting=none"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=out)
    (out / page_name(path)).write_text(site_links(done.stdout), encoding="utf-8")
    return done.stderr.splitlines() + [f"pandoc ended with {done.returncode}"] * bool(done.returncode)


TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$pagetitle$</title><meta name="description" content="$description$"><style>$highlighting-css$</style>
<style>:root { color-scheme: light dark; } body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
font: 17px/1.55 "Source Sans Pro", "DejaVu Sans", sans-serif; } code { white-space: pre; }
@media (prefers-color-scheme: dark) { body { background: #222; color: #eee; } a { color: #00bc8c; } }</style>
<link rel="stylesheet" href="styles.css"></head>
<body><main><h1 class="title">$title$</h1><p class="description">$description$</p>
$body$
</main></body></html>
"""


def make(proc, out, highlight=True):
    "All pages of a folder that tools/prepare_docs.py made; returns {page: what pandoc said}. Colours cost the most."
    proc, out = Path(proc).resolve(), Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    template = out / "page.template"
    template.write_text(TEMPLATE, encoding="utf-8")
    for path in [*proc.glob("*.css"), *proc.glob("images/*")]:
        target = out / path.relative_to(proc)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    said = {path.name: to_html(path, out, template, highlight) for path in pages(proc)}
    template.unlink()
    return said


if __name__ == "__main__":
    for name, lines in make(*sys.argv[1:3]).items():
        for line in lines:
            print(f"{name}: {line}", file=sys.stderr)
