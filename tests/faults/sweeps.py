"""Every fault that the project promises to survive, as cases; what each came to, by a rule.

A case starts from a folder that some commands have made (`Stage`), makes one fault, goes on as its user would (the same
command again, then whatever command the message names), and compares what is there with a run that had no fault.
"""

import contextlib
import functools
import hashlib
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import processes
import psutil

import faults
from faults import Fault

SMALL = shlex.split(
    "--limit 40 --per-device-train-batch-size 2 --r 2 --target-modules q_proj,v_proj --max-new-tokens 8"
)
STEPS = [*SMALL, "--max-steps", "4", "--save-steps", "2"]
TRAIN = ["train", *STEPS, "--eval-rows", "0", "--output", "run"]
EVALUATED = ["train", *STEPS, "--eval-rows", "1", "--output", "run"]
LONGER = ["train", *SMALL, "--max-steps", "6", "--save-steps", "2", "--eval-rows", "0", "--output", "run"]
EXPORT = ["export", "run", "--quantization", "q8_0"]
CERTIFY = ["certify", "run", "--rows", "1", "--max-new-tokens", "0"]
CHAT = ["chat", "run", "--message", "What is 2 + 3?", "--temperature", "0", "--max-new-tokens", "4"]
LIMIT = 300  # seconds for one command, on a machine that has other things to do

# What a case comes to. The first group is what is promised.
KEPT = {
    "same bytes": "went on to the bytes of an undisturbed run",
    "named": "found, named with its file, and nothing of it used",
    "harmless": "nothing that was read, or said, had to do with it",
    "not reached": "the command was through before it",
}
BROKEN = {
    "other bytes": "went on in silence to other weights",
    "other figures": "went on in silence to other metrics, answers or records",
    "unnamed": "refused without the file, or a way on",
    "traceback": "a traceback",
    "left over": "something of the dead process stayed behind",
    "dead end": "no command that a message named went on",
    "stuck": f"took more than {LIMIT} s",
}


@dataclass(frozen=True)
class Case:
    part: str  # kills, signals, full, power or damages
    stage: str  # what the fault happened in
    name: str  # unique within its part
    kind: str  # of the fault, for the table
    play: Callable[[], tuple[str, str]]  # -> (outcome, what was seen)


# --- folders to start from --------------------------------------------------------------------------------------------


KEEP = None  # a folder in which such folders stay for the next process; None: temporary ones


@functools.cache
def made_by(*commands: tuple[str, ...]) -> Path:
    "A folder in which these commands ran; it is copied, never used. Beside it: events and texts of the last one."
    if KEEP:
        place = Path(KEEP) / hashlib.sha256(repr(commands).encode()).hexdigest()[:12]
        if place.with_suffix(".json").exists():
            return place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    else:
        place = Path(tempfile.mkdtemp(prefix="stage-"))
    if commands:
        shutil.copytree(made_by(*commands[:-1]), place, dirs_exist_ok=True)
        done = faults.run(*commands[-1], cwd=place, timeout=LIMIT)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(commands[-1])}: {done.stderr[-2000:]}")
        place.with_suffix(".json").write_text(json.dumps([vars(event) for event in done.events]))
    return place


def events_of(*commands) -> list[faults.Event]:
    "What the last of these commands does to files, without a fault."
    rows = json.loads(made_by(*commands).with_suffix(".json").read_text())
    return [faults.Event(**row) for row in rows]


@functools.cache
def stopped() -> Path:
    "A folder with a run of six steps that died after the checkpoint of step 4."
    events = events_of(tuple(LONGER))
    at = next(n for n, event in enumerate(events, 1) if "checkpoint-6" in event.path)
    place = Path(tempfile.mkdtemp(prefix="stage-"))
    done = faults.run(*LONGER, cwd=place, fault=Fault("kill", at), timeout=LIMIT)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run was to die at event {at}: {done.returncode}, {done.stderr[-500:]}")
    shutil.rmtree(place / "run/checkpoints/checkpoint-6", ignore_errors=True)
    return place


