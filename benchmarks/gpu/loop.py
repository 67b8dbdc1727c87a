"""The engine in this package's loop, and in the trainer that it replaced: speed, memory, losses.

    git show 1769132:qlora_nb/trainer.py > before.py     # TRL's trainer with overrides, with which the engine trained
    python benchmarks/gpu/loop.py nbs/results/loop.json --before before.py
    python benchmarks/gpu/loop.py out.json --before before.py --cpu --turns 1 --steps 6   # a dry run

Both train one model in one process, in turn (before, after, after, before, …), so that a warmer card or a busier host
is no difference between them. A 3B shape with random NF4 weights and adamw_8bit, on `gpu_training.py`'s rows. The first
steps of each turn are left out; a turn's time is the mean of its other steps, and the ratio is that of the medians.
Kinds that --out holds already are not measured again.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_training as training  # noqa: E402
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from qlora_nb.core import PROFILES  # noqa: E402
from qlora_nb.engine.install import Engine, install_engine  # noqa: E402
from qlora_nb.loop import make_loop  # noqa: E402
from qlora_nb.run import resolve_settings  # noqa: E402

CHECKED = {"checkpointing": True}
KINDS = {  # the settings of `gpu_training.py --part main` in which the engine trains
    "usual": {}, "dense": {"on": ["dense"]}, "dense, a quarter of the tokens masked": {"on": ["dense"], "masked": 0.25},
    "selective": {"on": ["selective"]}, "checkpointing": CHECKED,
    "checkpointing, 4 rows twice": {**CHECKED, "batch": 4, "accumulation": 2},
    "the workflow's settings": {**training.OWN, **CHECKED},
}  # fmt: skip


def load_before(file):
    "The older `make_trainer`; what it imports from the package is this tree's."
    spec = importlib.util.spec_from_file_location("qlora_nb.trainer_before", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    exec(compile(file.read_text().replace("engine.graphs", "engine.replayed"), file, "exec"), vars(module))
    return module.make_trainer


class Clock(TrainerCallback):
    "Marks the ends of steps without waiting for them."

    def __init__(self):
        self.marks = []

    def on_step_end(self, *args, **kwargs):
        mark = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else time.perf_counter()
        if torch.cuda.is_available():
            mark.record()
        self.marks.append(mark)

    def seconds(self, skip):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks[skip - 1 :], self.marks[skip:])]
        return [b - a for a, b in zip(self.marks[skip - 1 :], self.marks[skip:])]


def turn(make, model, tok, s):
    "Train once from here on: the mean step, the peak of memory, the first losses."
    install_engine(model, Engine(**dict.fromkeys(s["on"], True)))
    settings = resolve_settings({
        "per_device_train_batch_size": s["batch"], "gradient_accumulation_steps": s["accumulation"],
        "packing": s["packing"], "max_steps": s["steps"], "save_steps": 10_000,
        "max_seq_length": training.ROWS[s["rows"]][1], "optim": "adamw_8bit",
    }, profile=PROFILES["large"])  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, tok, training.made_rows(s["rows"], s["masked"]), settings, Path(folder), [clock])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    found = {"seconds_per_step": round(statistics.mean(clock.seconds(s["skip"])), 4)}
    if torch.cuda.is_available():
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    trainer.model = trainer.model_wrapped = trainer.optimizer = None
    training.unprepared(model)
    return found


def compare(kind, before, after, model, tok, s, turns):
    turn(after, model, tok, {**s, "steps": s["skip"] + 2})  # kernels are compiled
    runs = {"before": [], "after": []}
    for number in range(turns):
        for name in ("before", "after") if number % 2 == 0 else ("after", "before"):
            runs[name].append(turn(before if name == "before" else after, model, tok, s))
    row = {"kind": kind, "size": s["size"], "steps": s["steps"], "skip": s["skip"]}
    for figure in runs["before"][0]:
        both = {name: [run[figure] for run in some] for name, some in runs.items()}
        medians = [statistics.median(both[name]) for name in ("after", "before")]
        row[figure] = {**both, "ratio": round(medians[0] / medians[1], 4)}
    return row


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("--before", type=Path, required=True, help="an older trainer.py of this package")
    p.add_argument("--cpu", action="store_true", help="a dry run with a tiny shape")
    p.add_argument("--turns", type=int, default=4)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    a = p.parse_args()
    device = "cpu" if a.cpu else "cuda"
    runs = json.loads(a.out.read_text())["runs"] if a.out.exists() else []
    todo = [kind for kind in KINDS if kind in a.only and kind not in [run["kind"] for run in runs]]
    before = load_before(a.before)
    for checked in (False, True):
        some = [kind for kind in todo if KINDS[kind].get("checkpointing", False) == checked]
        if not some:
            continue
        base = {**training.DEFAULTS, "size": "tiny" if a.cpu else "3b", "steps": a.steps, "checkpointing": checked}
        model, tok = training.engine_model(base)
        for kind in some:
            runs.append(compare(kind, before, make_loop, model, tok, {**base, **KINDS[kind]}, a.turns))
            print(json.dumps(runs[-1]), flush=True)
            write(a.out, device, runs)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
