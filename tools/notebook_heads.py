"""Gives every notebook the same head, foot and metadata, and CITATION.cff what it says, from settings.ini.

    python tools/notebook_heads.py [nbs/X.ipynb …]

- The first text cell holds the title and the one-line claim alone: nbdev makes the page's title of that cell, and drops
  whatever else stands in it.
- The next one begins with the badge that opens the notebook in Colab; without an owner, with what to upload there. On
  the front page it ends with it: what the package does comes first.
- One install cell, the same everywhere: from PyPI if this version is there, else from the owner's repository, else from
  a wheel beside the notebook. On the front page the lines that install, and how to cite.
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

import yaml

ROOT = Path(__file__).resolve().parents[1]
UPLOAD = "In Colab: upload {}, and the wheel that `make wheel` builds in `dist/`."
WAY_IN = re.compile(
    r"^(?:\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)|" + re.escape(UPLOAD).replace(r"\{\}", "[^,]*") + r")[ \t]*\n*", re.M
)
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
    (
        "17_gguf",
        "18_ollama",
        "22_certificate",
        "42_troubleshooting",
        "55_llama",
        "72_cli",
        "83_gguf_writer",
        "95_gguf_reader",
    ),
    "gguf",
)
EXTRAS |= dict.fromkeys(("30_quickstart", "35_real_model", "54_workflow"), "serve")
EXTRAS |= dict.fromkeys(("23_session", "24_answers", "25_publish"), "serve")


def settings(root=ROOT):
    config = ConfigParser()
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def repository(cfg):
    return f"https://github.com/{cfg['user']}/{cfg['repo']}"


def way_in(stem, cfg):
    "The line that opens a notebook in Colab. The index is the repository's front page: its line is the quick start's."
    target = "30_quickstart" if stem == "index" else stem
    if not cfg["user"]:
        return UPLOAD.format("[the quick start](30_quickstart.ipynb)" if stem == "index" else "this notebook")
    where = f"{COLAB}/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{target}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({where})"


def requirement(cfg, extras):
    "What pip is asked for: the version that the notebooks are of."
    name = f"{cfg['lib_name']}[{extras}]"
    if cfg["published"] == cfg["version"]:
        return name
    if cfg["user"]:
        return f"{name} @ git+{repository(cfg)}@{cfg['branch']}"
    return f"./{cfg['lib_name']}-{cfg['version']}-py3-none-any.whl[{extras}]"


def install_line(cfg, stem=""):
    "The one line that installs all in Colab; with llama.cpp for the notebooks that run it."
    extras = f"unsloth,{EXTRAS[stem]}" if stem in EXTRAS else "unsloth"
    return f'%pip install -q "{requirement(cfg, extras)}"'


def front_install(cfg):
    "The front page's lines that install: the demo, and the package."
    at_hand = cfg["user"] or cfg["published"] == cfg["version"]
    package = f'pip install "{requirement(cfg, "serve") if at_hand else ".[serve]"}"'
    demo = f"git clone {repository(cfg)} && cd {cfg['repo']} && make demo" if cfg["user"] else "make demo"
    width = max(len(package), len(demo))
    lines = f"{demo:{width}}  # a whole run{'' if cfg['user'] else ', in a copy of the repository'}\n"
    lines += f"{package:{width}}  # the package; on a GPU [serve,unsloth]"
    links = [f"Version {cfg['version']}", "[what is new](changelog.md)"]
    if cfg["user"]:
        links += [f"[repository]({repository(cfg)})", f"[site]({cfg['doc_host']}{cfg['doc_baseurl']})"]
    return f"```sh\n{lines}\n```\n\n{' · '.join(links)}"


def released(root=ROOT):
    "The version and the date (None before the release) of the changelog's first entry."
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.search(r"^## (\S+) \((?:(\d{4}-\d\d-\d\d)|not released)\)$", text, re.M).groups()


def citation(cfg, date):
    "CITATION.cff, as GitHub reads it: https://citation-file-format.github.io."
    found = {
        "cff-version": "1.2.0",
        "message": "If you use this software, please cite it as below.",
        "type": "software",
        "title": cfg["title"],
        "abstract": cfg["description"],
        "authors": [{"name": cfg["author"]}],
        "version": cfg["version"],
        "license": "Apache-2.0",
    }
    if date:
        found["date-released"] = date
    if cfg["user"]:
        found |= {"repository-code": repository(cfg), "url": cfg["doc_host"] + cfg["doc_baseurl"]}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000)


def bibtex(cfg, date):
    "The same for LaTeX."
    fields = {"author": f"{{{cfg['author']}}}", "title": f"{cfg['title']}: {cfg['description']}"}
    fields = {name: text.replace("_", r"\_") for name, text in fields.items()}
    fields |= {"year": (date or cfg["copyright"])[:4], "version": cfg["version"]}
    if cfg["user"]:
        fields["url"] = repository(cfg)
    lines = "".join(f"  {name:7} = {{{text}}},\n" for name, text in fields.items())
    return f"```bibtex\n@software{{{cfg['lib_name']},\n{lines}}}\n```"


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
    parts = [way_in(stem, cfg), WAY_IN.sub("", rest).strip()]
    put(after, "\n\n".join(reversed(parts) if stem == "index" else parts))
    return at + 1


def set_install(cells, at, stem, cfg):
    text = f"#| eval: false\n{install_line(cfg, stem)}"
    found = [cell for cell in cells if cell["cell_type"] == "code" and re.search(r"^%pip install", source(cell), re.M)]
    if found:
        put(found[0], text)
    else:
        cells.insert(at + 1, new_cell("code", text, stem, "install"))


def set_front(cells, at, stem, cfg):
    "The front page's lines: how to install, and how to cite."
    written = {"install": ("```sh\n", front_install(cfg)), "cite": ("```bibtex\n", bibtex(cfg, released()[1]))}
    for role, (begin, text) in written.items():
        fresh = new_cell("markdown", text, stem, role)
        found = next((cell for cell in cells if cell["id"] == fresh["id"]), None)
        if found is None:
            cells.insert(at + 1 if role == "install" else len(cells), fresh)
        else:
            put(found, source(found)[: source(found).index(begin)] + text)


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
    (set_front if stem == "index" else set_install)(cells, at, stem, cfg)
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
    (ROOT / "CITATION.cff").write_text(citation(cfg, released()[1]), encoding="utf-8")
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
