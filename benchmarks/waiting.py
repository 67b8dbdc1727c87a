"""What OpenMP's waiting costs a step: libgomp's default, and the bound that `import qlora_nb` sets, in turn.

    python benchmarks/waiting.py             # on the cores as they are
    python benchmarks/waiting.py --busy 3    # beside three loops that do nothing but run

Each figure is the median time of the steps of one process that trains the embedded model; the last line is the median
of the pairs' ratios, default / bounded: 1 is no difference, 2 is a step twice as fast with the bound.
"""

import argparse
import os
import statistics
import subprocess
import sys

STEPS = """
import sys, time
from qlora_nb import add_lora, load_model, load_sft_dataset
import torch
from qlora_nb.preflight import encode_dataset

model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
model = add_lora(model, use_gradient_checkpointing=False)
rows, _ = encode_dataset(load_sft_dataset(limit=64), tokenizer, 256)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
length = max(map(len, rows["input_ids"][:8]))
ids = torch.tensor([row + [0] * (length - len(row)) for row in rows["input_ids"][:8]])
labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows["labels"][:8]])
for step in range(int(sys.argv[1])):
    start = time.perf_counter()
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(time.perf_counter() - start, flush=True)
"""


def seconds_per_step(steps, bounded):
    "The median step, the first three left out, of a process of its own."
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
    env = {key: value for key, value in os.environ.items() if key not in names}
    # importing torch first leaves libgomp as it is
    code = STEPS if bounded else "import torch\n" + STEPS
    done = subprocess.run([sys.executable, "-c", code, str(steps + 3)], env=env, capture_output=True, text=True)
    done.check_returncode()
    return statistics.median(map(float, done.stdout.split()[3:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="loops that run beside it")
    args = parser.parse_args()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        ratios = []
        for _ in range(args.pairs):
            default, bounded = (seconds_per_step(args.steps, on) for on in (False, True))
            ratios.append(default / bounded)
            print(f"default {1e3 * default:6.0f} ms, bounded {1e3 * bounded:6.0f} ms a step: {ratios[-1]:.2f}")
    finally:
        for loop in loops:
            loop.kill()
    print(f"default / bounded, median of {args.pairs}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
