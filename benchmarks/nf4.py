"""How fast `quantize_nf4` and `dequantize` are on a CPU, as ratios to bitsandbytes' own CPU code, in one run.

    python benchmarks/nf4.py                    # 4,096 × 4,096, all threads
    python benchmarks/nf4.py --size 2048 --repeats 3

The two take turns, and the best time of each counts, so that a slow moment of the machine does not fall on one alone.
Every result is compared first: a ratio is only printed for equal bytes. Where the processor has AVX512, bitsandbytes
dequantizes with a kernel made for it. At the size above both wait for memory; small weights stay in the processor's
cache, and there (--size 2048) that kernel is several times ahead.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some processors it asks for a further package

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402

from qlora_nb.nf4 import quantize_nf4  # noqa: E402

GOALS = {("quantize", torch.float32): 3.0, ("dequantize", torch.float32): 0.5, ("dequantize", torch.bfloat16): 0.4}


def best_times(functions, repeats):
    "The least seconds of each function; they take turns."
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(found[1:]) for name, found in times.items()}


def measure(weight, double_quant, repeats):
    "Seconds of both for quantizing and dequantizing one weight. Raises AssertionError where the results differ."
    ours = quantize_nf4(weight, double_quant=double_quant)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))
    theirs = {"quant_type": "nf4", "compress_statistics": double_quant}
    return {
        "quantize": best_times(
            {
                "ours": lambda: quantize_nf4(weight, double_quant=double_quant),
                "theirs": lambda: bnb.quantize_4bit(weight, **theirs),
            },
            repeats,
        ),
        "dequantize": best_times(
            {"ours": ours.dequantize, "theirs": lambda: bnb.dequantize_4bit(packed, state)}, 2 * repeats
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{args.size} x {args.size}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}")
    print("million weights a second         ours  bitsandbytes  ratio")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(args.size, args.size).to(dtype)
        for double_quant in (False, True):
            for what, seconds in measure(weight, double_quant, args.repeats).items():
                ours, theirs = (weight.numel() / seconds[who] / 1e6 for who in ("ours", "theirs"))
                name = f"{what} {str(dtype)[6:]}{', double' if double_quant else ''}"
                goal = GOALS.get((what, dtype))
                print(f"{name:30}{ours:7.0f}{theirs:14.0f}{ours / theirs:7.2f}" + (f"  (goal {goal})" if goal else ""))


if __name__ == "__main__":
    main()
