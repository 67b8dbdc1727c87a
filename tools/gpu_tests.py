"""Runs the tests that need a GPU, and keeps what ran: python tools/gpu_tests.py [--check]

nbs/results/gpu_tests.json holds a hash of the engine's code (without comments and docstrings), GPU, versions and
date. `--check` runs nothing: it fails where the engine's code is no longer the one that was tried.
"""

import ast
import hashlib
import io
import json
import subprocess
import sys
import time
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "nbs/results/gpu_tests.json"
# What runs on a GPU in a step of training.
ENGINE = ("engine/*.py", "kernels.py", "qlora.py", "lora.py", "nf4.py", "loop.py", "trainer.py")


def engine_files():
    return sorted(path for pattern in ENGINE for path in (ROOT / "qlora_nb").glob(pattern))


def bare(text):
    "A source without comments, docstrings and blank lines: the same in every version of Python."
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def engine_hash():
    "SHA-256 over the engine's files, their names among them."
    parts = [f"{path.relative_to(ROOT)}\n{bare(path.read_text(encoding='utf-8'))}" for path in engine_files()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check():
    "What is wrong with the stored result, or None."
    if not RESULT.exists():
        return "the engine's tests were never run on a GPU: make test-gpu"
    if json.loads(RESULT.read_text(encoding="utf-8"))["engine_sha256"] != engine_hash():
        return "the engine's code has changed since its tests ran on a GPU: make test-gpu"
    return None


def run():
    "The tests on this machine's GPU; the result is written if all pass."
    import torch

    if not torch.cuda.is_available():
        sys.exit("make test-gpu needs a CUDA GPU, and torch sees none here")
    sys.path.insert(0, str(ROOT))
    from qlora_nb.core import library_versions

    start = time.time()
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "cuda", "-q", "-n", "4"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode:
        sys.exit(done.returncode)
    if "skipped" in done.stdout.strip().splitlines()[-1]:
        sys.exit("a test was skipped: install what it needs, and run all of them")
    result = {
        "engine_sha256": engine_hash(),
        "gpu": torch.cuda.get_device_name(),
        "versions": library_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "make test-gpu",
        "summary": done.stdout.strip().splitlines()[-1].strip("= "),
        "seconds": round(time.time() - start),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(check()) if "--check" in sys.argv else run()
