"""Runs that are stopped, killed or starved on a GPU, and resumed by the command that their own last sentence names.

The embedded model in NF4, trained by the command line with the engine. One run goes through undisturbed, a second one
shows whether this card repeats its bytes at all. The others end by a signal, by SIGKILL in the middle of a checkpoint
and in random steps, and by a disk that takes no more. What each comes to is compared with the
undisturbed run: the adapter's sha256, the loss of each step, the held-out figures.

    python benchmarks/gpu/faults.py nbs/results/faults_gpu.json
    python benchmarks/gpu/faults.py out.json --cpu --steps 40 --jobs 1      (dry run)

Needs Linux, no network, and no C compiler: a full disk is a limit on what a file may hold, set while the run goes on.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from common import write

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 150  # seconds for one command
SECONDS = 0.001  # between two looks at a run's folder


class Command:
    "A command of qlora_nb in a folder; what it says goes through pipes, which a limit on files doesn't touch."

    def __init__(self, *words, place, env):
        self.words, self.place, self.started = [str(word) for word in words], place, time.time()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-m", "qlora_nb", *self.words], cwd=place, env=env, **pipes)

    def wait_until(self, seen):
        "Wait until something is seen. Return whether it was, before the command ended."
        while self.process.poll() is None and time.time() - self.started < LIMIT:
            if seen():
                return True
            time.sleep(SECONDS)
        return False

    def send(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self):
        "Wait for its end: (exit code, last line of stderr without the folder's name, seconds)."
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            err += f"\nstuck: took more than {LIMIT} s"
        if "Traceback (most recent call last)" in err:
            print(err, file=sys.stderr)
        lines = [line for line in re.split(r"[\r\n]", err) if line.strip()]
        said = lines[-1].strip().replace(f"{self.place}/", "") if lines and self.process.returncode > 0 else ""
        return self.process.returncode, said, round(time.time() - self.started, 1)


def command_in(sentence):
    "The command that a sentence names; None where it names none."
    found = re.search(r"qlora_nb (train --resume [^\s;(]+)", sentence)
    return shlex.split(found[1]) if found else None


def lines_of(file):
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def outcome_of(run):
    "What a finished run is: (adapter's sha256, loss by step, held-out figures)."
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    sha = hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    if sha != summary["adapter_sha256"]:
        raise SystemExit(f"{run}: the adapter is not the one that summary.json records")
    losses = {row["step"]: row["loss"] for row in map(json.loads, lines_of(run / "metrics.jsonl"))}
    return sha, losses, summary["after"]


# --- how a run ends: given the command and the run's folder; each returns what was done ----------------------------


def at_step(number, step, twice=False):
    "A signal after a step, or two of them."

    def end(command, run):
        command.wait_until(lambda: len(lines_of(run / "metrics.jsonl")) >= step)
        if number == signal.SIGKILL:
            time.sleep(random.random() / 20)  # anywhere in a step, or two
        command.send(number)
        if twice:
            time.sleep(0.01)
            command.send(number)
        return f"after step {step}"

    return end


def in_checkpoint(step):
    "SIGKILL as soon as the optimizer's file of a checkpoint is there: its manifest comes last."

    def end(command, run):
        checkpoint = run / f"checkpoints/checkpoint-{step}"
        command.wait_until((checkpoint / "optimizer.pt").exists)
        command.send(signal.SIGKILL)
        command.process.wait()
        left = "whole" if (checkpoint / "manifest.json").exists() else "torn"
        return f"while checkpoint-{step} was written: it is {left}"

    return end


def when_full(step, most=1000):
    "No file may become larger, from a step on: what the run appends and its next checkpoint meet a full disk."

    def end(command, run):
        command.wait_until(lambda: len(lines_of(run / "metrics.jsonl")) >= step)
        if command.process.poll() is None:
            resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (most, most))
        return f"from step {step} on no file may hold more than {most} bytes"

    return end


def by_itself(command, run):
    return "by itself"


# --- a case ---------------------------------------------------------------------------------------------------------


def train_words(args):
    words = ["train", "--model", "qlora_nb:embedded", "--load-in-4bit", "--max-steps", args.steps, "--eval-rows", 4]
    words += ["--save-steps", args.steps // 4, "--max-new-tokens", 8, "--limit", 400, "--output", "run"]
    return words if args.cpu else [*words, "--engine"]


def play(name, end, codes, args, env, whole):
    "Start a run, end it, go on until it is finished: a row of the result."
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        run, place = pathlib.Path(place) / "run", pathlib.Path(place)
        command = Command(*train_words(args), place=place, env=env)
        ended = end(command, run)
        code, said, seconds = command.end()
        saved = sorted(int(path.parent.name[11:]) for path in run.glob("checkpoints/checkpoint-*/manifest.json"))
        row = {"case": name, "ended": ended, "exit": code, "expected": code in codes, "said": said, "seconds": seconds}
        row |= {"steps_done": len(lines_of(run / "metrics.jsonl")), "checkpoints": saved, "commands": []}
        following = command_in(said) or ["train", "--resume", "run"]  # SIGKILL leaves no sentence
        row["named"] = bool(command_in(said)) or code in (0, -signal.SIGKILL)
        while code and len(row["commands"]) < 3:
            command = Command(*following, place=place, env=env)
            code, said, seconds = command.end()
            words = shlex.join(command.words).replace(f"{place}/", "")
            row["commands"].append({"command": words, "exit": code, "said": said if code else "", "seconds": seconds})
            following = command_in(said) or [str(word) for word in train_words(args)]
        if (run / "summary.json").exists():
            row |= compare(outcome_of(run), whole or outcome_of(run))
        return row


def compare(found, whole):
    "What an outcome has in common with that of the undisturbed run."
    losses = [abs(found[1].get(step, float("inf")) - loss) for step, loss in whole[1].items()]
    return {
        "adapter_sha256": found[0], "same_bytes": found[0] == whole[0], "same_steps": list(found[1]) == list(whole[1]),
        "largest_difference_of_losses": max(losses), "same_held_out_figures": found[2] == whole[2],
    }  # fmt: skip


def cases(args):
    "(name, how it ends, exit codes)."
    quarter, dice = args.steps // 4, random.Random(0)
    return [
        ("not disturbed", by_itself, (0,)),
        ("SIGTERM", at_step(signal.SIGTERM, quarter + 2), (143,)),
        ("SIGUSR1", at_step(signal.SIGUSR1, 2 * quarter + 1), (138,)),
        ("SIGINT", at_step(signal.SIGINT, 3), (130,)),
        ("SIGINT twice", at_step(signal.SIGINT, 2 * quarter + 2, twice=True), (130,)),
        ("SIGKILL in a checkpoint", in_checkpoint(quarter), (-9,)),
        ("SIGKILL in a checkpoint", in_checkpoint(3 * quarter), (-9,)),
        *(("SIGKILL", at_step(signal.SIGKILL, dice.randrange(2, 3 * quarter)), (-9,)) for _ in range(3)),
        ("full disk", when_full(quarter + 1), (2,)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--cpu", action="store_true", help="a dry run, without the engine")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a script in the background ignores it, and so would its runs
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "2"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if args.cpu else {}
    device, began, rows = "cpu" if args.cpu else "cuda", time.time(), []

    def add(row):
        rows.append(row)
        left = {name: value for name, value in row.items() if name not in ("case", "commands", "adapter_sha256")}
        print(f"{row['case']}: {left} {row['commands']}", flush=True)
        write(args.out, device, rows, seconds=round(time.time() - began, 1), way=way)

    with tempfile.TemporaryDirectory(prefix="faults-") as place:  # the run that the others are compared with
        place = pathlib.Path(place)
        command = Command(*train_words(args), place=place, env=env)
        code, said, seconds = command.end()
        if code:
            sys.exit(f"the undisturbed run failed: {code}, {said}")
        whole = outcome_of(place / "run")
        config = (place / "run/config.yaml").read_text(encoding="utf-8")
    recorded = ("backend", "engine", "load_in_4bit", "optim", "dtype", "trained_by")
    way = {name: re.search(rf"^{name}: (.*)$", config, re.M)[1] for name in recorded}
    way |= {"steps": args.steps, "whole": {"seconds": seconds, "adapter_sha256": whole[0]}}
    chosen = [case for case in cases(args) if not args.only or args.only in case[0]]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [(case, pool.submit(play, *case, args, env, whole)) for case in chosen]
        for case, future in futures:
            try:
                add(future.result())
            except Exception as error:  # the others count all the same
                add({"case": case[0], "error": f"{type(error).__name__}: {error}", "expected": False, "commands": []})
    good = [row for row in rows if row["expected"] and row["named"] and row.get("same_steps") and row.get("same_bytes")]
    print(f"{len(good)} of {len(rows)} ended as expected, named the way on, and have the bytes of the undisturbed run")
    sys.exit(len(good) < len(rows))


if __name__ == "__main__":
    main()
