"""Fails unless the Unsloth in this environment is the tested one and imports."""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def check_version(name, wanted):
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed; {wanted} was asked for.")
    if found != wanted:
        sys.exit(f"{name} is {found}; {wanted} was asked for (older versions do not train on a CPU).")


def check_import():
    # torchvision's published wheel is a CUDA build and fails Unsloth's check beside a CPU torch.
    env = {**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_SKIP_TORCHVISION_CHECK": "1"}
    # Unsloth writes a cache into the current folder.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "import unsloth"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Unsloth is installed but cannot be imported:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    pins = dict(re.findall(r"^(unsloth\w*)==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.M))
    for name, wanted in pins.items():
        check_version(name, wanted)
    check_import()
    print(f"Unsloth {pins['unsloth']} is installed and imports.", file=sys.stderr)
