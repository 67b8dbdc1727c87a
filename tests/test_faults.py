"""Kills, full disks, signals, power cuts and damaged files: a few here, some of all parts with --heavy.

`python benchmarks/faults.py` tries all of them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import faults
import pytest
from faults import Event, Fault, sweeps
from repository import ROOT

pytestmark = pytest.mark.skipif(not faults.library(), reason="no C compiler (cc) here, or not Linux")
TRAIN, EXPORT, REPORT = tuple(sweeps.TRAIN), tuple(sweeps.EXPORT), ("report", "run")


@pytest.fixture(scope="module")
def events():
    "What a training does to its folder."
    return sweeps.events_of(TRAIN)


def kept(outcome_and_seen):
    outcome, seen = outcome_and_seen
    assert outcome in sweeps.KEPT, f"{outcome} ({sweeps.BROKEN[outcome]}):\n{seen}"
    return outcome


# --- the harness itself -----------------------------------------------------------------------------------------------

SEEN = """
import ctypes, io, mmap, os, shutil, sys
import numpy, safetensors.numpy, torch
os.mkdir("d")
fd = os.open("d/os", os.O_WRONLY | os.O_CREAT)
os.write(fd, b"12345678"), os.pwrite(fd, b"12", 8), os.writev(fd, [b"1", b"234"]), os.fsync(fd), os.ftruncate(fd, 4)
open("d/python", "w").write("x" * 100_000)
torch.save({"x": torch.zeros(1000)}, "d/torch")
safetensors.numpy.save_file({"x": numpy.zeros(1000)}, "d/adapter_model.safetensors")
numpy.zeros(1000).tofile("d/numpy")
shutil.copyfile("d/python", "d/copy")
with open("d/copy", "r+b") as file:
    mmap.mmap(file.fileno(), 100)
