"""The run on the front page: `qlora_nb train` with no argument, its figures, losses and one pair of replies.

python benchmarks/demo.py             # about a minute on 2 CPU cores; writes nbs/results/demo.json
python benchmarks/demo.py --fresh     # `make demo`, fresh clone, empty pip cache; nbs/results/fresh.json
"""

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
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


def timed(command, folder, env):
    "Seconds on the clock, and of the processor; what it wrote."
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.time() - start, 1), "cpu_seconds": round(cpu, 1)}, done


def fresh():
    "What a new user waits for: installing, then the demo to its last line. Nothing of this environment is used."
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{place}/clone"], check=True)
        own = Path(sys.prefix) / "bin"
        path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != own)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
        env |= {"PATH": path, "PIP_CACHE_DIR": f"{place}/pip", "HF_HOME": f"{place}/hf"}
        load = os.getloadavg()[0]
        install, _ = timed(["make", ".venv/.demo"], f"{place}/clone", env)
        demo, done = timed(["make", "demo"], f"{place}/clone", env)
        (run,) = Path(place, "clone/runs").iterdir()
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        (packages,) = Path(place, "clone/.venv/lib").glob("python3*/site-packages")
        names = {one.name.lower().replace("_", "-") for one in importlib.metadata.distributions(path=[str(packages)])}
    assert "llama-cpp-python" not in names, "the demo needs a compiler"
    result = {
        "install": install,
        "demo": demo,
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
    }
    result |= {"certified": summary["certified"], "train_seconds": summary["train_seconds"], "packages": len(names)}
    result |= {
        "command": "make demo",
        "gpu": None,
        "date": date.today().isoformat(),
        "adapter_sha256": summary["adapter_sha256"],
    }
    result["reply"] = (
        done.stdout.partition("served by llama.cpp from the exported file:")[2].partition("\n\nThe run")[0].strip()
    )
    (ROOT / "nbs/results/fresh.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def main():
    if "--fresh" in sys.argv[1:]:
        return fresh()
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
