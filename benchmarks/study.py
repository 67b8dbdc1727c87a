"""Full fine-tuning, LoRA and QLoRA side by side on the embedded model: the numbers behind `34_full_lora_qlora`.

A run is a process of its own: one method, one seed, one setting of each dial. It trains on the embedded data, answers
the held-out rows, and prints one JSON line. Everything is computed in fp32, with one thread and deterministic kernels:
the same machine and versions give the same numbers. The base's weights are bf16 numbers, read exactly into fp32.

    python benchmarks/study.py --one '{"method": "lora", "seed": 1, "learning_rate": 0.003}'    # one run, one line
    python benchmarks/study.py --part base --device cpu --workers 2 --methods full lora qlora    # at the stored rates
    python benchmarks/study.py --part all --workers 10 --seconds 480 --out study_gpu.json        # all of it, on a GPU
    python benchmarks/study.py --merge study_gpu.json                                            # fold in another file

Runs that the output holds already are not made again. Learning rates come from the part `search`: the same grid for
every method, a seed of its own, judged by the loss on rows set apart from the training rows.
"""

import argparse
import datetime
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
STORED = ROOT / "nbs" / "results" / "study.json"

METHODS = ("full", "lora", "qlora", "fp4", "int4")
SEEDS = (1, 2, 3)
MORE_SEEDS = (1, 2, 3, 4, 5)
SEARCH_SEED = 0
GRID = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
TRAINED = 2700  # of the 3,000 training rows; the other 300 are for the search
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "q and v": ["q_proj", "v_proj"],
}
DEFAULTS = {
    "part": "base", "factor": None, "method": "lora", "seed": 1, "learning_rate": 3e-3, "r": 16, "lora_alpha": 16,
    "scaling": "alpha/r", "dropout": 0.0, "targets": "all", "variant": None, "batch": 8, "rows": 1600, "epochs": 1,
    "eval_rows": 400,
}  # fmt: skip


def arguments(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--one", help="make this run here and now (JSON), and print its line")
    p.add_argument("--part", choices=("search", "before", "base", "factors", "all"), default="base")
    p.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    p.add_argument("--seeds", nargs="*", type=int, help="of the part base; 1 to 5 on a GPU, 1 to 3 on a CPU")
    p.add_argument("--factors", nargs="*", help="only these; see --list")
    p.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    p.add_argument("--workers", type=int, default=2, help="runs at a time")
    p.add_argument("--seconds", type=float, default=1e9, help="start no further run after this time")
    p.add_argument("--out", type=Path, default=STORED, help="written after every run")
    p.add_argument("--stored", type=Path, default=STORED, help="where the rates come from, if not from --out")
    p.add_argument("--merge", type=Path, help="fold the runs of this file into --out, and stop")
    p.add_argument("--small", action="store_true", help="32 rows to train on and 8 to answer: a dry run")
    p.add_argument("--list", action="store_true", help="print the runs of the part, and stop")
    return p.parse_args(given)


# --- one run --------------------------------------------------------------------------------------------------------


def steady(device, seed):
    "One thread, fp32 proper, deterministic kernels."
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    if device == "cpu":
        torch.cuda.is_available = lambda: False  # the package asks it where to put things


def build(run):
    "The model that is trained, and its tokenizer: all weights in fp32, or a frozen base with adapters."
    from qlora_nb.model import find_targets, load_model
    from qlora_nb.nf4 import fake_quantize

    model, tokenizer = load_model(
        "qlora_nb:embedded", load_in_4bit=run["method"] == "qlora", dtype="float32", backend="transformers"
    )
    if run["method"] == "full":
        return model.requires_grad_(True), tokenizer
    if run["method"] in ("fp4", "int4"):
        for layer in find_targets(model).values():
            layer.weight.data = fake_quantize(layer.weight.data, run["method"])
    return with_adapters(model, run), tokenizer


def with_adapters(model, run):
    "Adapters by `add_lora`; DoRA and PiSSA by peft itself."
    import torch

    from qlora_nb.model import add_lora

    kind = {"r": run["r"], "lora_alpha": run["lora_alpha"], "lora_dropout": run["dropout"]}
    kind |= {"target_modules": TARGETS[run["targets"]], "use_rslora": run["scaling"] == "alpha/sqrt(r)"}
    if run["variant"] is None:
        return add_lora(model, **kind, use_gradient_checkpointing=False, random_state=run["seed"])
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    torch.manual_seed(run["seed"])
    more = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}[run["variant"]]
    return get_peft_model(model, LoraConfig(**kind, **more, task_type="CAUSAL_LM"))


