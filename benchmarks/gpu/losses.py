"""Do the engine, plain peft and Unsloth learn alike? The mean loss of one run of each, the embedded model in fp32.

python benchmarks/gpu/losses.py nbs/results/losses.json            (also on a CPU)
python benchmarks/gpu/losses.py out.json --steps 12

The same rows in the same order, NF4, three processes; batch, rate and rank are those of the embedded model's profile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

WAYS = {
    "engine": {"engine": True}, "plain": {"backend": "transformers", "engine": False},
    "unsloth": {"backend": "unsloth"},
}  # fmt: skip


def one(way, steps):
    "Train, and print the loss of each step."
    if way == "unsloth":
        import unsloth  # noqa: F401  before transformers, as it asks
    from qlora_nb.adapter import model_info
    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.model import add_lora, load_model
    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.workflow import train

    model, tokenizer = load_model(str(EMBEDDED_MODEL), dtype="float32", max_seq_length=512, **WAYS[way])
    model = add_lora(model, use_gradient_checkpointing=False)
    rows = load_sft_dataset()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 3e-3,
                    "max_steps": steps, "optim": "adamw_torch", "max_seq_length": 512, "eval_rows": 3}  # fmt: skip
        run = train(model, tokenizer, rows, output=Path(folder) / "run", **settings)
        losses = [json.loads(line)["loss"] for line in open(Path(run.path) / "metrics.jsonl")]
    print("RESULT", json.dumps({"losses": losses, "backend": model_info(model)["backend"]}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--one", choices=WAYS)
    a = p.parse_args()
    if a.one:
        return one(a.one, a.steps)
    from common import torch, write

    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, str(a.out), "--steps", str(a.steps), "--one", way]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        found[way] = json.loads(lines[-1][7:]) if lines else {"failed": done.stderr[-600:]}
        if lines:
            found[way]["mean_loss"] = round(statistics.mean(found[way]["losses"]), 5)
        print(way, found[way].get("mean_loss", found[way]), flush=True)
    if all("failed" in one for one in found.values()):
        raise SystemExit("none of the three ways could be trained")
    write(a.out, "cuda" if torch.cuda.is_available() else "cpu", found, steps=a.steps)


if __name__ == "__main__":
    main()
