"""What is made from the notebooks is what is committed, and importing it is quick."""

import os
import shutil
import subprocess
import sys

import pytest
from repository import NBS, PACKAGE, ROOT, read, tool

pytestmark = pytest.mark.quick


def python_files(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def test_modules_are_exported(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(NBS, tmp_path / "nbs", ignore=lambda folder, names: [n for n in names if not n.endswith(".ipynb")])
    (tmp_path / "qlora_nb").mkdir()
    for name in ("__init__.py", "__main__.py"):  # written by hand
        shutil.copy(PACKAGE / name, tmp_path / "qlora_nb")
    # With this set nbdev_export does nothing, and says nothing.
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    made, committed = python_files(tmp_path / "qlora_nb"), python_files(PACKAGE)
    assert len(made) > 2 and set(made) == set(committed)
    stale = [name for name in made if made[name] != committed[name]]
    assert not stale, f"not what the notebooks export: {stale}; run `make export`"


def test_readme_is_made_from_index():
    made = tool("make_readme")["readme"](read(NBS / "index.ipynb"))
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), "run `make readme`"


def test_readme_leaves_out_what_only_quarto_reads():
    source = "# T {#id .c}\n\n::: {.callout-note}\nsee [a](10_model.ipynb) and [b](https://x.y)\n:::"
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": source},
            {"cell_type": "code", "source": "#| hide\nsecret", "outputs": []},
            {
                "cell_type": "code",
                "source": ["#| echo: true\n", "1+1"],
                "outputs": [
                    {"output_type": "stream", "name": "stderr", "text": ["noise"]},
                    {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
                    {"output_type": "display_data", "data": {"text/plain": ["<Figure>"], "image/png": "x"}},
                ],
            },
        ]
    }
    text = tool("make_readme")["readme"](notebook).split("\n\n", 1)[1]
    expected = "# T\n\nsee [a](nbs/10_model.ipynb) and [b](https://x.y)\n\n```python\n1+1\n```\n\n```text\n2\n```\n"
    assert text == expected


def test_help_loads_only_what_it_prints():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "qlora_nb", "--help"],
                          cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qlora_nb.cli" in loaded and not loaded & {"torch", "transformers", "numpy", "psutil", "ctypes"}


def test_import_is_light():
    script = """
import sys, time
start = time.perf_counter()
import qlora_nb
print(time.perf_counter() - start, *({"torch", "transformers"} & set(sys.modules)))
"""

    def once():
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, *heavy = done.stdout.split()
        assert not heavy, f"import qlora_nb imports {heavy}"
        return float(seconds)

    assert min(once() for _ in range(5)) < 0.3
