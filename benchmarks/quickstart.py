"""What our API costs over the libraries below it, on one GPU, with the quick start's own settings.

A Llama of a given shape with random weights (they cost what real ones cost) is trained by four stacks: Unsloth and TRL
by hand, and `load_model`, `add_lora`, `train` with each backend. All see the same rows in the same order. Each
measurement is a process of its own, and the stacks take turns, so that a slow minute of the machine falls on all.

    python benchmarks/quickstart.py --runs 3 --out nbs/results/quickstart.json
    python benchmarks/quickstart.py --stack ours-unsloth          # one measurement, one JSON line
    python benchmarks/quickstart.py --size tiny --steps 6 --skip 2 --runs 1 --stacks ours-transformers   # on a CPU
"""

import argparse
import datetime
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, head_dim, tied, vocabulary
    "tiny": (256, 512, 4, 4, 2, 64, True, 768),
    "1b": (2048, 8192, 16, 32, 8, 64, True, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128, True, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128, False, 128256),
}
STACKS = ("unsloth", "ours-unsloth", "trl", "ours-transformers")
MAX_LENGTH = 2048
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stack", choices=STACKS, help="measure this one here and now")
    p.add_argument("--stacks", nargs="*", default=STACKS, help="which to compare")
    p.add_argument("--size", choices=SHAPES, default="3b")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--accumulation", type=int, default=4)
    p.add_argument("--steps", type=int, default=14)
    p.add_argument("--skip", type=int, default=4, help="steps not counted")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after this time")
    p.add_argument("--out", type=Path)
    return p.parse_args()


def make_model(size, path):
    "Save a Llama of this shape with random weights, and the embedded model's tokenizer."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlora_nb.core import EMBEDDED_MODEL

    tok = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    h, i, n, q, kv, d, tied, words = SHAPES[size]
    config = LlamaConfig(
        vocab_size=words, hidden_size=h, intermediate_size=i, num_hidden_layers=n, num_attention_heads=q,
        num_key_value_heads=kv, head_dim=d, tie_word_embeddings=tied, max_position_embeddings=131072, rms_norm_eps=1e-5,
        dtype="bfloat16", bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=8192),
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    del model
    gc.collect()


def conversations(count=240):
    "Rows of log-normal length (median 600 tokens, cut at MAX_LENGTH), nearly all of it the reply."
    rng = random.Random(0)
    words = [" apples", " pens", " books", " coins", " cards", " shells", " stamps", " marbles"]  # one token each
    rows = []
    for _ in range(count):
        length = min(MAX_LENGTH, max(64, int(rng.lognormvariate(6.4, 0.7)))) - 16
        reply = "The" + "".join(rng.choices(words, k=length))
        rows.append({"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": reply}]})
    return rows


