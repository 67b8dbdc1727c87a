"""Trains the embedded model again and keeps the run that comes with the package: python tools/embedded_run.py

The adapter, the curve, the evaluation and the settings go to qlora_nb/embedded/run; checkpoints, the picture and the
reports, which can be made again from them, don't.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = Path(__file__).resolve().parents[1] / "qlora_nb/embedded/run"
LEFT_OUT = shutil.ignore_patterns("checkpoints", "loss.png", "report.*")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "qlora_nb", "train", "--output", f"{place}/run"]
        subprocess.run(command, check=True, env={**os.environ, "QLORA_NB_PROFILE": "tiny"})
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.copytree(f"{place}/run", KEPT, ignore=LEFT_OUT)
    (KEPT / "adapter/adapter_model.safetensors").chmod(0o644)
