"""An environment and a checkout that owe nothing to the developer's."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def clean_env(tmp_path):
    "The environment of a new user: no virtual environment, no make around it, an empty model cache."
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MFLAGS", "IN_TEST", "MAKE", "QLORA_NB", "PYTEST", "HF_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    here = Path(sys.prefix) / "bin"
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if Path(p) != here)
    env["HF_HOME"] = str(tmp_path / "hf")
    env["UNSLOTH_DISABLE_STATISTICS"] = "1"
    return env


def clone(tmp_path):
    "What is committed, and nothing else."
    target = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    return target


def run(command, cwd, env, timeout):
    "Runs a command, fails with its output, and returns its stdout."
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    shown = f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.returncode == 0, shown
    return done.stdout
