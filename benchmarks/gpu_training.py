"""How fast QLoRA trains on one GPU: the engine, Unsloth by hand and TRL by hand, on the same rows, in one run.

    python benchmarks/gpu_training.py --part main --out nbs/results/training_speed.json
    python benchmarks/gpu_training.py --part all --seconds 540 --out nbs/results/training_speed.json  # what is missing
    python benchmarks/gpu_training.py --one '[{"size": "tiny", "steps": 4, "skip": 1}]'               # also on a CPU
    python benchmarks/gpu_training.py --list --part tricks

A Llama of a real shape with random weights (they cost what real ones cost), NF4, r = 16 on the seven projections. A
process measures the settings of one stack and size, one after the other; the first pair is measured in turns, a process
each time. What --out holds already is not measured again.

- Parts: `main` (3B: best switches, the first pair in --turns turns; a quarter of the tokens masked, checkpointing, the
  workflow's own settings), `shapes` (1B and 8B on usual, short and long rows), `tricks` (the engine with one part
  switched off at a time, with none, with rows end to end alone; twice the tokens; torch's own attention).
- Rows: `usual` has log-normal lengths, median 600, cut at 2,048; `short` median 150; `long` median 3,000, cut at 8,192.
- Ends of steps are marked by events on the GPU, and nothing waits for them.
- Tokens a second count no padding; labelled ones are told apart. `share_of_bound`: 4 FLOP a parameter and token (6 with
  checkpointing), over the speed of a bf16 product that is measured beside it. The stack `trl` needs a GPU.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from quickstart import PROJECTIONS, SHAPES, model_path  # noqa: E402

ROWS = {"usual": (600, 2048), "short": (150, 2048), "long": (3000, 8192)}  # median, longest
STACKS = ("engine", "unsloth", "trl")
DEFAULTS = {
    "stack": "engine", "size": "3b", "rows": "usual", "masked": 0.0, "batch": 8, "accumulation": 1, "packing": True,
    "checkpointing": False, "off": [], "on": [], "attention": None, "steps": 12, "skip": 4, "turn": 1,
}  # fmt: skip
OWN = {"batch": 2, "accumulation": 4, "packing": False, "checkpointing": True}  # the workflow's settings
# Stored runs switched `grouped` and `norms` off, too, which now belong to `adapters` and `compiled`.
PARTS = ("attention", "flat", "loss", "adapters", "mlp", "compiled", "kernels")
AGAIN = ("checkpoint", "graphs", "offload")  # of layers that run again
BEST = {"on": ["dense"]}  # what the engine takes where memory is no matter


def listed(part, turns):
    "The measurements of a part, the stacks in turn."
    if part == "all":
        return [s for name in ("main", "shapes", "tricks") for s in listed(name, turns)]
    engine, unsloth, trl = ({"stack": name} for name in STACKS)
    best, checked, masked = {**engine, **BEST}, {"checkpointing": True}, {"masked": 0.25}
    again = []
    if part == "main":
        again = [best, unsloth] * turns
        found = [engine, {**best, **masked}, {**unsloth, **masked}, {**engine, "on": ["selective"]}]
        found += [{**engine, **checked}, {**engine, **checked, "batch": 4, "accumulation": 2}, {**unsloth, **checked}]
        found += [{**stack, **OWN} for stack in (engine, unsloth, trl)]
    elif part == "shapes":
        rows = [{"rows": "usual"}, {"rows": "short"}, {"rows": "long", "batch": 2}]  # 16,384 tokens a batch
        found = [{"size": size, **stack, **kind} for size in ("1b", "8b") for stack in (best, unsloth) for kind in rows]
    else:
        found = [{"off": [name]} for name in PARTS] + [
            {"off": list(PARTS)},
            {"off": [p for p in PARTS if p != "attention"]},
        ]
        found += [{**best, "batch": 16}, {**best, "attention": "torch's varlen_attn"}]
        found += [{**OWN, "off": [name]} for name in AGAIN]
    turned = [{**s, "turn": 1 + place // 2} for place, s in enumerate(again)]
    return [{**DEFAULTS, **s} for s in (*turned, *found)]


def made_rows(kind, masked, count=600):
    "Random token ids; `masked` of each row is prompt."
    from datasets import Dataset

    rng, (median, longest) = random.Random(0), ROWS[kind]
    rows = []
    for _ in range(count):
        length = min(longest, max(32, int(median * rng.lognormvariate(0, 0.7))))
        ids = [rng.randrange(10, 600) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * int(masked * length) + ids[int(masked * length) :]})
    return Dataset.from_list(rows)


# --- a process: settings of one stack, one size, with or without checkpointing --------------------------------------


def engine_model(s):
    from qlora_nb.model import add_lora, load_model

    model, tok = load_model(
        model_path(s["size"]), max_seq_length=max(n for _, n in ROWS.values()), backend="transformers"
    )
    return add_lora(model, use_gradient_checkpointing=s["checkpointing"]), tok


def switched(s):
    "The engine of a setting. `graphs` is no switch of the engine's: without it no device may make a recording."
    from qlora_nb.engine import install

    known = vars(install).setdefault("ALL_DEVICES", install.REPLAY_DEVICES)
    install.REPLAY_DEVICES = () if "graphs" in s["off"] else known
    return install.Engine(**{name: False for name in s["off"] if name != "graphs"}, **dict.fromkeys(s["on"], True))


def engine_trainer(model, tok, s, clock):
    from qlora_nb.core import PROFILES
    from qlora_nb.engine import line
    from qlora_nb.engine.install import engine_of, install_engine
    from qlora_nb.engine.line import attention_kernel
    from qlora_nb.loop import make_loop
    from qlora_nb.run import resolve_settings

    known = vars(line).setdefault("ALL_KERNELS", line.ATTENTION_KERNELS)
    line.ATTENTION_KERNELS = {s["attention"]: known[s["attention"]]} if s["attention"] else known
    line._kernel.cache_clear()
    install_engine(model, switched(s))
    if s["attention"] and attention_kernel(model) != s["attention"]:
        raise RuntimeError(f"{s['attention']} is not there; attention is by {attention_kernel(model)}")
    settings = resolve_settings({
        "per_device_train_batch_size": s["batch"], "gradient_accumulation_steps": s["accumulation"],
        "packing": s["packing"] and engine_of(model).attention, "max_steps": s["steps"], "save_steps": 10_000,
        "max_seq_length": ROWS[s["rows"]][1], "optim": "adamw_8bit",
    }, profile=PROFILES["large"])  # fmt: skip
    loop = make_loop(model, tok, made_rows(s["rows"], s["masked"]), settings, Path(tempfile.mkdtemp()), [clock])
    return loop, f"{engine_of(model)}; attention by {attention_kernel(model)}"


def hand_model(s):
    "Unsloth or TRL as their own documentation has it."
    import torch

    path, longest = model_path(s["size"]), max(n for _, n in ROWS.values())
    if s["stack"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tok = FastLanguageModel.from_pretrained(path, max_seq_length=longest, dtype=None, load_in_4bit=True)
        return FastLanguageModel.get_peft_model(
            model, r=16, target_modules=PROJECTIONS, lora_alpha=16, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth" if s["checkpointing"] else False, random_state=3407,
        ), tok  # fmt: skip
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    place = {"": 0} if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quant, dtype=torch.bfloat16, device_map=place
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=s["checkpointing"])
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(path)


def hand_trainer(model, tok, s, clock):
    import torch
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    config = SFTConfig(
        max_length=ROWS[s["rows"]][1], per_device_train_batch_size=s["batch"], packing=s["packing"],
        gradient_accumulation_steps=s["accumulation"], warmup_steps=5, max_steps=s["steps"], learning_rate=2e-4,
        optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear", logging_steps=1, seed=3407, data_seed=3407,
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", disable_tqdm=True, bf16=cuda,
        use_cpu=not cuda, gradient_checkpointing=s["stack"] == "trl" and s["checkpointing"],
    )  # fmt: skip
    rows = made_rows(s["rows"], s["masked"])
    rows = rows if s["masked"] else rows.remove_columns("labels")  # all tokens are learned where there are none
    return SFTTrainer(model=model, processing_class=tok, train_dataset=rows, args=config, callbacks=[clock]), None


def counting(count):
    "TRL's trainer adds up, on the device, what it trains on, as the engine's loop does by itself."
    import trl

    step = trl.SFTTrainer.training_step

    def counted(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        count["tokens"] += inputs["input_ids"].numel() if mask is None else mask.sum()
        count["labelled"] += (inputs["labels"][..., 1:] != -100).sum()
        return step(self, model, inputs, *args, **kwargs)

    trl.SFTTrainer.training_step = counted


def measure(settings):
    "Train each of these settings in this process, and print a line for each."
    settings = [{**DEFAULTS, **s} for s in settings]
    by_us = settings[0]["stack"] == "engine"
    if settings[0]["stack"] == "unsloth":
        import unsloth  # noqa: F401  before transformers and trl, as it asks
    import torch
    from transformers import TrainerCallback

    cuda, seen, count = torch.cuda.is_available(), [], {}

    class Clock(TrainerCallback):
        "Marks the ends of steps without waiting for them."

        def on_step_end(self, *args, **kwargs):
            moment = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
            if cuda:
                moment.record()
            counted = (trainer.tokens, trainer.targets) if by_us else (count["tokens"], count["labelled"])
            seen.append((moment, *(torch.as_tensor(number).clone() for number in counted)))

    if not by_us:
        counting(count)
    model, tok = (engine_model if by_us else hand_model)(settings[0])
    for s in settings:
        seen.clear()
        count.update(tokens=0, labelled=0)
        trainer = None
        try:
            trainer, said = (engine_trainer if by_us else hand_trainer)(model, tok, s, Clock())
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            losses = [round(row["loss"], 6) for row in trainer.state.log_history if "loss" in row]
            found = {**s, "engine": said, **figures(seen, s), "losses": losses}
        except Exception as error:  # noqa: BLE001  what can't run is a result, too
            found = {**s, "failed": f"{type(error).__name__}: {error}"[:300]}
        if trainer is not None:
            trainer.model = trainer.model_wrapped = trainer.optimizer = None
        unprepared(model)
        trainer = None
        print("RESULT", json.dumps(found), flush=True)


def unprepared(model):
    "As before accelerate put autocast around it, or didn't: it never looks at a model twice."
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")


def figures(seen, s):
    "What the marks after each step say: (moment, tokens, labelled tokens so far)."
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        seen = [(seen[0][0].elapsed_time(moment) / 1e3, *counts) for moment, *counts in seen]
    counted = [(moment, int(tokens), int(labelled)) for moment, tokens, labelled in seen[s["skip"] - 1 :]]
    seconds = counted[-1][0] - counted[0][0]
    steps = [b[0] - a[0] for a, b in zip(counted, counted[1:])]
    rate = (counted[-1][1] - counted[0][1]) / seconds
    found = {
        "seconds_per_step": round(seconds / len(steps), 4),
        "slowest_step": round(max(steps) / statistics.median(steps), 2),  # in medians
        "tokens_per_second": round(rate), "labelled_per_second": round((counted[-1][2] - counted[0][2]) / seconds),
        "parameters": parameters(SHAPES[s["size"]]),
    }  # fmt: skip
    if cuda:
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        found |= {f"peak_{name}_gib": round(value / 2**30, 3) for name, value in peaks.items()}
        speed = product_speed()
        bound = speed / ((6 if s["checkpointing"] else 4) * found["parameters"])
        found |= {"product_tflops": round(speed / 1e12), "share_of_bound": round(rate / bound, 3)}
    return found


def parameters(shape):
    "Weights that take part in a product: projections and head."
    h, i, n, q, kv, d, _, words = shape
    return n * (h * q * d * 2 + h * kv * d * 2 + 3 * h * i) + words * h


def product_speed(size=8192, repeats=20):
    "FLOP a second of a bf16 product, the best of a few."
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


# --- all of them ----------------------------------------------------------------------------------------------------


def key(run):
    return json.dumps({name: run[name] for name in DEFAULTS}, sort_keys=True)


def process(settings, limit):
    "Yields the measurements of one process as they come; a failure is a result, too."
    command = [sys.executable, __file__, "--one", json.dumps(settings)]
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        alarm = threading.Timer(limit, run.kill)
        alarm.start()
        left = list(settings)
        for line in run.stdout:
            if line.startswith("RESULT "):
                left.pop(0)
                yield json.loads(line.removeprefix("RESULT "))
        run.wait()
        alarm.cancel()
        errors.seek(0)
        why = "; ".join(errors.read().strip().splitlines()[-2:])[-400:]
    for s in left:
        yield {**s, "failed": f"the process ended with {run.returncode}: {why}"}


def processes(todo):
    "Settings that can share a process, in the order of their first."
    groups = {}
    for s in todo:
        groups.setdefault(tuple(s[name] for name in ("stack", "size", "checkpointing", "turn")), []).append(s)
    return list(groups.values())


def drive(a):
    found = json.loads(a.out.read_text()) if a.out and a.out.exists() else {"runs": []}
    there = {key(run) for run in found["runs"] if "failed" not in run}
    wanted = [s for s in listed(a.part, a.turns) if s["size"] in a.sizes and s["stack"] in a.stacks]
    todo = [s for s in wanted if key(s) not in there]
    for size in {s["size"] for s in todo}:
        model_path(size)
    for settings in processes(todo):
        left = a.seconds - (time.time() - STARTED)
        for run in process(settings, min(a.limit, left)) if left > 0 else ():
            print(f"{time.time() - STARTED:.0f} s", json.dumps(run), flush=True)
            found["runs"] = [old for old in found["runs"] if key(old) != key(run)] + [run]
            if a.out:
                write(a.out, found["runs"], notes=found.get("notes"))
    compare(found["runs"])


def write(path, runs, notes=None):
    import torch

    from qlora_nb.core import library_versions, write_json

    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    more = {d.name: d.version for d in importlib.metadata.distributions() if d.name == "flash-attn-4"}
    write_json(path, {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {**library_versions(), **more},
        "date": f"{datetime.date.today()}", "command": " ".join(["python benchmarks/gpu_training.py", *words]),
        **({"notes": notes} if notes else {}), "runs": runs,
    })  # fmt: skip


def compare(runs):
    "Each setting's median, and its ratio to Unsloth's with the same rows, as many in a step, checkpointed like it."
    fields, ways = ("size", "rows", "masked", "packing", "checkpointing"), ("off", "on", "attention", "batch")
    groups = {}
    for run in (run for run in runs if "failed" not in run):
        same = (*(run[name] for name in fields), run["batch"] * run["accumulation"])
        way = " ".join(f"{name}={run[name]}" for name in ways if run[name] != DEFAULTS[name])
        groups.setdefault(same, {}).setdefault((run["stack"], way), []).append(run)
    for same, stacks in sorted(groups.items(), key=str):
        print(" ".join(f"{name}={value}" for name, value in zip(fields, same)))
        theirs = medians([run for (stack, _), those in stacks.items() if stack == "unsloth" for run in those])
        for (stack, way), found in stacks.items():
            (rate, peak), beside = medians(found), ""
            if theirs and stack != "unsloth":
                beside = f"{rate / theirs[0]:.2f} × Unsloth's speed, {peak / max(theirs[1], 1e-9):.2f} × its memory"
            print(f"  {stack:8} {way:40} {rate:9,.0f} tokens/s {peak:6.2f} GiB  {beside}")


def medians(runs):
    "Tokens a second, and GiB."
    names = ("tokens_per_second", "peak_allocated_gib")
    return [statistics.median(run.get(name, 0) for run in runs) for name in names] if runs else None


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--one", help="measure these settings here and now (JSON, a list), and print a line for each")
    p.add_argument("--part", choices=("main", "shapes", "tricks", "all"), default="main")
    p.add_argument("--sizes", nargs="*", default=["1b", "3b", "8b"], choices=SHAPES)
    p.add_argument("--stacks", nargs="*", default=STACKS, choices=STACKS)
    p.add_argument("--turns", type=int, default=3, help="how often each setting is measured")
    p.add_argument("--seconds", type=float, default=1e9, help="end after this time; what is measured by then is kept")
    p.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    p.add_argument("--out", type=Path, help="written after every measurement")
    p.add_argument("--list", action="store_true", help="print the settings, and stop")
    return p.parse_args()


if __name__ == "__main__":
    STARTED = time.time()
    a = arguments()
    if a.one:
        measure(json.loads(a.one))
    elif a.list:
        for setting in listed(a.part, a.turns):
            print(json.dumps(setting))
    else:
        drive(a)
