"""What the project promises about faults, tried: kills, full disks, signals, power cuts and damaged files.

    python benchmarks/faults.py                             # all of it: about 1,000 cases, 80 CPU minutes
    python benchmarks/faults.py --limit 210 --write         # at most 210 of a part, spread over it: 50 CPU minutes
    python benchmarks/faults.py --part kills --limit 50     # of one part
    python benchmarks/faults.py --only "checkpoint-2/opt"   # cases whose name holds this, with what was seen
    python benchmarks/faults.py --list

A case takes two or three short trainings of the embedded model: some 5 CPU seconds. What was tried is kept in
build/faults.jsonl, and not tried again unless the code of the package has changed: stop it and start it as you like.
Counts go to nbs/results/faults.json once every part has been tried (with --write, whatever there is).
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.update(
    {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    | {"QLORA_NB_PROFILE": "tiny", "CUDA_VISIBLE_DEVICES": "", "UNSLOTH_DISABLE_STATISTICS": "1", "MPLBACKEND": "agg"}
)

import faults  # noqa: E402
import processes  # noqa: E402
from faults import sweeps  # noqa: E402

TRIED = ROOT / "build" / "faults.jsonl"
RESULTS = ROOT / "nbs/results/faults.json"


@functools.cache
def code_sha256():
    "What outcomes depend on: the package and the harness."
    files = [*(ROOT / "qlora_nb").rglob("*.py"), *(ROOT / "tests/faults").iterdir()]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and file.name != "_modidx.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_tried(any_code=False):
    "What was tried with this code, or with any: the newest row of each case."
    rows = [json.loads(line) for line in TRIED.read_text().splitlines()] if TRIED.exists() else []
    return {(row["part"], row["name"]): row for row in rows if any_code or row["code"] == code_sha256()}


def table(rows):
    "Counts: a line for each part and kind of fault, a column for each outcome."
    outcomes = [name for name in {**sweeps.KEPT, **sweeps.BROKEN} if any(row["outcome"] == name for row in rows)]
    counts = Counter((row["part"], row["kind"], row["outcome"]) for row in rows)
    lines = [f"{'part':<9}{'fault':<26}{'tried':>6}" + "".join(f"{name:>15}" for name in outcomes)]
    for part, kind in dict.fromkeys((row["part"], row["kind"]) for row in rows):
        numbers = [counts[part, kind, name] for name in outcomes]
        lines.append(f"{part:<9}{kind:<26}{sum(numbers):>6}" + "".join(f"{number or '':>15}" for number in numbers))
    return "\n".join(lines)


def write_results(rows):
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "peft", "trl", "safetensors")}
    counts = {}
    for row in rows:
        kinds = counts.setdefault(row["part"], {}).setdefault(row["kind"], {})
        kinds[row["outcome"]] = kinds.get(row["outcome"], 0) + 1
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/faults.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "system": platform.system()} | versions,
        "kept": sweeps.KEPT,
        "broken": sweeps.BROKEN,
        "stages": dict(Counter(f"{row['part']}: {row['stage']}" for row in rows)),
        "counts": counts,
        "failures": [f"{row['outcome']}: {row['name']}" for row in rows if row["outcome"] in sweeps.BROKEN],
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in rows) / 60, 1),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sweeps.PARTS, action="append", help="one part; again for more; default: all")
    parser.add_argument("--limit", type=int, help="of each part, spread over it")
    parser.add_argument("--only", default="", help="cases whose name holds this text; always tried, and told at length")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--write", action="store_true", help="write the results, whatever was tried")
    parser.add_argument("--any-code", action="store_true", help="count what was tried before the code changed, too")
    args = parser.parse_args()
    if not faults.library():
        sys.exit("there is no C compiler (cc) here, or this isn't Linux")
    sweeps.KEEP = ROOT / "build" / "faults" / code_sha256()[:12]
    tried, began, rows = read_tried(args.any_code), time.time(), []
    TRIED.parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for part in args.part or sweeps.PARTS:
        cases = [case for case in sweeps.PARTS[part]() if args.only in case.name]
        cases = sweeps.spread(cases, args.limit) if args.limit else cases
        if args.list:
            print("\n".join(f"{part}: {case.name}" for case in cases))
            continue
        for n, case in enumerate(cases, 1):
            if not args.only and (row := tried.get((part, case.name))):
                rows.append(row)
                continue
            if args.minutes and time.time() - began > 60 * args.minutes:
                break
            before = processes.spent
            outcome, seen = case.play()
            row = {"part": part, "stage": case.stage, "name": case.name, "kind": case.kind, "outcome": outcome}
            row |= {"seen": seen[-2000:], "cpu_seconds": round(processes.spent - before, 2), "code": code_sha256()}
            rows.append(row)
            with open(TRIED, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            good = outcome in sweeps.KEPT
            print(
                f"{part} {n}/{len(cases)} {outcome:<13} {case.name}" + ("" if good and not args.only else f"\n{seen}"),
                flush=True,
            )
    if rows:
        print(table(rows))
    if args.write or not (args.part or args.limit or args.only or args.list or args.minutes):
        order = list(sweeps.PARTS)
        write_results(sorted(read_tried(args.any_code).values(), key=lambda row: order.index(row["part"])))
    sys.exit(any(row["outcome"] in sweeps.BROKEN for row in rows))


if __name__ == "__main__":
    main()
