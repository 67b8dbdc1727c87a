"""The planner's choice for cards of 8 to 96 GB, trained under that limit, beside a grid of six usual settings.

    python benchmarks/gpu/planner.py nbs/results/planner.json
    python benchmarks/gpu/planner.py out.json --sizes 3b --limits 8 24
    python benchmarks/gpu/planner.py out.json --one '{"size": "tiny", "steps": 4, "skip": 2}'   # here, also on a CPU

Each run is a process of its own, and one trains at a time; the others wait with their imports done. A card of N GB is
the GPU at hand with three things changed: torch may reserve no more than the card's bytes less the CUDA context (it
raises OutOfMemoryError beyond), and the card's size and free memory are reported to the libraries as that card's, since
Unsloth chooses its loss by them. So memory is the small card's and speed is the large one's: the planner is told the
same (the size of the small card, the arithmetic of the GPU at hand).

The grid runs without a limit. What its settings need tells which of them a card could hold, and their speed is what it
is with all memory free: the choice is compared with the fastest of those that fit.

Rows are log-normal (median 600 tokens, cut at 2,048), eight make a step. Tokens per second count no padding.
"""

import argparse
import concurrent.futures
import fcntl
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

LIMITS = (8, 12, 16, 24, 40, 48, 80, 96)  # GB
DEFAULTS = {
    "size": "3b", "method": "qlora", "batch": 2, "accumulation": 4, "packing": False, "gradient_checkpointing": True,
    "optimizer": "adamw_8bit", "seq_length": 2048, "r": 16, "limit_gb": None, "steps": 24, "skip": 6,
}  # fmt: skip
GRID = (  # what someone would try by hand: eight rows a step, or three packs, which hold about as many tokens
    {"batch": 2, "accumulation": 4},
    {"batch": 8, "accumulation": 1},
    {"batch": 1, "accumulation": 8, "gradient_checkpointing": False},
    {"batch": 8, "accumulation": 1, "gradient_checkpointing": False},
    {"batch": 3, "accumulation": 1, "packing": True, "gradient_checkpointing": False},
    {"batch": 3, "accumulation": 1, "packing": True, "gradient_checkpointing": False, "method": "lora"},
)


def card_of(limit_gb):
    "The card of that size, with the arithmetic of the GPU at hand (or an H200's where there is none)."
    from dataclasses import replace

    import torch

    from qlora_nb.cards import KNOWN_CARDS, find_card

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
    here = KNOWN_CARDS["H100" if "H100" in name else "H200"]
    return replace(here, name=f"{limit_gb} GB", bytes=find_card(f"{limit_gb} GB").bytes)


def pretend(limit_gb):
    "Make torch keep to a card of that size, and report it."
    import torch

    from qlora_nb.memory import CUDA_CONTEXT

    size, total = int(card_of(limit_gb).bytes), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((size - CUDA_CONTEXT) / total)
    properties = torch.cuda.get_device_properties

    class Smaller:
        total_memory = size

        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

    def smaller_info(device=None):
        used = torch.cuda.memory_reserved() + CUDA_CONTEXT
        return max(size - used, 0), size

    torch.cuda.get_device_properties = lambda *args, **kwargs: Smaller(properties(*args, **kwargs))
    torch.cuda.mem_get_info = smaller_info