def draw(data, run):
    "The rows of this seed."
    import torch

    chance = torch.Generator().manual_seed(run["seed"])
    return data.select(torch.randperm(TRAINED, generator=chance)[: run["rows"]].tolist())


def batches(rows, run, pad):
    "Tensors of each step; every epoch has an order of its own."
    import torch

    chance = torch.Generator().manual_seed(run["seed"])
    steps = run["rows"] * run["epochs"] // run["batch"]
    order = torch.cat([torch.randperm(len(rows), generator=chance) for _ in range(math.ceil(run["epochs"]))])
    for step in range(steps):
        yield padded([rows[i] for i in order[step * run["batch"] : (step + 1) * run["batch"]].tolist()], pad)


def padded(rows, pad):
    "Rows of `input_ids` and `labels` as rectangles, filled up on the right."
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", -100), "attention_mask": mask}


def warm_up_and_decay(optimizer, steps, warm):
    "A learning rate that rises for `warm` steps and then falls to 0 along a line."
    import torch

    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / (warm + 1)) * min(1, (steps - s) / max(steps - warm, 1))
    )


def fit(model, rows, run, device, pad):
    "The loop that every method shares: AdamW, warm-up, linear decay, norms cut at 1. Losses, and the optimizer."
    import torch

    steps = run["rows"] * run["epochs"] // run["batch"]
    warm = min(10, steps // 10)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run["learning_rate"], weight_decay=0.01)
    schedule = warm_up_and_decay(optimizer, steps, warm)
    losses = []
    model.train()
    for batch in batches(rows, run, pad):
        loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.detach())
        if len(losses) % 20 == 0 and not math.isfinite(losses[-1]):
            break
    return [float(loss) for loss in losses], optimizer


def thinned(losses, points=20):
    "Pairs of last step and mean loss, at most `points` of them."
    width = max(1, math.ceil(len(losses) / points))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [[min((i + 1) * width, len(losses)), number(sum(part) / len(part))] for i, part in enumerate(parts)]


def number(value):
    "A value for JSON: None where it is not finite."
    return float(f"{value:.6g}") if math.isfinite(value) else None


def bytes_of(model, optimizer):
    "What training keeps between two steps: weights, gradients, and the optimizer's averages."
    import torch

    weights = {p.data_ptr(): p for p in model.parameters()}.values()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    constants = [b for p in weights for b in constants_of(getattr(p, "quant_state", None))]
    gradients = [p.grad for p in weights if p.grad is not None]
    return {
        "weight_bytes": sum(t.numel() * t.element_size() for t in [*weights, *constants]),
        "gradient_bytes": sum(t.numel() * t.element_size() for t in gradients),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in states),
    }


def constants_of(state):
    "The scales of a 4-bit weight."
    if state is None:
        return []
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def checkpoint_bytes(model):
    "Bytes of the files that hold what was trained."
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def quality(model, tokenizer, rows, base_rows, new_tokens=112):
    """Held-out loss and answers; and the base's own task: perplexity of its replies, answers in whatever form, answers
    within the 16 tokens that the base needs, and how many replies take the new form."""
    from qlora_nb.evaluation import answer_loss, evaluate, has_form

    loss, tokens = answer_loss(model, tokenizer, rows, batch_size=50)
    base_loss, _ = answer_loss(model, tokenizer, base_rows, batch_size=100)
    if not math.isfinite(loss):
        return {"loss": None, "base_perplexity": None}
    found = evaluate(model, tokenizer, rows, max_new_tokens=new_tokens, batch_size=200)
    base = evaluate(model, tokenizer, base_rows, max_new_tokens=new_tokens, batch_size=300)
    direct = evaluate(model, tokenizer, base_rows, max_new_tokens=16, batch_size=300)
    return {
        "loss": number(loss), "exact": found.exact, "form": found.form, "stops": found.stops,
        "length": number(mean_length(found.rows, tokenizer)), "base_perplexity": number(math.exp(min(base_loss, 700))),
        "base_exact": base.exact, "base_direct": direct.exact,
        "base_form": sum(has_form(row["reply"]) for row in base.rows) / len(base.rows),
    }  # fmt: skip


