"""How fast QLoRA trains on one GPU: the engine, Unsloth by hand and TRL by hand, on the same rows, in one run.

    python benchmarks/gpu_training.py --part main --out nbs/results/training_speed.json
    python benchmarks/gpu_training.py --part all --seconds 540 --out nbs/results/training_speed.json  # what is missing
    python benchmarks/gpu_training.py --one '{"size": "tiny", "steps": 4, "skip": 1}'                 # also on a CPU
    python benchmarks/gpu_training.py --list --part tricks

A Llama of a real shape with random weights (they cost what real ones cost), NF4, r = 16 on the seven projections. Each
measurement is a process of its own, and the stacks take turns. What --out holds already is not measured again.

- Parts: `main` (3B: best switches, the first pair in --turns turns; a quarter of the tokens masked, checkpointing, the
  workflow's own settings), `shapes` (1B, 3B and 8B on usual, short and long rows), `tricks` (the engine with one part
  switched off, or on, at a time; another attention; twice the tokens).
- Rows: `usual` has log-normal lengths, median 600, cut at 2,048; `short` median 150; `long` median 3,000, cut at 8,192.
- Tokens a second count no padding; labelled ones are told apart. `share_of_bound`: 4 FLOP a parameter and token (6 with
  checkpointing), over the speed of a bf16 product that is measured beside it. The stack `trl` needs a GPU.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from quickstart import PROJECTIONS, SHAPES, model_path  # noqa: E402

ROWS = {"usual": (600, 2048), "short": (150, 2048), "long": (3000, 8192)}  # median, longest
STACKS = ("engine", "unsloth", "trl")
DEFAULTS = {
    "stack": "engine", "size": "3b", "rows": "usual", "masked": 0.0, "batch": 8, "accumulation": 1, "packing": True,
    "checkpointing": False, "off": [], "on": [], "attention": None, "steps": 14, "skip": 4, "turn": 1,
}  # fmt: skip
OWN = {"batch": 2, "accumulation": 4, "packing": False, "checkpointing": True}  # the workflow's settings
PARTS = ("grouped", "mlp", "adapters", "attention", "loss", "kernels")
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
        sizes = [{"size": size} for size in ("1b", "3b", "8b")]
        found = [{**size, **kind, **stack} for size in sizes for kind in rows for stack in (best, unsloth)]
    else:
        found = [{"off": [name]} for name in PARTS] + [{"off": list(PARTS)}]
        found += [{"attention": "torch's varlen_attn"}, {**best, "batch": 16}]
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


# --- one measurement ------------------------------------------------------------------------------------------------


def by_engine(s, path, longest, clock):
    from qlora_nb import engine
    from qlora_nb.core import PROFILES
    from qlora_nb.engine import Engine, attention_kernel, engine_of, install_engine
    from qlora_nb.model import add_lora, load_model
    from qlora_nb.training import make_trainer, settings_for

    model, tok = load_model(path, max_seq_length=longest, backend="transformers")
    model = add_lora(model, use_gradient_checkpointing=s["checkpointing"])
    if s["attention"]:
        engine.KERNELS = {s["attention"]: engine.KERNELS[s["attention"]]}
    install_engine(model, Engine(**dict.fromkeys(s["off"], False), **dict.fromkeys(s["on"], True)))
    packing = s["packing"] and engine_of(model).attention
    settings = settings_for({
        "per_device_train_batch_size": s["batch"], "gradient_accumulation_steps": s["accumulation"], "packing": packing,
        "max_steps": s["steps"], "max_seq_length": longest, "save_steps": 10_000, "optim": "adamw_8bit",
    }, profile=PROFILES["large"])  # fmt: skip
    trainer = make_trainer(
        model, tok, made_rows(s["rows"], s["masked"]), settings, Path(tempfile.mkdtemp()), [clock])
    return trainer, f"{engine_of(model)}; attention by {attention_kernel(model)}"


def by_hand(s, path, longest, clock):
    "Unsloth or TRL as their own documentation has it."
    import torch

    if s["stack"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tok = FastLanguageModel.from_pretrained(path, max_seq_length=longest, dtype=None, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(
            model, r=16, target_modules=PROJECTIONS, lora_alpha=16, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth" if s["checkpointing"] else False, random_state=3407,
        )  # fmt: skip
    else:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        tok = AutoTokenizer.from_pretrained(path)
        place = {"": 0} if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quant, dtype=torch.bfloat16, device_map=place)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=s["checkpointing"])
        lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    config = SFTConfig(
        max_length=longest, per_device_train_batch_size=s["batch"], gradient_accumulation_steps=s["accumulation"],
        warmup_steps=5, max_steps=s["steps"], learning_rate=2e-4, optim="adamw_8bit", weight_decay=0.01,
        lr_scheduler_type="linear", logging_steps=1, output_dir=tempfile.mkdtemp(), seed=3407, data_seed=3407,
        report_to="none", bf16=cuda, use_cpu=not cuda, packing=s["packing"], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=s["stack"] == "trl" and s["checkpointing"],
    )  # fmt: skip
    rows = made_rows(s["rows"], s["masked"])
    rows = rows if s["masked"] else rows.remove_columns("labels")  # all tokens are learned where there are none
    trainer = SFTTrainer(model=model, processing_class=tok, train_dataset=rows, args=config, callbacks=[clock])
    return trainer, None


def one(s):
    "Train one setting in this process and return what was measured."
    s = {**DEFAULTS, **s}
    if s["stack"] == "unsloth":
        import unsloth  # noqa: F401  before transformers and trl, as it asks
    import torch
    import trl
    from transformers import TrainerCallback

    cuda, seen, step = torch.cuda.is_available(), [], trl.SFTTrainer.training_step
    count = {"tokens": 0, "labelled": 0}

    def counted(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        count["tokens"] += inputs["input_ids"].numel() if mask is None else mask.sum()
        count["labelled"] += (inputs["labels"][..., 1:] != -100).sum()
        return step(self, model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            seen.append((time.perf_counter(), int(count["tokens"]), int(count["labelled"])))

    trl.SFTTrainer.training_step = counted
    longest = ROWS[s["rows"]][1]
    make = by_engine if s["stack"] == "engine" else by_hand
    trainer, said = make(s, model_path(s["size"]), longest, Clock())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {**s, "engine": said, "base": 4, **figures(seen, s), "seconds_in_all": round(time.perf_counter() - BEGUN, 1)}


def figures(seen, s):
    "What the marks after each step say: (time, tokens, labelled tokens so far)."
    import torch

    cuda, counted = torch.cuda.is_available(), seen[s["skip"] - 1 :]
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


def process(s, limit):
    "One measurement in a process of its own; a failure is a result, too."
    try:
        command = [sys.executable, __file__, "--one", json.dumps(s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**s, "failed": f"ran longer than {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {**s, "failed": "; ".join((done.stderr or done.stdout).strip().splitlines()[-2:])[-400:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def drive(a):
    found = json.loads(a.out.read_text()) if a.out and a.out.exists() else {"runs": []}
    there = {key(run) for run in found["runs"] if "failed" not in run}
    todo = [s for s in listed(a.part, a.turns) if key(s) not in there and s["size"] in a.sizes]
    for size in {s["size"] for s in todo}:
        model_path(size)
    for s in todo:
        if time.time() - STARTED > a.seconds:
            break
        run = process(s, a.limit)
        print(f"{time.time() - STARTED:.0f} s", json.dumps(run), flush=True)
        found["runs"] = [old for old in found["runs"] if key(old) != key(run)] + [run]
        if a.out:
            write(a.out, found["runs"])
    compare(found["runs"])


def write(path, runs):
    import torch

    from qlora_nb.core import library_versions, write_json

    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    write_json(path, {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "versions": library_versions(),
        "date": f"{datetime.date.today()}", "command": " ".join(["python benchmarks/gpu_training.py", *words]),
        "runs": runs,
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
    p.add_argument("--one", help="measure this setting here and now (JSON), and print its line")
    p.add_argument("--part", choices=("main", "shapes", "tricks", "all"), default="main")
    p.add_argument("--sizes", nargs="*", default=["1b", "3b", "8b"], choices=SHAPES)
    p.add_argument("--turns", type=int, default=3, help="how often each setting is measured")
    p.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after this time")
    p.add_argument("--limit", type=float, default=180, help="seconds that one measurement may take")
    p.add_argument("--out", type=Path, help="written after every measurement")
    p.add_argument("--list", action="store_true", help="print the settings, and stop")
    return p.parse_args()


if __name__ == "__main__":
    BEGUN, STARTED = time.perf_counter(), time.time()
    a = arguments()
    if a.one:
        print("RESULT", json.dumps(one(json.loads(a.one))), flush=True)
    elif a.list:
        for setting in listed(a.part, a.turns):
            print(json.dumps(setting))
    else:
        drive(a)
