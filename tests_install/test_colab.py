"""Notebooks as Colab runs them: alone in an empty folder, all cells from the first to the last, install cell included.

Colab brings Python, a kernel and torch. The one thing that is changed is where the install line gets the package: the
wheel built from the commit. No GPU is there, so the embedded model stands for the large one.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import clean_env, run

# The first steps, one that computes, and those that read what the package brings along.
OPENED = ["30_quickstart", "02_nf4", "00_core", "12_data"]

EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def needs_of_unsloth(source):
    "What `make install` takes beside Unsloth, from the Makefile."
    return re.search(r"^UNSLOTH_NEEDS := (.*)$", (source / "Makefile").read_text(), re.M)[1].split()


def replaced(line, source, wheel, unsloth):
    "The install line with the wheel in place of what it installs from, and the tested versions; its other extras stay."
    start, extras, end = re.fullmatch(r'%pip install -q "(.*)\[([a-z,]+)\](.*)"', line).groups()
    # From PyPI, from a repository, or the wheel that one uploads: in settings.ini.
    assert (
        start == "qlora_nb"
        and re.fullmatch(r"( @ git\+https://\S+@\S+)?", end)
        or (start, end) == (f"./{wheel.name}", "")
    ), line
    extras = extras.split(",")
    assert extras in (["unsloth"], ["unsloth", "serve"]), line
    extras = extras[0 if unsloth else 1 :]
    named = f"[{','.join(extras)}]" if extras else ""
    return f'%pip install -q "qlora_nb{named} @ {wheel.as_uri()}" -c {source / "constraints.txt"}'


def resolves(python, wheel, source, place, env):
    "Whether what Unsloth asks for can be had: not where the registry is behind, or has torchvision for CUDA alone."
    report = place / "report.json"
    command = [python, "-m", "pip", "install", "-q", "--dry-run", "--report", report, "-c", source / "constraints.txt"]
    done = subprocess.run([*map(str, command), f"qlora_nb[unsloth] @ {wheel.as_uri()}"], cwd=place, env=env,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    if done.returncode:
        assert "certifi" in done.stdout + done.stderr, done.stderr[-4000:]
        print(f"the registry lacks what Unsloth asks for: {done.stderr.strip().splitlines()[-1]}")
        return False
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    torchvision = next((one["version"] for one in found if one["name"] == "torchvision"), None)
    torch = run([str(python), "-c", "import torch; print(torch.__version__)"], place, env, 120).strip()
    if torchvision and "+cpu" in torch and "+cpu" not in torchvision:
        print(f"torch is {torch}, torchvision {torchvision} is made for CUDA; Colab brings a pair that fits")
        return False
    return True


@pytest.fixture(scope="module")
def colab(built, tmp_path_factory):
    "A machine like Colab's: (folder, environment, its Python, clone, wheel, whether all of Unsloth can be had)."
    place = tmp_path_factory.mktemp("colab")
    env, (source, dist) = clean_env(place), built
    (wheel,) = dist.glob("*.whl")
    run([sys.executable, "-m", "venv", str(place / "venv")], place, env, 120)
    python = place / "venv/bin/python"
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(source / "constraints.txt")]
    run([*pip, "torch", "ipykernel", "nbclient"], place, env, 900)
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    unsloth = resolves(python, wheel, source, place, env)
    if not unsloth:
        # The same packages by the way that `make install` takes around the registry's gap.
        run([*pip, *needs_of_unsloth(source), "pytest", "fastcore<2"], place, env, 600)
        run([*pip, "--no-deps", "unsloth", "unsloth_zoo"], place, env, 600)
    return place, env, python, source, wheel, unsloth


def shorten(notebook, name):
    "The quick start in a few steps, without what says how well it learned: test_fresh_clone.py trains all of it."
    found = 0
    for cell in notebook["cells"] if name == "30_quickstart" else ():
        text = "".join(cell["source"])
        if text.startswith("#| heavy"):
            text = ""
        found += text.count("**settings)")
        cell["source"] = text.replace("**settings)", "**settings, max_steps=8, eval_rows=2)")
    assert found == (name == "30_quickstart")


@pytest.mark.parametrize("name", OPENED)
def test_notebook_in_colab(name, colab):
    place, env, python, source, wheel, unsloth = colab
    outside = place / name
    outside.mkdir()
    notebook = json.loads((source / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in notebook["cells"] if c["cell_type"] == "code" and "%pip" in "".join(c["source"])]
    head, line = "".join(cell["source"]).split("\n")
    assert head == "#| eval: false"
    cell["source"] = replaced(line, source, wheel, unsloth)
    shorten(notebook, name)
    for other in notebook["cells"]:
        other["outputs"] = [] if other["cell_type"] == "code" else other.pop("outputs", None)
        if other["outputs"] is None:
            del other["outputs"]
    (outside / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (place / "execute.py").write_text(EXECUTE)
    done = place / f"{name}_done.ipynb"
    run([str(python), str(place / "execute.py"), f"{name}.ipynb", str(done)], outside, env, 1500)
    made = json.loads(done.read_text())
    assert all(c["execution_count"] for c in made["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip())
    found = run([str(python), "-c", "import qlora_nb; print(qlora_nb.__file__)"], outside, env, 60)
    assert Path(found.strip()).is_relative_to(place / "venv")
    left = {path.name for path in outside.iterdir()} - {f"{name}.ipynb"}
    if name == "30_quickstart":
        assert len(list(outside.glob("runs/*/adapter/adapter_model.safetensors"))) == 1, "the run is gone"
        assert len(list(outside.glob("runs/*/*-Q8_0.gguf"))) == 1, "no GGUF was written"
        installed = run([str(python), "-m", "pip", "list"], outside, env, 60)
        assert "llama-cpp-python" not in installed.lower().replace("_", "-"), "the quick start needs a compiler"
        left -= {"runs"}
    assert not left, "the notebook leaves files behind"