def mean_length(rows, tokenizer):
    "Tokens of a reply, in the mean."
    return sum(len(ids) for ids in tokenizer([row["reply"] for row in rows])["input_ids"]) / len(rows)


def one(run, device):
    "Make a run and return what came out."
    begun = time.perf_counter()
    steady(device, run["seed"])
    import torch

    from qlora_nb.evaluation import answer_loss
    from qlora_nb.model import count_parameters
    from qlora_nb.preflight import encode_dataset
    from qlora_nb.rows import load_sft_dataset

    data = load_sft_dataset(split="train")
    held = load_sft_dataset(split="heldout") if run["part"] != "search" else data.select(range(TRAINED, len(data)))
    held = held.select(range(min(run["eval_rows"], len(held))))
    base_rows = load_sft_dataset(split="base_task")
    base_rows = base_rows.select(range(min(run["eval_rows"], len(base_rows))))
    model, tokenizer = build(run)
    mine = draw(data, run)
    rows, left_out = encode_dataset(mine, tokenizer, 256)
    assert not left_out, f"{len(left_out)} rows are too long"
    parameters = count_parameters(model)
    started = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, optimizer = fit(model, rows.to_list(), run, device, tokenizer.pad_token_id)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    ended = time.perf_counter()
    after = quality(model, tokenizer, held, base_rows)
    few = run["rows"] <= 400 and after["loss"] is not None
    trained_loss = answer_loss(model, tokenizer, mine, batch_size=50)[0] if few else None
    return {
        **run, **after, "steps": len(losses), "train_loss": number(sum(losses[-20:]) / len(losses[-20:])),
        "trained_rows_loss": number(trained_loss) if few else None,
        "curve": thinned(losses), **parameters, **bytes_of(model, optimizer),
        "checkpoint_bytes": checkpoint_bytes(model), "peak_allocated_bytes": peak,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "train_seconds": round(ended - started, 2), "seconds": round(time.perf_counter() - begun, 2),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def before(device, quantized, eval_rows=400):
    "The base itself, before any training, in 16 bits or on its 4-bit codes."
    run = {**DEFAULTS, "part": "before", "method": quantized, "eval_rows": eval_rows}
    steady(device, 0)
    import torch

    from qlora_nb.rows import load_sft_dataset

    held, base_rows = (load_sft_dataset(split=split) for split in ("heldout", "base_task"))
    held, base_rows = (rows.select(range(min(eval_rows, len(rows)))) for rows in (held, base_rows))
    model, tokenizer = build(run)
    found = quality(model, tokenizer, held, base_rows)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"part": "before", "method": quantized, "seed": 0, "eval_rows": eval_rows, **found, "device": name}


# --- the list of runs -----------------------------------------------------------------------------------------------


def base_runs(rates, methods, seeds):
    return [{"part": "base", "method": m, "seed": seed, "learning_rate": rates[m]} for seed in seeds for m in methods]


def before_runs(methods):
    "The base without training, as each method sees it. (Full fine-tuning and LoRA start from the same one.)"
    return [{"part": "before", "method": method, "seed": 0} for method in methods if method != "full"]


def search_runs(methods):
    return [
        {"part": "search", "method": m, "seed": SEARCH_SEED, "learning_rate": rate, "eval_rows": 200}
        for rate in GRID
        for m in methods
    ]


