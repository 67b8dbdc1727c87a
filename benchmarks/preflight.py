"""How long the preflight takes beside the tokenizer alone, and whether its memory grows with the rows.

`check_dataset` (one call over all rows, streamed) and the tokenizer's own batched call get the same rows of about 600
tokens in one process, with one thread. They take turns, so that a slow minute of the machine falls on both, and the
seconds are those of the CPU, so that other processes don't count. The tokenizer gets rendered texts, so rendering
counts against the preflight alone. Each part is a pair; `times` is what the preflight takes, with the tokenizer as 1.

    python benchmarks/preflight.py                          # 20,000 rows; about two minutes on 2 CPU cores
    python benchmarks/preflight.py --rows 5000              # in a moment
    python benchmarks/preflight.py --memory                 # peak memory of 20,000 and 300,000 short streamed rows
    python benchmarks/preflight.py --out nbs/results/preflight.json    # both, each in a process of its own
"""

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WORDS = (
    "the of a number sum is then we have so first add take from it gives seven apples train hours Mia Tom how many left"
    "".split()
)
PART = 2500  # rows of a turn


def row(i, rng):
    "A row of about 600 tokens of the embedded vocabulary, different from all others."

    def text(n):
        return " ".join(str(rng.randrange(1000)) if rng.random() < 0.2 else rng.choice(WORDS) for _ in range(n))

    reply = f"<think>\n{text(100)}.\n{text(100)}.\n</think>\n\nThe answer is {i}."
    return [{"role": "user", "content": f"{i}: {text(82)}?"}, {"role": "assistant", "content": reply}]


def tokenizer():
    from transformers import AutoTokenizer

    from qlora_nb.core import EMBEDDED_MODEL

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


class Turns:
    "Streamed rows; before `check_dataset` gets a part of them, the tokenizer alone has its turn on the same part."

    def __init__(self, rows, tok):
        self.rows, self.tok, self.tokens = rows, tok, 0
        self.pairs = []  # seconds of the tokenizer and of the preflight, for each part

    def iter(self, size):
        rng = random.Random(0)
        for first in range(0, self.rows, PART):
            part = [row(i, rng) for i in range(first, min(first + PART, self.rows))]
            texts = [self.tok.apply_chat_template(messages, tokenize=False) for messages in part]
            start = time.process_time()
            ids = self.tok(texts, add_special_tokens=False)["input_ids"]
            seconds = time.process_time() - start
            self.tokens += sum(map(len, ids))
            del ids, texts
            start = time.process_time()
            for place in range(0, len(part), size):
                yield {"messages": part[place : place + size]}
            self.pairs.append((seconds, time.process_time() - start))


def speed(rows, max_length=2048):
    "CPU seconds of both over `rows` rows, and how many times the tokenizer's the preflight's are, in all and by part."
    from qlora_nb.preflight import check_dataset

    tok = tokenizer()
    check_dataset(Turns(50, tok), tok, max_length)
    turns = Turns(rows, tok)
    report = check_dataset(turns, tok, max_length)
    alone, checked = map(sum, zip(*turns.pairs))
    assert report.summary["tokens"] == turns.tokens and report.findings == []
    return {
        "rows": rows, "tokens_per_row": round(turns.tokens / rows, 1),
        "tokenizer_cpu_seconds": round(alone, 2), "preflight_cpu_seconds": round(checked, 2),
        "times": round(checked / alone, 2), "times_by_part": [round(b / a, 2) for a, b in turns.pairs],
    }  # fmt: skip


def peak():
    "The most memory that this process has held, in MiB (Linux)."
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def streamed(count):
    "Peak memory after looking at `count` short streamed rows, every fiftieth of which has an empty reply."
    from datasets import IterableDataset

    from qlora_nb.preflight import check_dataset

    def rows():
        for i in range(count):
            question = {"role": "user", "content": f"What is {i} + {i}?"}
            reply = f"It is {2 * i}." if i % 50 else ""
            yield {"messages": [question, {"role": "assistant", "content": reply}]}

    report = check_dataset(IterableDataset.from_generator(rows), tokenizer())
    assert report.summary["rows"] == count and report.invalid_rows == [*range(0, count, 50)]
    return peak()


def memory(counts):
    "Peak memory for each count, each in a process of its own."
    found = {}
    for count in counts:
        done = subprocess.run(
            [sys.executable, __file__, "--streamed", str(count)], capture_output=True, text=True, check=True
        )
        found[f"{count}_rows_peak_mib"] = round(float(done.stdout), 1)
    return found


def everything(rows, counts, path):
    "Speed and memory, each in a process of its own; written to `path`."
    from qlora_nb.core import library_versions

    runs = []
    for arguments in (["--rows", rows], ["--memory", "--counts", *counts]):
        command = [sys.executable, __file__, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
        print(done.stdout, end="", file=sys.stderr)
    versions = {
        name: v for name, v in library_versions().items() if name in ("python", "qlora_nb", "transformers", "datasets")
    }
    command = " ".join(["python", "benchmarks/preflight.py", *sys.argv[1:]])
    result = {"gpu": None, "versions": versions, "date": str(datetime.date.today()), "command": command, "runs": runs}
    Path(path).write_text(json.dumps(result, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--memory", action="store_true", help="measure memory in place of speed")
    parser.add_argument("--counts", type=int, nargs="*", default=[20_000, 300_000])
    parser.add_argument("--out", help="measure all, and write it to this file")
    parser.add_argument("--streamed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.streamed:
        print(streamed(args.streamed))
        return
    if args.out:
        everything(args.rows, args.counts, args.out)
        return
    result = memory(args.counts) if args.memory else speed(args.rows)
    parallel = os.environ["TOKENIZERS_PARALLELISM"]
    print(json.dumps({**result, "cores": os.cpu_count(), "tokenizers_parallelism": parallel}))


if __name__ == "__main__":
    main()
