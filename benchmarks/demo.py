"""The run on the front page: `qlora_nb train` with no argument, its figures, losses and one pair of replies.

    python benchmarks/demo.py     # about a minute on 2 CPU cores; writes nbs/results/demo.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("before", "after", "seconds", "train_seconds", "adapter_sha256", "backend", "trainable", "total", "tokens")
SHOWN += ("steps", "mean_loss", "last_loss")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_cured(rows):
    "The first held-out problem that was wrong before and is right after, with both replies."
    before, after = ([row for row in rows if row["stage"] == stage] for stage in ("before", "after"))
    one, two = next(pair for pair in zip(before, after, strict=True) if pair[1]["exact"] and not pair[0]["exact"])
    assert one["problem"] == two["problem"]
    return {"question": one["problem"], "before": one["reply"], "after": two["reply"]}


def main():
    with tempfile.TemporaryDirectory() as folder:
        command = ["-c", "from qlora_nb.cli import main; main(['train', '--output', 'run'])"]
        subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        run = Path(folder) / "run"
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
        losses = [round(row["loss"], 4) for row in lines(run / "metrics.jsonl") if "loss" in row]
        example = first_cured(lines(run / "evaluation.jsonl"))
    result = {name: summary[name] for name in SHOWN if name in summary}
    result |= {"versions": versions, "command": "qlora_nb train", "gpu": None}
    result |= {"date": versions.get("date"), "losses": losses, "example": example}
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "nbs/results/demo.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