def one(s, lock=None):
    "Train one setting in this process and print its line."
    s = {**DEFAULTS, **s}
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        import unsloth  # noqa: F401  before transformers and trl, as it asks; it also sets torch's allocator

        if s["limit_gb"]:
            pretend(s["limit_gb"])
    from datasets import Dataset
    from quickstart import conversations, model_path
    from transformers.trainer_callback import DefaultFlowCallback

    from qlora_nb.model import add_lora, load_model
    from qlora_nb.workflow import train

    if lock:
        held = open(lock, "w")
        fcntl.flock(held, fcntl.LOCK_EX)
    begun, ends, after = time.time(), [], DefaultFlowCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.time())
        return after(self, args, state, control, **kwargs)

    DefaultFlowCallback.on_step_end = on_step_end
    found = {**s, "stack": "unsloth" if cuda else "transformers", "base": 4 if s["method"] == "qlora" else 16}
    try:
        model, tok = load_model(
            model_path(s["size"]), backend=found["stack"], load_in_4bit=s["method"] == "qlora",
            max_seq_length=s["seq_length"],
        )  # fmt: skip
        wanted = ("unsloth" if cuda else True) if s["gradient_checkpointing"] else False
        model = add_lora(model, r=s["r"], lora_alpha=s["r"], use_gradient_checkpointing=wanted)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        run = train(
            model, tok, Dataset.from_list(conversations(240)), output=Path(tempfile.mkdtemp()) / "run", check=False,
            eval_rows=0, max_steps=s["steps"], per_device_train_batch_size=s["batch"], optim=s["optimizer"],
            gradient_accumulation_steps=s["accumulation"], warmup_steps=1, max_seq_length=s["seq_length"],
            packing=s["packing"], save_steps=1000,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        print("RESULT", json.dumps({**found, "outcome": "OutOfMemoryError", "error": str(error).split(". ")[0]}))
        return
    seconds = [b - a for a, b in zip(ends, ends[1:])]
    tokens = [m["tokens_per_second"] * t for m, t in zip(run.metrics[1:], seconds)]
    seconds, tokens = seconds[s["skip"] - 1 :], tokens[s["skip"] - 1 :]
    found |= {
        "outcome": "trained",
        "tokens_per_second": round(sum(tokens) / sum(seconds)),
        "seconds_per_step": round(sum(seconds) / len(seconds), 3),
        "process_seconds": round(time.time() - begun, 1),
    }
    if cuda:
        found |= {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }
        found |= {f"{k}_gib": round(found[k] / 2**30, 3) for k in ("peak_allocated", "peak_reserved")}
    print("RESULT", json.dumps(found), flush=True)


def lengths_of_rows():
    "Tokens of each row that is trained on."
    from quickstart import conversations
    from transformers import AutoTokenizer

    from qlora_nb.cards import measure_row_lengths
    from qlora_nb.core import EMBEDDED_MODEL

    return measure_row_lengths(conversations(240), AutoTokenizer.from_pretrained(EMBEDDED_MODEL))


def choice_for(size, limit_gb, lengths):
    "What the planner takes on that card, as a setting, with what it expects."
    from quickstart import model_path

    from qlora_nb.plan import plan_training

    plan = plan_training(model_path(size), card_of(limit_gb), lengths, effective_batch=8, seq_length=2048)
    if not plan.fits:
        return None, plan
    c = plan.choice
    setting = {
        "size": size, "method": c.method, "batch": c.batch, "accumulation": c.accumulation, "packing": c.packing,
        "gradient_checkpointing": c.gradient_checkpointing, "optimizer": c.optimizer, "limit_gb": limit_gb,
        "predicted_allocated": c.estimate.allocated_bytes, "predicted_total": c.estimate.total_bytes,
        "expected_tokens_per_second": round(c.tokens_per_second),
    }  # fmt: skip
    return setting, plan


def in_process(s, lock, limit=240):
    "The same in a process of its own; a result or why there is none."
    command = [sys.executable, __file__, "-", "--one", json.dumps(s), "--lock", lock]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**s, "outcome": "failed", "error": f"ran longer than {limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {**s, "outcome": "failed", "error": tail[0] if tail else "no output"}
    return json.loads(lines[-1].removeprefix("RESULT "))


SETTING = ("size", "method", "batch", "accumulation", "packing", "gradient_checkpointing")


def rates(runs):
    "Tokens per second of each setting: the median of its runs, in the grid and under whatever limit."
    found = {}
    for run in runs:
        if run["outcome"] == "trained":
            found.setdefault(tuple(run[name] for name in SETTING), []).append(run["tokens_per_second"])
    return {setting: statistics.median(values) for setting, values in found.items()}


def verdicts(runs):
    "For each card: whether the choice ran, and its speed as a share of the fastest of the grid that would fit."
    from qlora_nb.memory import CUDA_CONTEXT

    speed, found = rates(runs), []
    for choice in (run for run in runs if run["role"] == "choice"):
        size, limit = choice["size"], choice["limit_gb"]
        room = card_of(limit).bytes - CUDA_CONTEXT
        grid = [run for run in runs if run["role"] == "grid" and run["size"] == size]
        fit = [run for run in grid if run.get("peak_reserved", math.inf) <= room]
        best = max((speed[tuple(run[name] for name in SETTING)] for run in fit), default=None)
        rate = speed.get(tuple(choice.get(name) for name in SETTING))
        share = round(rate / best, 3) if rate and best else None
        row = {"size": size, "limit_gb": limit, "outcome": choice["outcome"], "tokens_per_second": rate}
        found.append({**row, "grid_that_fits": len(fit), "fastest_of_grid": best, "share": share})
    return sorted(found, key=lambda row: (row["size"], row["limit_gb"]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--one", help="a setting as JSON")
    parser.add_argument("--lock")
    parser.add_argument("--sizes", nargs="*", default=["3b", "8b"])
    parser.add_argument("--limits", nargs="*", type=int, default=LIMITS)
    parser.add_argument("--start", help="an earlier file of results, to go on from")
    parser.add_argument("--parts", nargs="*", default=["grid", "choice"])
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"])
    parser.add_argument("--skip", type=int, default=DEFAULTS["skip"], help="steps that are not timed")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this time")
    args = parser.parse_args()
    if args.one:
        return one(json.loads(args.one), args.lock)
    from common import write
    from quickstart import model_path

    begun, lengths, todo = time.time(), lengths_of_rows(), []
    usual = {**DEFAULTS, "steps": args.steps, "skip": args.skip}
    runs = json.loads(Path(args.start).read_text())["runs"] if args.start else []
    for size in args.sizes:
        model_path(size)
        if "grid" in args.parts:
            todo += [{**usual, **row, "size": size, "role": "grid"} for row in GRID]
        for limit in args.limits if "choice" in args.parts else ():
            setting, plan = choice_for(size, limit, lengths)
            if setting:
                todo.append({**usual, **setting, "role": "choice"})
            else:
                nothing = {"outcome": "nothing fits", "error": "; ".join(plan.advice)}
                runs.append({"size": size, "limit_gb": limit, "role": "choice", **nothing})
    print(f"models made after {time.time() - begun:.0f} s", flush=True)
    lock = tempfile.mktemp()

    def measure(s):
        if time.time() - begun > args.seconds:
            return {**s, "outcome": "failed", "error": "no time was left"}
        return in_process(s, lock)

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(measure, s) for s in todo]):
            runs.append(future.result())
            names = ("role", "size", "limit_gb", "method", "batch", "accumulation", "packing", "gradient_checkpointing",
                     "outcome", "tokens_per_second", "peak_reserved_gib", "process_seconds", "error")  # fmt: skip
            print(f"{time.time() - begun:.0f} s", json.dumps({k: runs[-1].get(k) for k in names}), flush=True)
            write(args.out, "cuda", runs, verdicts=verdicts(runs), lengths=lengths)
    for row in verdicts(runs):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
