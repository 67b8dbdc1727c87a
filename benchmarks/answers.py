"""How fast held-out questions are answered, beside transformers' own `generate`: the numbers behind `37_decoding`.

    python benchmarks/answers.py cpu                                  # the demo's evaluation, in turn, one thread
    python benchmarks/answers.py gpu                                  # a 3B shape in 4 bits with an adapter, 64 at once
    python benchmarks/answers.py evaluation --tokenizer FOLDER        # 200 rows of up to 512 tokens, before and after
    python benchmarks/answers.py same --model FILE.gguf --data FILE   # greedy replies of a real model, both ways

Each part is folded into nbs/results/answers.json (--out). `same` counts the replies that differ, and looks at the
place where they part: how far the two tokens' logits are from each other there. Its control is `generate` again, in
batches of a quarter. Without a GPU `same` is stored as `same_cpu_float32`,
or whatever the dtype is.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]  # not this folder: its gguf.py is not the library
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STORED = ROOT / "nbs" / "results" / "answers.json"


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=("cpu", "gpu", "evaluation", "same"))
    p.add_argument("--size", default="3b", help="shape of the parts gpu and evaluation")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt")
    p.add_argument("--tokens", type=int, default=256, help="tokens of a reply")
    p.add_argument("--rows", type=int, default=200)
    p.add_argument("--tokenizer", help="folder of a tokenizer with a chat template, for the part evaluation")
    p.add_argument("--model", help="a real model: folder, GGUF or Hub name")
    p.add_argument("--dtype", help="of the part same; default: by hardware")
    p.add_argument("--data", help="questions: JSON Lines with `question`")
    p.add_argument("--out", type=Path, default=STORED)
    return p.parse_args()


@contextlib.contextmanager
def as_before():
    "Answers by transformers' `generate` alone, as before `decode_batch` was there."
    from qlora_nb import generation

    before = generation._answer, generation.fast_layers, generation._default_rows
    generation._answer, generation.fast_layers = generation._generate, lambda model: contextlib.nullcontext()
    generation._default_rows = lambda model, longest, limit: generation.default_batch_size(model)
    try:
        yield
    finally:
        generation._answer, generation.fast_layers, generation._default_rows = before


def digest(replies):
    return hashlib.sha256("\0".join(reply.text for reply in replies).encode()).hexdigest()


def cpu(args):
    "The demo's 200 held-out questions by the run that comes with the package, both ways in turn."
    import tempfile

    import torch

    from qlora_nb import load_sft_dataset
    from qlora_nb.generation import generate_replies
    from qlora_nb.model import open_run
    from qlora_nb.run import copy_embedded_run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model, tokenizer = open_run(copy_embedded_run(place), load_in_4bit=True)
        questions = [row["messages"][:-1] for row in load_sft_dataset(split="heldout").select(range(args.rows))]
        found = {"generate": [], "decode": []}
        shas = {}
        for _ in range(4):  # the first of each warms up
            for arm, way in (("generate", as_before), ("decode", contextlib.nullcontext)):
                with way():
                    start = time.process_time()
                    replies = generate_replies(model, tokenizer, questions, max_new_tokens=112)
                    found[arm].append(time.process_time() - start)
                    shas[arm] = digest(replies)
    runs = [
        {
            "arm": arm,
            "rows": args.rows,
            "cpu_seconds": round(statistics.median(times[1:]), 3),
            "replies_sha256": shas[arm],
        }
        for arm, times in found.items()
    ]
    return {"threads": 1, "runs": runs}


def build(args, device):
    import torch
    from common import add_adapters, quantized_llama

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = add_adapters(quantized_llama(args.size, device, dtype), 16, False)
    chance = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.01, generator=chance)
    return model


def gpu(args):
    "Tokens a second of a shape with random weights, part by part."
    import torch

    from qlora_nb.decoding import decode_batch, dense_copies, plain_adapters
    from qlora_nb.generation import _generate, generation_mode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args, device)
    base, vocabulary = model.get_base_model(), model.config.vocab_size
    chance = torch.Generator().manual_seed(1)
    lengths = torch.randint(args.prompt // 2, args.prompt + 1, (args.batch,), generator=chance).tolist()
    rows = [torch.randint(5, vocabulary, (n,), generator=chance).tolist() for n in lengths]
    never, short = [vocabulary - 1], min(64, args.tokens)
    many = (rows * 4)[: 4 * args.batch]
    arms = {
        "generate": (lambda n: _generate(model, rows, n, never, 0), short, ()),
        "static": (lambda n: decode_batch(base, rows, n, never, 0, record=False), short, (plain_adapters,)),
        "dense": (lambda n: decode_batch(base, rows, n, never, 0, record=False), short, (plain_adapters, dense_copies)),
        "recorded": (lambda n: decode_batch(base, rows, n, never, 0), args.tokens, (plain_adapters, dense_copies)),
        f"recorded, batch {4 * args.batch}": (
            lambda n: decode_batch(base, many, n, never, 0), args.tokens, (plain_adapters, dense_copies)),
    }  # fmt: skip
    runs = []
    for arm, (answer, tokens, parts) in arms.items():
        with generation_mode(model), contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part(model))
            answer(8)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = answer(tokens)
            seconds = time.perf_counter() - start
        run = {"arm": arm, "size": args.size, "batch": len(found), "prompt": args.prompt, "tokens": tokens,
               "tokens_per_second": round(len(found) * len(found[0]) / seconds, 1)}  # fmt: skip
        if device == "cuda":
            run["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(run, flush=True)
        runs.append(run)
    return {"runs": runs}


def evaluation(args):
    "Seconds of an evaluation before and after, where no reply stops before its limit."
    import torch

    from qlora_nb.evaluation import before_and_after
    from qlora_nb.loading import load_tokenizer_and_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = build(args, device), load_tokenizer_and_config(args.tokenizer, None)[0]
    words = "the quick brown fox jumps over a lazy dog while it rains in Lisbon and nobody counts the steps".split()
    chance = torch.Generator().manual_seed(2)

    def text(n):
        return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=chance).tolist())

    rows = [
        {"messages": [{"role": "user", "content": text(150)}, {"role": "assistant", "content": text(100)}]}
        for _ in range(args.rows)
    ]
    start = time.perf_counter()
    before, after = before_and_after(model, tokenizer, rows, max_new_tokens=512)
    return {
        "rows": args.rows, "limit": 512, "size": args.size, "seconds": round(time.perf_counter() - start, 2),
        "tokens": sum(row["length"] for found in (before, after) for row in found.rows),
    }  # fmt: skip


def same(args):
    "Greedy replies of a real model with an adapter, by `generate` and by `decode_batch`."
    import torch

    from qlora_nb import add_lora, load_model
    from qlora_nb.generation import _answer, _generate, fast_layers, generation_mode
    from qlora_nb.template import prompt_ids

    model, tokenizer = load_model(args.model, backend="transformers", load_in_4bit=True, dtype=args.dtype)
    model = add_lora(model, r=16)
    chance = torch.Generator(model.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02, generator=chance)
    questions = [json.loads(line)["question"] for line in Path(args.data).read_text().splitlines()[: args.rows]]
    rows = [prompt_ids([{"role": "user", "content": question}], tokenizer) for question in questions]
    how = args.tokens, [tokenizer.eos_token_id], tokenizer.pad_token_id or 0
    found = {}
    arms = {
        "generate": (_generate, args.batch),
        "control": (_generate, max(1, args.batch // 4)),
        "decode": (_answer, args.batch),
    }
    with generation_mode(model):
        for arm, (way, size) in arms.items():
            start = time.perf_counter()
            with fast_layers(model) if arm == "decode" else contextlib.nullcontext():
                batches = [way(model, rows[i : i + size], *how) for i in range(0, len(rows), size)]
            found[arm] = [reply for batch in batches for reply in batch]
            found[arm + "_seconds"] = round(time.perf_counter() - start, 2)
        gaps = {arm: find_gaps(model, rows, found["generate"], found[arm], how[1][0]) for arm in ("decode", "control")}
    return {
        "model": Path(args.model).name, "dtype": str(model.dtype).removeprefix("torch."), "rows": len(rows),
        "tokens": args.tokens, "batch": args.batch, "different": len(gaps["decode"]), "gaps_in_logits": gaps["decode"],
        "control_batch": arms["control"][1], "control_different": len(gaps["control"]),
        "control_gaps_in_logits": gaps["control"],
        "generate_seconds": found["generate_seconds"], "decode_seconds": found["decode_seconds"],
    }  # fmt: skip


def find_gaps(model, rows, wanted, found, end):
    "Where a reply is another: by how much the two tokens' logits differ at that place, in one plain forward."
    import torch

    gaps = []
    for row, a, b in zip(rows, wanted, found):
        a, b = (reply[: reply.index(end) + 1] if end in reply else reply for reply in (a, b))
        if a != b:
            at = next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)) - 1)
            logits = model(torch.tensor([row + a[:at]], device=model.device)).logits[0, -1].float()
            gaps.append(round(float((logits[a[at]] - logits[b[at]]).abs()), 6))
    return sorted(gaps)


def main():
    args = arguments()
    import torch
    from common import gpu_name, versions

    found = {"cpu": cpu, "gpu": gpu, "evaluation": evaluation, "same": same}[args.part](args)
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    command = " ".join(
        ["python benchmarks/answers.py", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    )
    head = {"gpu": gpu_name("cuda") if torch.cuda.is_available() else None, "versions": versions(),
            "date": f"{datetime.date.today():%Y-%m-%d}", "command": command}  # fmt: skip
    if args.part == "gpu":
        stored = {**stored, **head, **found}
    else:
        where = (
            args.part if head["gpu"] or args.part == "cpu" else f"{args.part}_cpu_{found.get('dtype', '')}".rstrip("_")
        )
        stored[where] = {**head, **found}
    args.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(found)[:2000])


if __name__ == "__main__":
    main()