class Copy:
    "A copy of a folder to make a fault in; it goes when the case is over."

    def __init__(self, source: Path | None = None):
        self.source = source

    def __enter__(self) -> Path:
        self.place = Path(tempfile.mkdtemp(prefix="case-"))
        if self.source:
            shutil.copytree(self.source, self.place, dirs_exist_ok=True)
        return self.place

    def __exit__(self, *_):
        shutil.rmtree(self.place, ignore_errors=True)


# --- what is there at the end -----------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(path: Path) -> dict:
    "What a JSON file holds; of a damaged one, its text."
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "{}"
    try:
        return found if isinstance(found := json.loads(text), dict) else {"text": text}
    except ValueError:
        return {"text": text}


def _rows(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return [{"step": line} for line in lines]


def bytes_of(run: Path) -> dict:
    "The sha256 of all that is served: the adapter's weights and the exported files."
    files = [run / "adapter/adapter_model.safetensors", *run.glob("*.gguf")]
    return {file.name: sha256(file) for file in files if file.exists()}


def figures_of(run: Path) -> dict:
    "What a finished run says, without times and paths."
    summary, certificate = _json(run / "summary.json"), _json(run / "certificate.json")
    return {
        "metrics": [
            (row.get("step"), row.get("loss"), row.get("learning_rate")) for row in _rows(run / "metrics.jsonl")
        ],
        "replies": [(row.get("stage"), row.get("reply"), row.get("tokens")) for row in _rows(run / "evaluation.jsonl")],
        "summary": {
            name: summary.get(name) for name in ("steps", "mean_loss", "last_loss", "before", "after", "adapter_sha256")
        },
        "held out": sha256(run / "heldout.jsonl") if (run / "heldout.jsonl").exists() else None,
        "verdict": certificate.get("passed", certificate.get("verdict")),
        "Modelfile": sha256(run / "Modelfile") if (run / "Modelfile").exists() else None,
    }


def names_of(run: Path) -> set[str]:
    "Its files, but a lock's, what was set aside as damaged, and those of checkpoints that have their proper names."
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    other = re.compile(r"(^|/)(\.lock$|damaged-)|^checkpoints/checkpoint-\d+/[^.][^/]*$")
    return {name for name in names if not other.search(name)}


def is_complete(run: Path, like: Path) -> bool:
    return names_of(like) <= names_of(run)


def differences(run: Path, like: Path) -> tuple[str, str] | None:
    "(outcome, what) where a run differs from one without a fault."
    if (found := bytes_of(run)) != (wanted := bytes_of(like)):
        return "other bytes", ", ".join(
            sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        )
    found, wanted = figures_of(run), figures_of(like)
    if found != wanted:
        return "other figures", "; ".join(
            f"{name}: {found[name]} for {wanted[name]}"[:300] for name in found if found[name] != wanted[name]
        )
    if extra := names_of(run) - names_of(like):
        return "left over", ", ".join(sorted(extra))
    return None


# --- what is said -----------------------------------------------------------------------------------------------------


def sentence(text: str) -> str:
    "The last line of stderr; a progress bar before it on its line is left out."
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1].strip() if lines else ""


def commands_in(text: str) -> list[list[str]]:
    "The commands that a message names."
    found, text = [], re.sub(r"Do it again.*", "", text)  # a line of the report
    for part in re.findall(r"qlora_nb ((?:train|export|certify|report|modelfile)\b[^\n]*)", text):
        for one in re.split(r"&& qlora_nb |&& ", re.split(r"[(;,]|: |\. |\.$| and | or ", part)[0]):
            try:
                words = shlex.split(one)
            except ValueError:
                continue
            if words and not any(word.startswith(("…", "...")) or word.isupper() for word in words[1:2]):
                found.append([word.strip("`") for word in words])
    return found


