"""Two trees of this package on one card, in turn: is the engine as fast, as small and as right as it was?

    git worktree add BEFORE COMMIT
    python benchmarks/gpu/two_trees.py --before BEFORE --out nbs/results/two_trees.json
    python benchmarks/gpu/two_trees.py --before BEFORE --size tiny --steps 4 --skip 1 --turns 1   # also on a CPU

Each tree measures the engine's settings of `gpu_training.py --part main` by its own copy of that script, a process for
those with gradient checkpointing and one for those without: before, after, after, before. For each setting: the medians
of seconds a step and peak memory, their ratios, and whether the losses of all steps are the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import write

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE / "benchmarks"))
from gpu_training import DEFAULTS, listed  # noqa: E402

FIGURES = ("seconds_per_step", "peak_allocated_gib", "peak_reserved_gib")


def wanted_settings(a):
    "The engine's settings, once each; those that a switch is tried in come from `--off`."
    found = [s for s in listed("main", 1) if s["stack"] == "engine"]
    base = [s for s in found if not s["on"] and not s["masked"] and (s["batch"] != 4)]
    found += [{**s, "off": [name]} for name in a.off for s in base]
    return [{**s, "size": a.size, "steps": a.steps, "skip": a.skip} for s in found]


def measure(tree, settings):
    "What this tree's own script prints for the settings."
    script = Path(tree) / "benchmarks/gpu_training.py"
    done = subprocess.run([sys.executable, script, "--one", json.dumps(settings)], capture_output=True, text=True)
    found = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    if len(found) < len(settings):
        print(done.stderr[-3000:], file=sys.stderr)
    return found


def compare(runs):
    "A row for each setting: both trees' medians, their ratio, the losses."
    table = []
    for key in dict.fromkeys(run["key"] for run in runs):
        both = {tree: [r for r in runs if (r["key"], r["tree"]) == (key, tree)] for tree in ("before", "after")}
        row = {"setting": json.loads(key)}
        for name in FIGURES:
            medians = {tree: [r[name] for r in some if name in r] for tree, some in both.items()}
            if all(medians.values()):
                medians = {tree: statistics.median(values) for tree, values in medians.items()}
                row[name] = {**medians, "ratio": round(medians["after"] / medians["before"], 4)}
        losses = [r.get("losses") for some in both.values() for r in some]
        row["same_losses"] = None not in losses and all(one == losses[0] for one in losses)
        row["losses_apart"] = (
            None if None in losses else max(abs(x - y) for one in losses for x, y in zip(one, losses[0]))
        )
        table.append(row)
    return table


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--before", type=Path, required=True, help="the other tree, with its benchmarks")
    p.add_argument("--size", default="3b")
    p.add_argument("--steps", type=int, default=DEFAULTS["steps"])
    p.add_argument("--skip", type=int, default=DEFAULTS["skip"])
    p.add_argument("--turns", type=int, default=2, help="how often each tree is measured")
    p.add_argument("--off", nargs="*", default=[], help="switches to measure, each off alone, in the tree after")
    p.add_argument("--seconds", type=float, default=1e9, help="start no process after this time")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    began, runs = time.time(), []
    settings = wanted_settings(a)
    order = [
        tree for turn in range(a.turns) for tree in (("before", "after") if turn % 2 == 0 else ("after", "before"))
    ]
    for tree in order:
        for checked in (False, True):
            some = [s for s in settings if s["checkpointing"] == checked and (tree == "after" or not s["off"])]
            if time.time() - began > a.seconds:
                continue
            for one, found in zip(some, measure(a.before if tree == "before" else HERE, some)):
                shown = {k: v for k, v in one.items() if v != DEFAULTS.get(k) and k not in ("steps", "skip", "turn")}
                runs.append({"tree": tree, "key": json.dumps(shown), **found})
            print(f"{time.time() - began:.0f} s: {tree}, {'with' if checked else 'without'} checkpointing", flush=True)
    for row in (table := compare(runs)):
        print(json.dumps(row), flush=True)
    if a.out:
        import torch

        write(a.out, "cuda" if torch.cuda.is_available() else "cpu", runs, table=table)


if __name__ == "__main__":
    main()