def factor_settings(rates):
    "Each factor's settings, all else as in the part base. Rates are the ones that the search chose."
    lora, full = rates["lora"], rates["full"]
    few = {"rows": 100, "learning_rate": lora}
    return {
        "rank": [{"r": r, "scaling": "alpha/r"} for r in (1, 2, 4, 8, 32, 64, 128)]
        + [{"r": r, "lora_alpha": 4, "scaling": "alpha/sqrt(r)"} for r in (1, 2, 4, 8, 32, 64, 128)],
        "alpha = r": [{"r": r, "lora_alpha": r} for r in (1, 4, 64, 128)],
        "epochs": [{**few, "epochs": n} for n in (1, 2, 4, 8, 16, 32)],
        "few rows, cures": [{**few, "epochs": 32, "dropout": 0.1}, {**few, "epochs": 32, "r": 2},
                            {**few, "epochs": 32, "method": "full", "learning_rate": full}],
        "targets": [{"targets": "attention"}, {"targets": "mlp"}, {"targets": "q and v"},
                    {"targets": "attention", "r": 36, "lora_alpha": 36}],
        "batch": [{"batch": n} for n in (2, 32, 128)]
        + [{"batch": n, "learning_rate": number(lora * math.sqrt(n / 8))} for n in (2, 32, 128)],
        "alpha": [{"lora_alpha": a} for a in (4, 8, 32, 64)],
        "variant": [{"variant": "dora"}, {"variant": "pissa"}, {"scaling": "alpha/sqrt(r)"}],
        "dropout": [{"dropout": d} for d in (0.05, 0.1, 0.2)],
    }  # fmt: skip


def factor_runs(rates, only=None):
    "One seed of everything first, so that a run that is stopped has seen each factor."
    found = [
        {"part": "factors", "factor": name, "method": "lora", "learning_rate": rates["lora"], "seed": seed, **setting}
        for seed in SEEDS
        for name, settings in factor_settings(rates).items()
        for setting in settings
    ]
    grid = [
        {"part": "factors", "factor": "rank and rate", "method": "lora", "seed": 1, "learning_rate": rate, "r": r}
        for r in (1, 16, 128)
        for rate in GRID[2:]
    ]
    first = len(found) // len(SEEDS)
    return [run for run in found[:first] + grid + found[first:] if not only or run["factor"] in only]


def rates_from(runs):
    "Each method's rate: the lowest loss on the rows of the search. {} for those that were not searched."
    found = {}
    for run in runs:
        if run["part"] == "search" and run["loss"] is not None:
            best = found.get(run["method"])
            if best is None or run["loss"] < best["loss"]:
                found[run["method"]] = run
    return {method: run["learning_rate"] for method, run in found.items()}


def key(run):
    "What makes two runs the same one: every setting, and the device."
    whole = {**DEFAULTS, **run}
    return json.dumps({name: whole[name] for name in DEFAULTS} | {"device": run["device"]}, sort_keys=True)


SHOWN = ("part", "factor", "method", "seed", "learning_rate", "loss", "exact", "base_exact", "seconds")


# --- the driver -----------------------------------------------------------------------------------------------------


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}


def write(path, found):
    "The file, whole or not at all; runs in an order of their own, so that it does not depend on who was first."
    from qlora_nb.core import write_json

    parts = ("before", "search", "base", "factors")
    runs = sorted(found["runs"], key=lambda r: (r["device"] == "cpu", parts.index(r["part"]), key(r)))
    write_json(path, {**{k: v for k, v in found.items() if k != "runs"}, "runs": runs})