os.rename("d/copy", "d/renamed"), os.link("d/renamed", "d/linked"), os.symlink("linked", "d/symlinked")
shutil.rmtree("d")
open("../outside", "w").write("no event")
os.close(os.open(".", os.O_TMPFILE | os.O_WRONLY))
"""


def test_what_libraries_write_is_seen(tmp_path):
    "By its bytes: torch (C++), safetensors (Rust), Python, copies in the kernel."
    (place := tmp_path / "watched").mkdir()
    done = faults.run(cwd=place, code=SEEN)
    assert done.returncode == 0, done.stderr
    kinds = {event.kind for event in done.events}
    assert kinds == {
        "mkdir",
        "open",
        "write",
        "sync",
        "truncate",
        "map",
        "rename",
        "link",
        "symlink",
        "unlink",
        "rmdir",
    }
    written = {}
    for event in done.events:
        if event.kind == "write":
            written[event.path] = written.get(event.path, 0) + event.bytes
    assert written["d/os"] == 14 and written["d/python"] == 100_000 <= written["d/copy"]
    assert min(written[name] for name in ("d/torch", "d/adapter_model.safetensors")) > 4000
    assert "d/numpy" not in written  # by C's own streams: `faults.c` says so
    assert not any("outside" in event.path or event.path.startswith("/") for event in done.events)


def test_all_bytes_of_a_run_were_seen(events):
    "So nothing that a run writes is out of the harness's reach."
    run = sweeps.made_by(TRAIN)
    size = {}
    for event in events:
        if event.kind == "write":
            size[event.path] = size.get(event.path, 0) + event.bytes
        if event.kind == "rename":
            for old in [name for name in size if f"{name}/".startswith(f"{event.path}/")]:
                size[event.to + old[len(event.path) :]] = size.pop(old)
    files = [str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 20
    for name in files:
        assert size.get(name, 0) >= (run / name).stat().st_size, name


def test_a_fault_comes_when_it_was_ordered(tmp_path):
    code = "import os\nfor n in range(9): os.write(os.open('f', os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'1234')"

    def size(fault):
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        done = faults.run(cwd=place, code=code, fault=fault)
        return done, (place / "f").stat().st_size if (place / "f").exists() else None

    assert [size(Fault("kill", n))[1] for n in (2, 3, 4)] == [0, 4, 4]  # every second event is a write
    assert [size(Fault("tear", n))[1] for n in (2, 3, 4)] == [2, 4, 6]
    assert size(Fault("kill", 4))[0].returncode == -signal.SIGKILL
    done, left = size(Fault("full", 4))
    assert "No space left on device" in done.stderr and left == 6  # as a disk does it: half of a write, then none
    assert "Disk quota exceeded" in size(Fault("full", 4, 122))[0].stderr
    assert size(Fault("signal", 4, signal.SIGTERM))[0].returncode == -signal.SIGTERM


def test_what_a_power_cut_takes(tmp_path):
    def happened(*rows):
        return [Event(kind, size, path, to) for kind, size, path, to in rows]

    whole = happened(
        ("open", 0, "d/.a", ""), ("write", 9, "d/.a", ""), ("sync", 0, "d/.a", ""), ("rename", 0, "d/.a", "d/a")
    )
    assert sweeps.unsynced(whole) == {} and sweeps.synced_before_named(whole) == [
        "d was not synced after d/a got its name"
    ]
    whole += happened(("sync", 0, "d", ""))
    assert sweeps.synced_before_named(whole) == []
    late = [event for event in whole if event.kind != "sync"]
    assert sweeps.unsynced(late) == {"d/a": 0} and "before its bytes were synced" in sweeps.synced_before_named(late)[0]
    longer = [*whole, *happened(("open", 0, "d/a", ""), ("write", 3, "d/a", ""))]
    assert sweeps.unsynced(longer) == {"d/a": 9}
    (tmp_path / "d").mkdir()
    for zeros, left in ((False, b"123456789"), (True, b"123456789\0\0\0")):
        (tmp_path / "d/a").write_bytes(b"123456789abc")
        assert sweeps.cut_power(tmp_path, longer, zeros) == ["d/a"] and (tmp_path / "d/a").read_bytes() == left


def test_outcomes_are_told_apart():
    done = partial(subprocess.CompletedProcess, [], stdout="")
    assert sweeps.fault_in(done(1, stderr="Traceback (most recent call last)\n  x"))[0] == "traceback"
    assert sweeps.fault_in(done(2, stderr="what went wrong"))[0] == "unnamed"
    assert sweeps.fault_in(done(2, stderr="50 %\rqlora_nb: no space left")) is None
    assert sweeps.commands_in("qlora_nb: stopped: resume it with qlora_nb train --resume 'my run' (in Python: …)") == [
        ["train", "--resume", "my run"]
    ]
    both = "the run is finished: qlora_nb export run --quantization q8_0 && qlora_nb certify run"
    assert sweeps.commands_in(both) == [["export", "run", "--quantization", "q8_0"], ["certify", "run"]]
    assert sweeps.is_named("run/checkpoints/checkpoint-2/optimizer.pt", "checkpoint-2 is damaged")
    assert not sweeps.is_named("run/metrics.jsonl", "summary.json is damaged")
    assert not {*sweeps.KEPT} & {*sweeps.BROKEN}


# --- a few of each ----------------------------------------------------------------------------------------------------


def number_of(events, kind, ending, last=False):
    found = [n for n, event in enumerate(events, 1) if event.kind == kind and event.path.endswith(ending)]
    return found[-1 if last else 0]


@pytest.mark.parametrize("mode, kind, ending", [
    ("tear", "write", "checkpoint-2/optimizer.pt"),
    ("tear", "write", "checkpoint-4/trainer_state.json"),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bytes(events, mode, kind, ending):
    assert kept(sweeps.play_fault((), TRAIN, Fault(mode, number_of(events, kind, ending)))) == "same bytes"


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_killed_export_is_made_again(part):
    events = sweeps.events_of(TRAIN, EXPORT)
    kept(sweeps.play_fault((TRAIN,), EXPORT, Fault("tear", 1 + int(part * len(events)))))


def test_a_full_disk_is_one_sentence(events):
    full = Fault("full", number_of(events, "write", "checkpoint-4/optimizer.pt"))
    assert kept(sweeps.play_fault((), TRAIN, full)) == "same bytes"


@pytest.mark.parametrize("reader, file, how", [
    ("chat", "adapter/adapter_config.json", "half"),
    ("chat", "adapter/adapter_model.safetensors", "half"),
    ("report", "metrics.jsonl", "zeros"),
    ("diagnose", "summary.json", "empty"),
    ("diagnose", "config.yaml", "gone"),
])  # fmt: skip
def test_damage_is_found_or_harmless(reader, file, how):
    kept(sweeps.play_damaged_run(f"run/{file}", how, reader, (TRAIN,)))


# --- some of all ------------------------------------------------------------------------------------------------------

LIMITS = {"kills": 60, "full": 25, "signals": 20, "power": 15, "damages": 60}  # cases, spread over those of a part


@pytest.mark.heavy
@pytest.mark.parametrize("part", sweeps.PARTS)
def test_a_part_of_the_promises(part):
    broken = []
    for case in sweeps.spread(sweeps.PARTS[part](), LIMITS[part]):
        outcome, seen = case.play()
        if outcome in sweeps.BROKEN:
            broken.append(f"{case.name}: {outcome}\n{seen}")
    assert not broken, f"{len(broken)} of {LIMITS[part]}:\n" + "\n\n".join(broken)


@pytest.mark.heavy
def test_bytes_are_on_the_disk_before_they_have_a_name():
    "For all that a run leaves: what was promised of a power cut."
    for commands in ((TRAIN,), (TRAIN, EXPORT)):
        assert not sweeps.synced_before_named(sweeps.events_of(*commands))


@pytest.mark.heavy
def test_the_sweep_can_be_stopped_and_goes_on(tmp_path):
    script = [sys.executable, ROOT / "benchmarks/faults.py", "--part", "kills", "--only", "report: "]
    done = subprocess.run([*script, "--limit", "1"], capture_output=True, text=True, env={**os.environ})
    assert "kills 1/1" in done.stdout, done.stderr


@pytest.mark.heavy
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    script = [sys.executable, ROOT / "benchmarks/gpu/faults.py", tmp_path / "found.json"]
    options = ["--cpu", "--steps", "8", "--jobs", "1", "--only", "full disk"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert row["exit"] == 2 and "no space left" in row["said"] and row["commands"][0]["command"] == "train --resume run"
    assert row["same_bytes"] and row["same_steps"] and row["same_held_out_figures"]
