"""Peak memory of training, setting by setting: each one a process of its own, several at a time on one card.

    python benchmarks/gpu/memory.py nbs/results/memory.json
    python benchmarks/gpu/memory.py out.json --only 3            # the first three settings
    python benchmarks/gpu/memory.py out.json --one '{"size": "tiny", "seq_length": 64}'   # here and now, also on a CPU

LoRA and QLoRA go through `load_model`, `add_lora` and `train`; full fine-tuning through TRL's trainer. Every row has
exactly `seq_length` tokens (with packing: rows of log-normal length, packed into that many). Random weights cost what
real ones cost. Peaks are torch's own counters in that process, so that neighbours on the card don't show in them; step
times are recorded but suffer from the neighbours, and are marked `shared_card`.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

DEFAULTS = {
    "stack": "transformers", "method": "qlora", "size": "3b", "batch": 2, "accumulation": 1, "seq_length": 2048,
    "r": 16, "gradient_checkpointing": True, "packing": False, "optimizer": "adamw_8bit", "dtype": "bf16", "steps": 4,
}  # fmt: skip


def settings():
    "What is measured. Those with `held_out` are not to be looked at when a constant of the estimate is set."
    rows = []
    for stack in ("transformers", "unsloth"):
        for size in ("1b", "3b"):
            rows += [
                {"stack": stack, "size": size, "batch": 1, "seq_length": 512},
                {"stack": stack, "size": size, "batch": 2, "seq_length": 2048},
                {"stack": stack, "size": size, "batch": 4, "seq_length": 1024, "gradient_checkpointing": False},
                {"stack": stack, "size": size, "batch": 1, "seq_length": 8192},
            ]
        rows += [
            {"stack": stack, "size": "3b", "batch": 8, "seq_length": 1024, "r": 64},
            {"stack": stack, "size": "3b", "batch": 2, "seq_length": 2048, "method": "lora"},
            {
                "stack": stack,
                "size": "1b",
                "batch": 8,
                "seq_length": 512,
                "method": "lora",
                "gradient_checkpointing": False,
            },
            {
                "stack": stack,
                "size": "3b",
                "batch": 1,
                "seq_length": 4096,
                "gradient_checkpointing": False,
                "optimizer": "adamw_torch",
            },
            {"stack": stack, "size": "8b", "batch": 2, "seq_length": 2048},
            {"stack": stack, "size": "8b", "batch": 1, "seq_length": 512, "method": "lora"},
            {"stack": stack, "size": "8b", "batch": 1, "seq_length": 1024, "gradient_checkpointing": False},
        ]
    rows += [
        {"stack": "unsloth", "size": "3b", "batch": 2, "seq_length": 2048, "packing": True},
        {"stack": "unsloth", "size": "1b", "batch": 4, "seq_length": 2048, "packing": True},
        {"method": "full", "size": "1b", "batch": 1, "seq_length": 1024, "optimizer": "adamw_torch", "dtype": "fp32"},
        {"method": "full", "size": "1b", "batch": 4, "seq_length": 2048},
        {"method": "full", "size": "3b", "batch": 1, "seq_length": 2048},
    ]  # fmt: skip
    for i, row in enumerate(rows):
        rows[i] = {**DEFAULTS, **row, "held_out": i % 5 in (1, 3)}  # two fifths, by their place alone
    return rows


def rows_of(tokenizer, length, count, exact):
    "Conversations that become `length` tokens each, or (not exact) of log-normal length up to that."
    import random

    from qlora_nb.template import encode

    def conversation(words):
        reply = "The" + " apples" * words
        return {"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": reply}]}

    def tokens(words):
        return len(encode(conversation(words)["messages"], tokenizer, max_length=10**6)["input_ids"])

    extra, rng = tokens(100) - 100, random.Random(0)
    lengths = [length if exact else min(length, max(64, int(rng.lognormvariate(6.4, 0.7)))) for _ in range(count)]
    found = [conversation(n - extra) for n in lengths]
    assert tokens(lengths[0] - extra) == lengths[0]
    return found


def with_adapters(s, path):
    "LoRA or QLoRA by our API."
    from datasets import Dataset

    from qlora_nb.model import add_lora, load_model
    from qlora_nb.workflow import train

    model, tok = load_model(
        path, backend=s["stack"], load_in_4bit=s["method"] == "qlora", max_seq_length=s["seq_length"]
    )
    wanted = ("unsloth" if s["stack"] == "unsloth" else True) if s["gradient_checkpointing"] else False
    model = add_lora(model, r=s["r"], lora_alpha=s["r"], use_gradient_checkpointing=wanted)
    count = s["batch"] * s["accumulation"] * s["steps"] * (8 if s["packing"] else 1)
    data = Dataset.from_list(rows_of(tok, s["seq_length"], max(count, 16), not s["packing"]))
    train(
        model, tok, data, output=Path(tempfile.mkdtemp()) / "run", check=False, eval_rows=0, max_steps=s["steps"],
        per_device_train_batch_size=s["batch"], gradient_accumulation_steps=s["accumulation"], warmup_steps=1,
        optim=s["optimizer"], max_seq_length=s["seq_length"], packing=s["packing"], save_steps=1000,
    )  # fmt: skip


def full(s, path):
    "All parameters, by TRL's trainer."
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dtype = torch.float32 if s["dtype"] == "fp32" else torch.bfloat16
    tok = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": 0})
    ids = [{"input_ids": [7] * s["seq_length"], "labels": [7] * s["seq_length"]}] * max(16, s["batch"] * s["steps"])
    config = SFTConfig(
        max_length=s["seq_length"], per_device_train_batch_size=s["batch"],
        gradient_accumulation_steps=s["accumulation"], max_steps=s["steps"], optim=s["optimizer"], bf16=True,
        gradient_checkpointing=s["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if s["gradient_checkpointing"] else None,
        output_dir=tempfile.mkdtemp(), save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    SFTTrainer(model=model, processing_class=tok, train_dataset=Dataset.from_list(ids), args=config).train()


def one(s):
    "Measure one setting in this process and print its line."
    s = {**DEFAULTS, **s}
    if s["stack"] == "unsloth":
        import unsloth  # noqa: F401  before transformers and trl, as it asks
    import torch
    from quickstart import model_path
    from transformers import TrainerCallback
    from transformers.trainer_callback import DefaultFlowCallback

    cuda, ends, marks = torch.cuda.is_available(), [], {}

    def begin(self, *args, **kwargs):
        if cuda:
            marks.update(resident=torch.cuda.memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def end(self, args, state, control, **kwargs):
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.time())
        return after(self, args, state, control, **kwargs)

    after = DefaultFlowCallback.on_step_end
    DefaultFlowCallback.on_step_end = end
    TrainerCallback.on_train_begin, DefaultFlowCallback.on_train_begin = begin, begin
    path = model_path(s["size"])
    (full if s["method"] == "full" else with_adapters)(s, path)
    peak = {}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        peak = {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "resident": marks["resident"],
            "gpu_total": total,
        }
        peak |= {f"{k}_gib": round(peak[k] / 2**30, 3) for k in ("peak_allocated", "peak_reserved")}
    steps = len(ends) - 1
    seconds = (ends[-1] - ends[0]) / steps
    rate = s["batch"] * s["accumulation"] * s["seq_length"] / seconds
    found = {
        **s,
        "base": 4 if s["method"] == "qlora" else 16,
        "seconds_per_step": round(seconds, 3),
        "tokens_per_second": round(rate),
        **peak,
    }
    print("RESULT", json.dumps(found), flush=True)


def in_process(s, limit):
    "The same in a process of its own."
    start = time.time()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "-", "--one", json.dumps(s)], capture_output=True, text=True, timeout=limit
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        lines, tail = [], [f"ran longer than {limit} s"]
    found = (
        json.loads(lines[-1].removeprefix("RESULT ")) if lines else {**s, "failed": tail[0] if tail else "no output"}
    )
    return {**found, "process_seconds": round(time.time() - start, 1)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--one", help="a setting as JSON")
    parser.add_argument("--only", type=int, help="the first so many settings")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no setting after this time")
    args = parser.parse_args()
    if args.one:
        return one(json.loads(args.one))
    import torch
    from common import write
    from quickstart import model_path

    begun, runs = time.time(), []
    todo = settings()[args.skip : args.only]
    for size in sorted({s["size"] for s in todo}):
        model_path(size)
    torch.cuda.empty_cache()
    print(f"models made after {time.time() - begun:.0f} s", flush=True)

    def measure(s):
        return in_process(s, 150) if time.time() - begun < args.seconds else {**s, "failed": "no time was left"}

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(measure, s) for s in todo]):
            runs.append({**future.result(), "shared_card": args.workers > 1})
            brief = {
                k: runs[-1].get(k)
                for k in ("stack", "method", "size", "batch", "seq_length", "peak_allocated_gib", "failed")
            }
            print(f"{time.time() - begun:.0f} s", json.dumps(brief), flush=True)
            write(args.out, "cuda", runs)


if __name__ == "__main__":
    main()
