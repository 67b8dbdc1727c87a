"""Gives every notebook the same head, foot and metadata, from settings.ini.

    python tools/notebook_heads.py [nbs/X.ipynb …]

- The first text cell holds the title and the one-line claim alone: nbdev makes the page's title of that cell, and drops
  whatever else stands in it.
- The next one begins with the badge that opens the notebook in Colab.
- One install cell, the same everywhere.
- A GPU in the metadata where cells need one.
- Measured results are read where the package has them, so that a copy of the notebook alone finds them too.
- The last cell exports only in a checkout: in Colab there is nothing to export to.

Safe to repeat; all other cells, and the ids of all, stay as they are.
"""

import hashlib
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)[ \t]*\n*", re.M)
COLAB = "https://colab.research.google.com"
FOOT = """#| hide
from pathlib import Path

if Path("../settings.ini").exists():  # a checkout; in Colab there is nothing to export to
    from nbdev import nbdev_export

    nbdev_export()"""
# Made for a GPU, though their cells also run without one.
WANT_GPU = ("30_quickstart",)
# What they install besides Unsloth: those that make K-quants or open a file in llama.cpp's library need a compiler.
EXTRAS = dict.fromkeys(
    ("17_gguf", "18_ollama", "22_certificate", "55_llama", "72_cli", "83_gguf_writer", "95_gguf_reader"), "gguf"
)
EXTRAS |= dict.fromkeys(("30_quickstart", "35_real_model", "54_workflow"), "serve")
EXTRAS |= dict.fromkeys(("23_session", "24_answers", "25_publish"), "serve")


def settings(root=ROOT):
    config = ConfigParser()
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def badge(stem, cfg):
    "The picture that opens a notebook in Colab."
    where = f"{COLAB}/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{stem}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({where})"


def install_line(cfg, stem=""):
    "The one line that installs all in Colab; with llama.cpp for the notebooks that run it."
    extras = f"unsloth,{EXTRAS[stem]}" if stem in EXTRAS else "unsloth"
    name, url = cfg["lib_name"], f"https://github.com/{cfg['user']}/{cfg['repo']}"
    return f'%pip install -q "{name}[{extras}] @ git+{url}@{cfg["branch"]}"'


def source(cell):
    return "".join(cell["source"])


def put(cell, text):
    cell["source"] = text.splitlines(True)


def new_cell(kind, text, stem, role):
    "A cell whose id depends on the notebook and the cell's role alone."
    cell = {"cell_type": kind, "id": hashlib.sha256(f"{stem} {role}".encode()).hexdigest()[:8], "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    put(cell, text)
    return cell


def split_title(text):
    "The title with its claim, and what else stands in the cell."
    title, claim, rest = re.match(r"\s*(# .*)\n\s*\n?((?:>.*\n?)+)([\s\S]*)", text).groups()
    return f"{title.strip()}\n\n{claim.strip()}", rest.strip("\n")


def needs_gpu(cells, stem):
    return stem in WANT_GPU or any(re.match(r"#\s*\|\s*cuda\b", source(c)) for c in cells if c["cell_type"] == "code")


def set_head(cells, stem, cfg):
    at = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "markdown")
    title, rest = split_title(source(cells[at]))
    put(cells[at], title)
    after = cells[at + 1]
    if not rest and after["cell_type"] == "markdown":
        rest = source(after)
    else:
        after = new_cell("markdown", "", stem, "head")
        cells.insert(at + 1, after)
    # The index is the repository's front page: its badge opens the quick start.
    target = "30_quickstart" if stem == "index" else stem
    put(after, f"{badge(target, cfg)}\n\n{BADGE.sub('', rest).strip()}")
    return at + 1


def set_install(cells, at, stem, cfg):
    text = f"#| eval: false\n{install_line(cfg, stem)}"
    found = [cell for cell in cells if cell["cell_type"] == "code" and re.search(r"^%pip install", source(cell), re.M)]
    if found:
        put(found[0], text)
    else:
        cells.insert(at + 1, new_cell("code", text, stem, "install"))


def results_from_package(text):
    '`Path("results/x.json")` becomes `(RESULTS_FOLDER / "x.json")`; an own RESULTS is dropped.'
    text = re.sub(r'^RESULTS = Path\("results"\).*\n', "", text, flags=re.M)
    text = re.sub(r'json\.loads\(Path\((f?)"results/([^"]+)"\)', r'json.loads((RESULTS_FOLDER / \1"\2")', text)
    text = re.sub(r'json\.loads\(Path\("results", (f?"[^"]+")\)', r"json.loads((RESULTS_FOLDER / \1)", text)
    return text


def set_results(cells, stem):
    "An import of RESULTS_FOLDER before the first cell that reads a measured result."
    blocks = (cell for cell in cells if cell["cell_type"] == "code")
    changed = [cell for cell in blocks if results_from_package(source(cell)) != source(cell)]
    for cell in changed:
        put(cell, results_from_package(source(cell)))
    if changed and not any("import RESULTS_FOLDER" in source(cell) for cell in cells):
        text = "#| hide\nfrom qlora_nb.core import RESULTS_FOLDER"
        cells.insert(cells.index(changed[0]), new_cell("code", text, stem, "results"))


def set_heads(notebook, stem, cfg):
    "Changes a notebook, given as its JSON."
    cells = notebook["cells"]
    at = set_head(cells, stem, cfg)
    if stem != "index":
        set_install(cells, at, stem, cfg)
    set_results(cells, stem)
    for cell in cells:
        if cell["cell_type"] == "code" and re.search(r"^\s*nbdev\.nbdev_export\(\)", source(cell), re.M):
            put(cell, FOOT)
    if needs_gpu(cells, stem):
        notebook["metadata"] |= {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
    notebook["nbformat_minor"] = max(5, notebook["nbformat_minor"])
    return notebook


def main(paths):
    cfg = settings()
    for path in paths or sorted((ROOT / cfg["nbs_path"]).glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        notebook = set_heads(json.loads(before), path.stem, cfg)
        # As nbdev and nbformat write it.
        after = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.name, file=sys.stderr)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
