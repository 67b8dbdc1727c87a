"""Faults on order: a process is killed, stopped, or its disk filled at the n-th thing that it does to a folder's files.

`faults.c` is preloaded into the server of tests/processes.py, and armed in the fork: a fault costs no import.

    done = run("train", "--output", "run", cwd=place, fault=Fault("tear", 20))
    done.events             # what it did to the files of `place`, until then
"""

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import processes

MODES = ("count", "kill", "tear", "full", "signal")
# count: nothing happens. kill: SIGKILL before the event. tear: after it; in a write, after half of its bytes.
# full: from it on the disk is full. signal: the process gets the signal `number`, and goes on.


@dataclass(frozen=True)
class Fault:
    "What happens at the n-th event."

    mode: str = "count"  # one of MODES
    at: int = 0  # 1 is the first event
    number: int = 28  # of the error (28 ENOSPC, 122 EDQUOT), or the signal

    def __str__(self):
        return f"{self.mode}{f' {self.number}' if self.mode in ('full', 'signal') else ''} at event {self.at}"


@dataclass(frozen=True)
class Event:
    kind: str  # open (for writing), write, map, sync, rename, link, symlink, unlink, rmdir, mkdir, truncate
    bytes: int
    path: str  # relative to the folder that is watched
    to: str  # of a rename or link


@functools.cache
def library() -> Path | None:
    "The compiled library; None where there is no C compiler, or this isn't Linux."
    source = Path(__file__).with_name("faults.c")
    if not (compiler := shutil.which("cc")) or not Path("/proc/self/fd").is_dir():
        return None
    place = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", place, source, "-ldl"], check=True)
    return place


# safetensors writes to .tmp and six characters, and renames that by a system call of its own, which no library sees.
UNSEEN = re.compile(r"(^|/)\.tmp\w{6}$")


def read_events(log: Path, place: Path) -> list[Event]:
    "What was logged, with paths relative to `place`; a file of safetensors has the name that an adapter gets."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    here, found = str(place.resolve()), []
    for _, kind, size, *paths in (line.split("\t") for line in lines):
        paths = [
            "." if path == here else path.removeprefix(f"{here}/") for path in paths
        ]  # a file without a name is in "."
        paths = [UNSEEN.sub(r"\1adapter_model.safetensors", path) for path in paths]
        found.append(Event(kind, int(size), *paths))
    return found


def start(*arguments, cwd, fault=Fault(), code=processes.COMMAND, log=None, **more) -> processes.Process:
    "Start the command line with a fault; events are those below `cwd`."
    call = (str(cwd).encode(), MODES.index(fault.mode), fault.at, int(fault.number), str(log or "").encode())
    arm = f"import ctypes; ctypes.CDLL({str(library())!r}).faults_arm(*{call!r})"
    return processes.Process(code, *arguments, cwd=cwd, first=arm, preload=library(), **more)


def run(*arguments, cwd, fault=Fault(), timeout=120, **more) -> subprocess.CompletedProcess:
    "Run the command line with a fault; `events` of what is returned is what it did to files below `cwd`."
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        log = Path(place) / "log"
        process = start(*arguments, cwd=cwd, fault=fault, log=log, **more)
        out, err = process.communicate(timeout)
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        done.events = read_events(log, Path(cwd))
    return done