def process(run, device):
    "One run in a process of its own. None, and its last words on stderr, where it fails."
    command = [sys.executable, __file__, "--device", device, "--one", json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print("failed:", json.dumps(run), done.stderr[-2000:], sep="\n", file=sys.stderr, flush=True)
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


def make(runs, found, device, name, a, begun):
    "Make the runs that are not there yet, `workers` at a time, and write the file after each."
    small = {"rows": 32, "eval_rows": 8} if a.small else {}
    runs = [{**run, **(small if run["part"] != "before" else {"eval_rows": 8} if a.small else {})} for run in runs]
    there = {key(run) for run in found["runs"]}
    todo = [run for run in runs if key({**run, "device": name}) not in there]
    print(f"{time.time() - begun:.0f} s: {len(todo)} of {len(runs)} runs to do", file=sys.stderr, flush=True)

    def start(run):
        return process(run, device) if time.time() - begun < a.seconds else None

    with ThreadPoolExecutor(a.workers) as pool:
        for future in as_completed([pool.submit(start, run) for run in todo]):
            if (run := future.result()) is not None:
                found["runs"].append(run)
                write(a.out, found)
                print(f"{time.time() - begun:.0f} s", json.dumps({k: run.get(k) for k in SHOWN}), flush=True)


def drive(a):
    "The parts that were asked for, one after the other."
    import torch

    begun, device = time.time(), a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found, stored = read(a.out), read(a.stored)["runs"]
    found = {**found, **about(found, None if device == "cpu" else name)}
    for part in ("search", "before", "base", "factors") if a.part == "all" else (a.part,):
        rates = rates_from(found["runs"]) or rates_from(stored)
        make(listed(part, rates, device, a), found, device, name, a, begun)
    compare(found["runs"], stored)


def about(found, gpu):
    "What the file says of the machine: at the top of the GPU's runs, where there are any; of the CPU's under `cpu`."
    from qlora_nb.core import library_versions

    command = " ".join(["python benchmarks/study.py", *map(plain, sys.argv[1:])])
    new = {"versions": library_versions(), "date": f"{datetime.date.today()}", "command": command}
    if gpu:
        return {"gpu": gpu, **new}
    return {**({"gpu": None, **new} if not found.get("gpu") else {}), "cpu": {"processor": processor(), **new}}


def plain(word):
    "An argument as it stands in the record: files by their names alone."
    return Path(word).name if word.startswith("/") else word


def processor():
    "The name of the CPU."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")


def listed(part, rates, device, a):
    seeds = a.seeds or (MORE_SEEDS if device == "cuda" else SEEDS)
    if part in ("search", "before"):
        return search_runs(a.methods) if part == "search" else before_runs(a.methods)
    missing = [m for m in a.methods if m not in rates]
    if missing:
        sys.exit(f"no learning rate was searched for {', '.join(missing)} yet: run --part search first")
    return base_runs(rates, a.methods, seeds) if part == "base" else factor_runs(rates, a.factors)


SAME = ("loss", "exact", "form", "stops", "length", "base_perplexity", "base_exact", "base_direct", "train_loss")


def compare(made, stored):
    "Say which runs of the part base on this device are stored, too, and whether the numbers are the same."
    there = {key(run): run for run in stored}
    both = [(run, there[key(run)]) for run in made if run["part"] == "base" and key(run) in there]
    other = [run for run, old in both if any(run[name] != old[name] for name in SAME)]
    print(f"{len(both)} runs of the part base are stored, too; {len(both) - len(other)} of them with the same numbers")
    for run in other:
        old = there[key(run)]
        changes = ", ".join(f"{name} {old[name]} -> {run[name]}" for name in SAME if old[name] != run[name])
        print(f"{run['method']}, seed {run['seed']}: {changes}")


def merge(a):
    "Fold the runs of another file into --out; what both hold is taken from the other file."
    found, new = read(a.out), read(a.merge)
    replaced = {key(run) for run in new["runs"]}
    runs = [run for run in found["runs"] if key(run) not in replaced] + new["runs"]
    said = new if new.get("gpu") or not found.get("gpu") else {"cpu": new.get("cpu")}
    write(a.out, {**found, **said, "runs": runs})


def single(given, device):
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = json.loads(given)
    unknown = sorted(set(run) - set(DEFAULTS))
    if unknown or run.get("method", "lora") not in METHODS:
        what = ", ".join(unknown) or f"method {run['method']}"
        sys.exit(f"a run has no {what}: known are {', '.join(DEFAULTS)}; methods are {', '.join(METHODS)}")
    if run.get("part") == "before":
        return before(device, run["method"], run.get("eval_rows", 400))
    return one({**DEFAULTS, **run}, device)


if __name__ == "__main__":
    a = arguments()
    if a.one:
        print("RESULT", json.dumps(single(a.one, a.device)), flush=True)
    elif a.merge:
        merge(a)
    elif a.list:
        rates = rates_from(read(a.out)["runs"]) or rates_from(read(a.stored)["runs"]) or dict.fromkeys(METHODS, 3e-3)
        for part in ("search", "before", "base", "factors") if a.part == "all" else (a.part,):
            for run in listed(part, rates, a.device or "cuda", a):
                print(json.dumps(run))
    else:
        drive(a)
