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


# What `make test` takes of interpreted_kernels.py: an interpreted kernel is slow.
FEW = "plain_peft[llama] or parts_with_and_without_them[on0] or in_16_bits or no_kernels or wrong_kernels"


@pytest.mark.parametrize("names, number", [(FEW, 5), pytest.param("test", 17, marks=pytest.mark.heavy)])
def test_the_engine_with_kernels_on_a_cpu(names, number):
    file = ("tests/interpreted_kernels.py", "-k", names)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *file, TRITON_INTERPRET="1")
    assert done.returncode == 0 and f"{number} passed" in done.stdout, done.stdout[-3000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_nb import kernels

TARGETS = {targets}
fixed = {"ADDS": True, "BLOCK": 4096, "IN_PLACE": True, "R": 16, "ROWS": 32, "COLUMNS": 128}
found = []
for capability, kind, R in TARGETS:
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


TARGETS = ((75, "fp16", 16), (90, "bf16", 256), (80, "fp32", 32), (100, "bf16", 64))


@pytest.mark.parametrize(
    "targets", [TARGETS[:2], pytest.param(TARGETS[2:], marks=pytest.mark.heavy)], ids=["T4 and H100", "A100 and B200"]
)
def test_they_compile_for_gpus_that_are_not_here(targets, tmp_path):
    "Triton needs no GPU to compile for one: a T4 and an H100; an A100 and a B200."
    done = run("-c", COMPILE.replace("{targets}", str(targets)), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "10"