def fault_in(done: subprocess.CompletedProcess) -> tuple[str, str] | None:
    "What no command may do, whatever happened to it."
    if "Traceback (most recent call last)" in done.stderr + done.stdout:
        return "traceback", done.stderr[-700:]
    if done.returncode == 2 and not sentence(done.stderr).startswith("qlora_nb: "):
        return "unnamed", done.stderr[-700:]
    return None


# --- going on ---------------------------------------------------------------------------------------------------------


def go_on(place: Path, like: Path, first: list[list[str]]) -> tuple[str, str]:
    "Give these commands, then those that messages name, until the run is whole; say what it came to."
    queue, tried, said = list(first), [], ""
    while queue and len(tried) < 6:
        if (command := queue.pop(0)) in tried:
            continue
        tried.append(command)
        done = faults.run(*command, cwd=place, timeout=LIMIT)
        if bad := fault_in(done):
            return bad[0], f"{shlex.join(command)}: {bad[1]}"
        said += f"{shlex.join(command)} → {done.returncode} {sentence(done.stderr)[:400]}\n"
        queue = commands_in(done.stderr) + queue
        through = done.returncode == 0 or "is finished" in sentence(
            done.stderr
        )  # to go on with it is the user's choice
        if through and is_complete(place / "run", like / "run"):
            break
    if not is_complete(place / "run", like / "run"):
        missing = sorted(names_of(like / "run") - names_of(place / "run"))
        return "dead end", f"{said}missing: {', '.join(missing[:6])}"
    different = differences(place / "run", like / "run")
    return (different[0], f"{different[1]}\n{said}") if different else ("same bytes", said)


def ways_on(command: list[str]) -> list[list[str]]:
    "What a user types after it died."
    return [["train", "--resume", "run"], command] if command[0] == "train" else [command]


def guarded(play):
    "A case's outcome; running into the time limit is one."

    def guard(*args):
        try:
            return play(*args)
        except subprocess.TimeoutExpired as error:
            return "stuck", f"{error.cmd[1:]}"

    return guard


@guarded
def play_fault(before: tuple, command: tuple, fault: Fault) -> tuple[str, str]:
    "Kill, stop or starve a command at an event."
    like = made_by(*before, command)
    with Copy(made_by(*before)) as place:
        done = faults.run(*command, cwd=place, fault=fault, timeout=LIMIT)
        if bad := fault_in(done):
            return bad[0], f"{fault}: {bad[1]}"
        said = f"{fault} → {done.returncode} {sentence(done.stderr)[:400]}\n"
        if done.returncode == 0 and fault.mode in ("kill", "tear"):
            return "not reached", said
        if fault.mode == "full" and not (wrong := starved(done, fault)):
            return "unnamed", said
        whole = is_complete(place / "run", like / "run")
        if fault.mode == "signal" and (wrong := unheard(done, fault.number, whole)):
            return wrong, said
        outcome, more = go_on(place, like, commands_in(done.stderr) + ways_on(list(command)))
        return outcome, said + more


def starved(done, fault) -> bool:
    "Whether a full disk was said to be one: in the last line, with exit 2; or on stderr where the run itself is whole."
    words = re.search(r"no space|space left|disk is full|quota|free some", done.stderr, re.I)
    return bool(words) and (done.returncode == 2 or done.returncode == 0 and bool(commands_in(done.stderr)))


def unheard(done, number, whole: bool) -> str | None:
    """What is wrong with how a command ended that got a signal.

    It is to say how to go on, and be it by starting again; or, where nothing is left to do, that.
    """
    if done.returncode == 0:
        return None  # it was through
    way = commands_in(done.stderr) or re.search(r"start again|same command|repeat", done.stderr)
    way = way or whole and re.search(r"is finished$|(is|are) complete$", sentence(done.stderr))
    return None if done.returncode == 128 + number and way else "unnamed"


