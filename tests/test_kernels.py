"""The engine's kernels: interpreted on a CPU, and compiled for GPUs that aren't here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **more):
    "A process, with its output."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **more}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


def test_the_engine_with_kernels_on_a_cpu():
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0 and "17 passed" in done.stdout, done.stdout[-3000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_nb import kernels

fixed = {"ADDS": True, "BLOCK": 4096, "IN_PLACE": True, "R": 16, "ROWS": 32, "COLUMNS": 128}
found = []
for capability, kind, R in ((75, "fp16", 16), (80, "fp32", 32), (90, "bf16", 256), (100, "bf16", 64)):
    for name in ("_add_norm", "_norm_back", "_cross_entropy", "_swiglu", "_swiglu_back"):
        function = getattr(kernels, name)
        known = {"RSTD": "*fp32", "LOSSES": "*fp32", "SUMS": "*fp32", "WANTED": "*i64", "eps": "fp32"}
        signature = {n: "constexpr" if n in fixed else known.get(n, f"*{kind}" if n.isupper() else "i32")
                     for n in function.arg_names}
        sizes = {**fixed, "R": R, "COLUMNS": max(16, 2048 // R)}
        constants = {n: value for n, value in sizes.items() if n in signature}
        source = ASTSource(function, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        limit = {75: 64, 80: 163, 90: 227, 100: 227}[capability]
        assert made.metadata.shared <= 1024 * limit, (name, capability, kind, R, made.metadata.shared)
        found.append(name)
print(len(found))
"""


def test_they_compile_for_gpus_that_are_not_here(tmp_path):
    "Triton needs no GPU to compile for one: a T4, an A100, an H100, a B200."
    done = run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "20"