def by_hand(a, path):
    "Unsloth or TRL as their own documentation has it; (model, trainer)."
    if a.stack == "unsloth":
        from unsloth import FastLanguageModel

        model, tok = FastLanguageModel.from_pretrained(path, max_seq_length=MAX_LENGTH, dtype=None, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(
            model, r=16, target_modules=PROJECTIONS, lora_alpha=16, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", random_state=3407,
        )  # fmt: skip
    else:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        tok = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quant, dtype=torch.bfloat16, device_map={"": 0}
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ids = [tok.apply_chat_template(r["messages"], return_dict=True)["input_ids"] for r in conversations()]
    config = SFTConfig(
        max_length=MAX_LENGTH, per_device_train_batch_size=a.batch, gradient_accumulation_steps=a.accumulation,
        warmup_steps=5, max_steps=a.steps, learning_rate=2e-4, optim="adamw_8bit", weight_decay=0.01,
        lr_scheduler_type="linear", logging_steps=1, output_dir=tempfile.mkdtemp(), seed=3407, data_seed=3407,
        report_to="none", bf16=True, packing=False, gradient_checkpointing=a.stack == "trl", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": i} for i in ids])
    return SFTTrainer(model=model, processing_class=tok, train_dataset=rows, args=config)


def ours(a, path):
    "The same by our API; (seconds by step, tokens by step, loss by step)."
    from qlora_nb.model import add_lora, load_model

    model, tok = load_model(path, backend=a.stack.removeprefix("ours-"))
    model = add_lora(model, r=16, lora_alpha=16)
    from datasets import Dataset

    from qlora_nb.workflow import train

    run = train(
        model, tok, Dataset.from_list(conversations()), output=Path(tempfile.mkdtemp()) / "run", eval_rows=0,
        max_steps=a.steps, per_device_train_batch_size=a.batch, gradient_accumulation_steps=a.accumulation,
        learning_rate=2e-4, warmup_steps=5, optim="adamw_8bit", max_seq_length=MAX_LENGTH, save_steps=1000,
    )  # fmt: skip
    return [m["loss"] for m in run.metrics]


def measure(a):
    "One stack, once: seconds a step and tokens a second (padding left out) after the first steps, and peak memory."
    if "unsloth" in a.stack:
        import unsloth  # noqa: F401  before transformers and trl, as it asks
    import torch
    from transformers import Trainer, TrainerCallback

    cuda = torch.cuda.is_available()
    ends, tokens = [], [0]
    step = Trainer.training_step

    def counted(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        tokens[0] += inputs["input_ids"].numel() if mask is None else mask.sum()
        return step(self, model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            ends.append((time.time(), int(tokens[0])))

    import trl

    trl.SFTTrainer.training_step = counted
    init = trl.SFTTrainer.__init__

    def with_clock(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Clock())
        if cuda:
            torch.cuda.reset_peak_memory_stats()

    trl.SFTTrainer.__init__ = with_clock
    path = model_path(a.size)
    if a.stack.startswith("ours"):
        losses = ours(a, path)
    else:
        trainer = by_hand(a, path)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = ends[-1][0] - ends[a.skip][0]
    found = {
        "stack": a.stack, "size": a.size, "base": 4, "batch": a.batch, "accumulation": a.accumulation,
        "seconds_per_step": round(seconds / (len(ends) - 1 - a.skip), 4),
        "tokens_per_second": round((ends[-1][1] - ends[a.skip][1]) / seconds),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
        "tokens": ends[-1][1], "last_loss": losses[-1],
    }  # fmt: skip
    print("RESULT", json.dumps(found), flush=True)


def model_path(size):
    path = Path(tempfile.gettempdir()) / f"qlora_nb_quickstart_{size}"
    if not (path / "config.json").exists():
        make_model(size, path)
    return str(path)


def compare(a):
    "Every stack `runs` times, in turn; prints medians, and writes them with every run to --out."
    begun, runs = time.time(), []
    model_path(a.size)
    for _ in range(a.runs):
        for stack in a.stacks:
            if time.time() - begun > a.seconds:
                continue
            command = [sys.executable, __file__, "--stack", stack]
            for name in ("size", "batch", "accumulation", "steps", "skip"):
                command += [f"--{name}", str(getattr(a, name))]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(done.stdout[-1500:], done.stderr[-3000:], sep="\n", file=sys.stderr)
                continue
            runs.append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(f"{time.time() - begun:.0f} s", json.dumps(runs[-1]), flush=True)
            if a.out:
                write(a, runs)
    for stack in a.stacks:
        mine = [r for r in runs if r["stack"] == stack]
        for key in ("seconds_per_step", "tokens_per_second", "peak_allocated_gib"):
            if mine and mine[0][key] is not None:
                print(f"{stack:<18} {key:<20} median of {len(mine)}: {statistics.median(r[key] for r in mine):,.3f}")


def write(a, runs):
    import torch

    from qlora_nb.core import library_versions, write_json

    write_json(a.out, {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "versions": library_versions(),
        "date": f"{datetime.date.today()}", "command": " ".join(["python benchmarks/quickstart.py", *sys.argv[1:]]),
        "runs": runs,
    })  # fmt: skip


if __name__ == "__main__":
    a = arguments()
    measure(a) if a.stack else compare(a)