@guarded
def play_moment(before: tuple, command: tuple, part: float, number: int) -> tuple[str, str]:
    "A signal after a part of the CPU time that the command takes."
    like, moment = made_by(*before, command), part * usual_seconds(before, command)
    with Copy(made_by(*before)) as place:
        process = faults.start(*command, cwd=place)
        while process.poll() is None and cpu_seconds(process.pid) < moment:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(number)
        out, err = process.communicate(LIMIT)
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if bad := fault_in(done):
            return bad
        said = f"{signal.Signals(number).name} at {part:.0%} of the time → {done.returncode} {sentence(err)[:400]}\n"
        if done.returncode == 0:
            different = differences(place / "run", like / "run")
            return different or ("not reached", said)
        begun = names_of(place) != names_of(made_by(*before))
        if done.returncode == -number != -signal.SIGKILL and not begun:
            return "not reached", said  # before the command answered signals
        whole = is_complete(place / "run", like / "run")
        if number != signal.SIGKILL and (wrong := unheard(done, number, whole)):
            return wrong, said
        outcome, more = go_on(place, like, commands_in(err) + ways_on(list(command)))
        return outcome, said + more


@functools.cache
def usual_seconds(before, command) -> float:
    "Of CPU: other things that the machine does don't count."
    with Copy(made_by(*before)) as place:
        started = processes.spent
        faults.run(*command, cwd=place, timeout=LIMIT)
        return processes.spent - started


def cpu_seconds(pid) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return float("inf")


# --- the power goes ---------------------------------------------------------------------------------------------------


def unsynced(events: list[faults.Event]) -> dict[str, int]:
    """Files with bytes that were written after their last fsync, and how many there were at that fsync.

    What a power cut may take: a file system keeps the order of names, not that of bytes.
    """
    size, safe = {}, {}
    for event in events:
        if event.kind == "open":
            size.setdefault(event.path, 0)
        elif event.kind in ("write", "map"):
            size[event.path] = size.get(event.path, 0) + event.bytes
        elif event.kind == "sync" and event.path in size:
            safe[event.path] = size[event.path]
        elif event.kind in ("unlink", "rename"):
            for table in (size, safe):
                for old in [name for name in table if f"{name}/".startswith(f"{event.path}/")]:
                    value = table.pop(old)
                    if event.kind == "rename":
                        table[event.to + old[len(event.path) :]] = value
    return {name: safe.get(name, 0) for name in size if size[name] > safe.get(name, 0)}


def cut_power(place: Path, events: list[faults.Event], zeros: bool) -> list[str]:
    "Take the bytes that were not synced: the file ends before them, or has zeros in their place. Return the files."
    lost = []
    for name, safe in unsynced(events).items():
        if not (file := place / name).is_file() or file.stat().st_size <= safe:
            continue
        size = file.stat().st_size
        with open(file, "r+b") as opened:
            opened.truncate(safe)
            if zeros:
                opened.truncate(size)
        lost.append(name)
    return lost


def synced_before_named(events: list[faults.Event]) -> list[str]:
    "Renames to a name that lasts of what wasn't synced before, or whose folder wasn't synced after."
    wrong = []
    for n, event in enumerate(events):
        if event.kind != "rename" or Path(event.to).name.startswith("."):
            continue
        if [name for name in unsynced(events[:n]) if f"{name}/".startswith(f"{event.path}/")]:
            wrong.append(f"{event.to} got its name before its bytes were synced")
        folder = str(Path(event.to).parent)
        if not any(later.kind == "sync" and later.path == folder for later in events[n:]):
            wrong.append(f"{folder} was not synced after {event.to} got its name")
    return wrong


@guarded
def play_power(command: tuple, at: int, zeros: bool) -> tuple[str, str]:
    "The power goes at an event."
    like = made_by(command)
    with Copy() as place:
        done = faults.run(*command, cwd=place, fault=Fault("kill", at), timeout=LIMIT)
        if done.returncode != -signal.SIGKILL:
            return "not reached", f"exit {done.returncode}"
        lost = cut_power(place, done.events[:-1], zeros)
        outcome, said = go_on(place, like, ways_on(list(command)))
        if outcome == "other figures" and any(Path(name).name in said for name in lost):
            outcome = "named"
        return outcome, f"{'zeros in' if zeros else 'lost bytes of'} {', '.join(lost) or 'nothing'}\n{said}"


# --- damage -----------------------------------------------------------------------------------------------------------


DAMAGES = ("half", "empty", "zeros", "flip 1", "flip 2", "flip 3", "gone", "swapped")


def damage(file: Path, how: str, other: Path | None) -> bool:
    "Damage a file; False where that changes nothing."
    old = file.read_bytes()
    new = bytearray(old)
    if how == "half":
        new = new[: len(new) // 2]
    elif how == "empty":
        new = bytearray()
    elif how == "zeros":
        new = bytearray(len(new))
    elif how.startswith("flip") and new:
        place = random.Random(f"{file.name} {how}").randrange(len(new))
        new[place] ^= 1 << random.Random(how).randrange(7)
    elif how == "swapped" and other and other.exists():
        new = bytearray(other.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(new)
    return how == "gone" or bytes(new) != old


def is_named(file: str, text: str) -> bool:
    "Whether a message is about this file: by its name, or by the checkpoint or adapter that it is part of."
    path = Path(file)
    return any(name in text for name in (path.name, str(path), *(p for p in path.parts if p.startswith("checkpoint-"))))


@functools.cache
def other_run() -> Path:
    "A run with other bytes, and files of the same names."
    return made_by(tuple([*LONGER, "--seed", "7", "--random-state", "7"]))


@guarded
def play_damaged_stop(file: str, how: str) -> tuple[str, str]:
    "Resume a stopped run of which a file is damaged."
    with Copy(stopped()) as place:
        if not damage(place / file, how, other_run() / file):
            return "not reached", "the same bytes"
        said, like, commands = "", made_by(tuple(LONGER)), [["train", "--resume", "run"]]
        for _ in range(2):  # the second is what the first one's refusal names
            done = faults.run(*commands[0], cwd=place, timeout=LIMIT)
            if bad := fault_in(done):
                return bad
            said += f"{shlex.join(commands[0])} → {done.returncode} {done.stderr[-600:]}\n"
            if done.returncode or not (commands := commands_in(done.stderr)):
                break
        if done.returncode:
            return ("named" if is_named(file, said) else "unnamed"), said
        if not (different := differences(place / "run", like / "run")):
            return "same bytes", said
        found = "named" if is_named(file, said) and different[0] != "other bytes" else different[0]
        return found, f"{different[1]}\n{said}"


READERS = {
    "chat": CHAT,
    "export": EXPORT,
    "certify": CERTIFY,
    "report": ["report", "run"],
    "diagnose": ["diagnose", "run"],
}
WHOLE = (tuple(EVALUATED), tuple(EXPORT), tuple(CERTIFY))  # a run with all that it can have


def spoken(text: str) -> str:
    "A text without what differs from run to run: times, seconds, folders."
    text = re.sub(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::[\d.]+)?\S*)?", "DATE", text)
    return re.sub(r"[\d.,]+ ?(?:s|ms|tokens/s|steps?/s|MB/s|GB)\b|/tmp/\S+|\bin [\d.]+", "N", text)


def shown_by(place: Path, command: list[str], done) -> dict:
    "What a reader of a finished run made of it."
    run = place / "run"
    found = {"code": done.returncode, "said": spoken(done.stdout)} | bytes_of(run)
    if command[0] == "report":
        found |= {
            name: spoken((run / name).read_text(errors="replace"))
            for name in ("report.md", "report.html")
            if (run / name).exists()
        }
    if command[0] == "certify":
        found["verdict"] = figures_of(run)["verdict"]
    return found


@functools.cache
def shown_whole(reader: str, whole: tuple) -> dict:
    with Copy(made_by(*whole)) as place:
        return shown_by(place, READERS[reader], faults.run(*READERS[reader], cwd=place, timeout=LIMIT))


@guarded
def play_damaged_run(file: str, how: str, reader: str, whole: tuple = WHOLE) -> tuple[str, str]:
    "Read a finished run of which a file is damaged."
    with Copy(made_by(*whole)) as place:
        if not damage(place / file, how, other_run() / file):
            return "not reached", "the same bytes"
        damaged = bytes_of(place / "run")
        done = faults.run(*READERS[reader], cwd=place, timeout=LIMIT)
        if bad := fault_in(done):
            return bad
        said = f"{reader} → {done.returncode} {done.stderr[-500:]}\n{done.stdout[-300:]}"
        found, wanted = shown_by(place, READERS[reader], done), shown_whole(reader, whole)
        pages = "".join(found.get(name, "") for name in ("report.md", "report.html"))
        if is_named(file, done.stderr + done.stdout) or is_named(file, pages):
            return "named", said
        if done.returncode == 2 and not commands_in(done.stderr):
            return "unnamed", said
        if done.returncode == 2:  # to be judged by where the way on leads
            outcome, more = go_on(place, made_by(*whole), commands_in(done.stderr))
            return outcome, said + more
        if Path(file).name in damaged:  # nobody's to mend, and compared above where it is read
            wanted = wanted | {Path(file).name: damaged[Path(file).name]}
            found.setdefault(Path(file).name, damaged[Path(file).name])
        different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if not different:
            return "harmless", said
        kind = "other bytes" if any(name.endswith((".gguf", ".safetensors")) for name in different) else "other figures"
        return kind, f"{', '.join(different)}\n{said}"


# --- the cases --------------------------------------------------------------------------------------------------------


STAGES = {  # (what ran before, the command)
    "train": ((), tuple(TRAIN)),
    "train with evaluation": ((), tuple(EVALUATED)),
    "train --export": ((), (*EVALUATED, "--export", "q8_0")),  # certified on one row
    "export": ((tuple(TRAIN),), tuple(EXPORT)),
    "certify": ((tuple(EVALUATED), tuple(EXPORT)), tuple(CERTIFY)),
    "report": ((tuple(TRAIN),), ("report", "run")),
}


def spread(items: list, most: int) -> list:
    "At most so many of them, from beginning to end."
    return items if len(items) <= most else [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def telling(events: list[faults.Event]) -> list[int]:
    "Numbers of the events that differ: of several equal ones in a row the first, the second and the last."

    def alike(n):
        return 0 <= n < len(events) and (events[n].kind, events[n].path)

    return [
        n + 1 for n in range(len(events)) if not alike(n) == alike(n - 1) == alike(n - 2) or alike(n) != alike(n + 1)
    ]


WANT = {"tear": ("write", "rename", "truncate"), "full": ("write", "open", "mkdir", "truncate")}  # kinds of events


def fault_cases(part, stage, modes, most) -> list[Case]:
    "Faults at the events of a stage."
    before, command = STAGES[stage]
    events = events_of(*before, command)
    found = []
    for n in telling(events):
        event = events[n - 1]
        for mode, number in modes:
            if event.kind in WANT.get(mode, (event.kind,)):
                play = functools.partial(play_fault, before, command, fault := Fault(mode, n, number))
                found.append(
                    Case(
                        part, stage, f"{stage}: {fault}, {event.kind} {lasting(event.path)}", label(mode, number), play
                    )
                )
    return spread(found, most)


def lasting(path: str) -> str:
    "A path without what is random in its name."
    return re.sub(r"\.\d+\.part", ".part", path)


def label(mode, number) -> str:
    if mode == "signal":
        return signal.Signals(number).name
    return {
        "kill": "killed before",
        "tear": "killed in",
        "full": {28: "disk full", 122: "over quota"}.get(number, "disk full"),
    }[mode]


def moment_cases(part, stage, count, numbers) -> list[Case]:
    "Signals at random moments of a stage."
    before, command = STAGES[stage]
    dice = random.Random(stage)
    found = []
    for n in range(count):
        moment, number = dice.random(), numbers[n % len(numbers)]
        name = signal.Signals(number).name
        kind = "killed at any moment" if number == signal.SIGKILL else name
        play = functools.partial(play_moment, before, command, moment, number)
        found.append(Case(part, stage, f"{stage}: {name} at {moment:.0%} of the time", kind, play))
    return found


DIE = (("kill", 0), ("tear", 0))
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def kills() -> list[Case]:
    "Deaths: 210."
    return [
        *fault_cases("kills", "train", DIE, 90),
        *fault_cases("kills", "train with evaluation", DIE, 30),
        *fault_cases("kills", "train --export", DIE, 25),
        *fault_cases("kills", "export", DIE, 25),
        *fault_cases("kills", "certify", DIE, 10),
        *fault_cases("kills", "report", DIE, 10),
        *moment_cases("kills", "train with evaluation", 12, [signal.SIGKILL]),
        *moment_cases("kills", "export", 8, [signal.SIGKILL]),
    ]


def full() -> list[Case]:
    "Full disks, from each of the events that take room on."
    modes = (("full", 28),)
    return [
        *fault_cases("full", "train", modes, 45),
        *fault_cases("full", "train with evaluation", (("full", 122),), 15),
        *fault_cases("full", "train --export", modes, 15),
        *fault_cases("full", "export", modes, 15),
        *fault_cases("full", "certify", modes, 5),
        *fault_cases("full", "report", modes, 5),
    ]


def signals() -> list[Case]:
    "Signals that ask a process to stop."
    found = []
    for stage, most in (("train with evaluation", 5), ("train --export", 3), ("export", 2)):
        for number in STOPS:
            found += fault_cases("signals", stage, (("signal", number),), most)
        found += moment_cases("signals", stage, 2 * most, STOPS)
    return found


def power() -> list[Case]:
    "Power cuts: what was not synced is lost."
    command, found = tuple(TRAIN), []
    events = events_of(command)
    places = [n for n in telling(events) if events[n - 1].kind in ("rename", "open", "unlink", "mkdir", "sync")]
    for i, n in enumerate(spread(places, 40)):
        zeros, event = bool(i % 2), events[n - 1]
        name = f"power cut at event {n}, {event.kind} {lasting(event.path)}, {'zeros' if zeros else 'short'}"
        kind = "zeros in place of bytes" if zeros else "bytes lost"
        found.append(Case("power", "train", name, kind, functools.partial(play_power, command, n, zeros)))
    return found


def kind_of(how: str) -> str:
    return {"half": "cut short", "empty": "cut short", "swapped": "another run's"}.get(how, how.split()[0])


def damages() -> list[Case]:
    "Each file of a stopped run and of a finished one, damaged in each way."
    found = []
    run = stopped() / "run"
    for file in sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()):
        for how in DAMAGES:
            if how != "swapped" or (other_run() / "run" / file).exists():
                found.append(Case("damages", "resume", f"resume: {file} {how}", kind_of(how),
                                  functools.partial(play_damaged_stop, f"run/{file}", how)))  # fmt: skip
    readers = list(READERS)
    whole = made_by(*WHOLE)
    for i, file in enumerate(sorted(names_of(whole / "run"))):
        if file.startswith("checkpoints/"):
            continue
        for j, how in enumerate(DAMAGES):
            if how == "swapped" and not (other_run() / "run" / file).exists():
                continue
            for reader in (
                {"chat", readers[1 + (i + j) % 4]}
                if file.startswith("adapter/")
                else {readers[(i + j) % 5], readers[(i + j + 2) % 5]}
            ):
                found.append(Case("damages", reader, f"{reader}: {file} {how}", kind_of(how),
                                  functools.partial(play_damaged_run, f"run/{file}", how, reader)))  # fmt: skip
    return sorted(found, key=lambda case: (case.stage != "resume", case.name))


PARTS = {"kills": kills, "full": full, "signals": signals, "power": power, "damages": damages}
