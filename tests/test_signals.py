"""Signals, a time limit, a full disk: one sentence, the right exit code, nothing torn, the command that goes on."""

import json
import os
import pty
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from processes import COMMAND, Process, qlora_nb, wait_for

from qlora_nb.core import FullDisk, UserError, check_space, explain_full_disk
from qlora_nb.signals import (
    STOP_SIGNALS,
    StopSignal,
    TrainingInterrupted,
    explain_interrupts,
    find_deadline,
    gentle_interrupt,
    raise_stop_signal,
    stop_at,
)
from qlora_nb.training import make_stop_watch

SHORT = ["--max-steps", "6", "--save-steps", "2", "--eval-rows", "2", "--max-new-tokens", "4", "--limit", "100"]
NAMES = [pytest.param(number, id=number.name) for number in STOP_SIGNALS]


@pytest.fixture(autouse=True)
def nothing_on_its_way():
    "What one test leaves unexplained must not stop the next."
    yield
    StopSignal.on_its_way = None


# --- the handlers ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("number", NAMES)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(number, capsys):
    before = signal.getsignal(number)
    with gentle_interrupt() as seen:
        signal.raise_signal(number)
        assert seen == [number]
        time.sleep(0.3)  # a second SIGHUP at once is that of the same closed terminal
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    said = capsys.readouterr().err.strip()
    assert ("Ctrl-C" in said) == (number == signal.SIGINT)
    assert (number.name in said) == (number not in (signal.SIGINT, signal.SIGALRM))
    assert "stopping" in said and "after this step" in said and said.count("\n") == 0
    assert signal.getsignal(number) == before


@pytest.mark.quick
@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_hangs_up_once(first):
    with gentle_interrupt() as seen:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        assert seen == [first]


@pytest.mark.quick
@pytest.mark.parametrize("how", [gentle_interrupt, lambda: explain_interrupts(str)])
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_signals_that_are_ignored_or_taken_stay_so(how, ignored):
    "As `nohup` and `&` do, and as a script that saves its own things."
    taken = []
    before = signal.signal(ignored, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: taken.append(True))
    try:
        with how() as seen:
            signal.raise_signal(ignored)
            signal.raise_signal(signal.SIGTERM)
        assert taken == [True] and not seen and signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before[0])
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.quick
@pytest.mark.parametrize("number", NAMES)
def test_a_signal_outside_of_the_steps_is_one_sentence(number):
    with pytest.raises(TrainingInterrupted) as stopped, explain_interrupts(lambda: "go on so"):
        with gentle_interrupt():
            pass
        assert signal.getsignal(signal.SIGTERM) == raise_stop_signal, "after the steps a signal stops at once again"
        signal.raise_signal(number)
    name = {signal.SIGINT: "", signal.SIGALRM: " by max_minutes="}.get(number, f" by {number.name}")
    assert str(stopped.value) == f"stopped{name}: go on so"
    assert stopped.value.exit_code == (124 if number == signal.SIGALRM else 128 + number)
    assert isinstance(stopped.value, UserError) and TrainingInterrupted("x").exit_code == 130


@pytest.mark.quick
def test_a_stop_that_a_library_swallows_or_changes_is_not_lost():
    def swallow():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # noqa: S110
            pass

    for rest in (lambda: None, lambda: 1 / 0, lambda: explain_interrupts(lambda: "inner").__enter__()):
        with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM: (inner|outer)"):
            with explain_interrupts(lambda: "outer"):
                swallow()
                rest()
        assert StopSignal.on_its_way is None
    with explain_interrupts(lambda: "outer"):  # the training that comes after it stops at its first step
        swallow()
        with gentle_interrupt() as seen:
            assert seen == [signal.SIGTERM]


@pytest.mark.quick
def test_what_cleans_up_is_not_interrupted_again():
    cleaned = []
    with pytest.raises(TrainingInterrupted, match="SIGTERM"), explain_interrupts(lambda: "go on"):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)
    assert cleaned


@pytest.mark.quick
def test_a_thread_gets_no_handlers_and_no_timer():
    found = []

    def inside():
        with gentle_interrupt() as seen, explain_interrupts(str), stop_at(time.time() + 100):
            found.append((seen, signal.getsignal(signal.SIGTERM), signal.getitimer(signal.ITIMER_REAL)[0]))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [([], signal.SIG_DFL, 0.0)]


# --- the time limit -------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True, "5"])
def test_minutes_that_are_none(minutes):
    with pytest.raises(UserError, match="max_minutes is .*: give the minutes after which to stop, above 0"):
        find_deadline(minutes, 0.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    "left, step, save, stops", [(100, 1, 1, False), (50, 60, 0, True), (50, 0, 60, True), (-1, 0, 0, True)]
)  # fmt: skip
def test_the_next_step_and_the_checkpoint_must_fit_into_the_minutes(left, step, save, stops):
    make_stop_watch([])  # imports, whose time doesn't count
    interrupted, now = [], time.time()
    watch = make_stop_watch(interrupted, now + left)
    watch.step_began, watch.save_seconds = now - step, save
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_log=False)
    watch.on_step_end(None, SimpleNamespace(global_step=3, max_steps=6), control)
    assert interrupted == [signal.SIGALRM] * stops
    assert (control.should_save, control.should_training_stop) == (stops, stops)


@pytest.mark.quick
def test_the_last_step_is_not_stopped_by_the_clock():
    interrupted = []
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_log=False)
    watch = make_stop_watch(interrupted, time.time() - 1)
    watch.on_step_end(None, SimpleNamespace(global_step=6, max_steps=6), control)
    assert interrupted == [] and not control.should_training_stop


# --- whole processes ------------------------------------------------------------------------------------------------


def sha(run):
    return json.loads((run / "summary.json").read_text())["adapter_sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    done = qlora_nb("train", *SHORT, "--eval-steps", "2", "--output", "run", cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "run"


def at(where, name, act, call=1):
    "Code that makes a function's `call`th call do something first."
    module, _, owner = where.partition(":")
    return f"""
import importlib, os, resource, signal, sys
def _wrap():
    owner = importlib.import_module({module!r})
    owner = getattr(owner, {owner!r}) if {owner!r} else owner
    function, calls = getattr(owner, {name!r}), []
    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == {call}:
            {act}
        return function(*a, **k)
    setattr(owner, {name!r}, wrapped)
_wrap()
"""


def kill(number):
    return f"os.kill(os.getpid(), {int(number)})"


RESUME = r"resume it with qlora_nb train --resume \S+run \(in Python: [^)]*\)\)"
REST = r"the run \S+ is finished, but .* not written: .*qlora_nb certify \S+run"
PHASES = {  # where the signal comes: module, function, its call, more flags, the sentence, whether in each `make test`
    "loading": ("qlora_nb.model", "load_model", 1, [], "nothing was trained yet, so start again", False),
    "check": ("qlora_nb.preparation", "prepare_rows", 1, [], "nothing was trained yet, so start again", False),
    "before": ("qlora_nb.training", "_evaluate", 1, [], f"{RESUME}; it has no checkpoint yet", False),
    "step": ("qlora_nb.training", "make_metrics_row", 3, [], RESUME, False),
    "checkpoint": ("transformers.trainer:Trainer", "_save_rng_state", 2, [], RESUME, True),
    "checkpoint, own loop": ("qlora_nb.loop", "get_random_states", 2, ["--loop", "own"], RESUME, False),
    "look": ("qlora_nb.watching:HeldOut", "measure", 2, [], RESUME, False),
    "look, own loop": ("qlora_nb.watching:HeldOut", "measure", 2, ["--loop", "own"], RESUME, False),
    "final save": ("qlora_nb.adapter", "write_aside", 1, [], f"{RESUME}; its newest checkpoint is of step 6", False),
    "after": ("qlora_nb.training", "_evaluate", 2, [], f"{RESUME}; the adapter is trained and saved", False),
    "report": ("qlora_nb.workflow", "write_reports", 1, ["--export", "q8_0"], REST, False),
    "export": ("qlora_nb.gguf_export", "copy_tensors", 2, ["--export", "q8_0,q4_k_m"], REST, False),
    "quantize": ("qlora_nb.gguf_export", "quantize_with_llama", 1, ["--export", "q8_0,q4_k_m"], REST, False),
    "certify": ("qlora_nb.workflow", "certify_run", 1, ["--export", "q8_0"], REST, False),
}


def check_stop(process_or_done, number, sentence):
    code, err = process_or_done
    assert code == 128 + number and "Traceback" not in err, err[-3000:]
    assert re.search(f"^qlora_nb: stopped.*{sentence}$", err.splitlines()[-1]), err[-1500:]


def unfinished_files(place):
    return [path for path in place.rglob("*") if path.name.endswith((".part", ".old"))]


@pytest.mark.parametrize(
    "phase", [pytest.param(name, marks=() if each[-1] else pytest.mark.heavy) for name, each in PHASES.items()]
)
def test_a_signal_in_each_phase(phase, whole, tmp_path):
    where, name, call, more, sentence, _ = PHASES[phase]
    number = random.Random(phase).choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
    flags = ["--eval-steps", "2", "--output", "run", *more]
    done = qlora_nb("train", *SHORT, *flags, cwd=tmp_path, first=at(where, name, kill(number), call))
    check_stop((done.returncode, done.stderr), number, sentence)
    assert not unfinished_files(tmp_path)
    if phase in ("loading", "check"):
        return
    if sentence == REST:
        for command in done.stderr.splitlines()[-1].rpartition("written: ")[2].split(" && "):
            again = qlora_nb(*shlex.split(command)[1:], cwd=tmp_path)
            assert again.returncode == 0, again.stderr[-3000:]
    else:
        again = qlora_nb("train", "--resume", "run", cwd=tmp_path)
        assert again.returncode == 0, again.stderr[-3000:]
    if "--loop" not in more:
        assert sha(tmp_path / "run") == sha(whole)
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 6
    if "--export" in more:
        assert json.loads((tmp_path / "run/certificate.json").read_text())["passed"]


@pytest.mark.heavy
def test_a_second_signal_ends_at_once_and_older_checkpoints_are_whole(whole, tmp_path):
    twice = f"{kill(signal.SIGTERM)}; {kill(signal.SIGTERM)}"
    done = qlora_nb("train", *SHORT, "--eval-steps", "2", "--output", "run", cwd=tmp_path,
                    first=at("transformers.trainer:Trainer", "_save_rng_state", twice, 2))  # fmt: skip
    check_stop((done.returncode, done.stderr), signal.SIGTERM, f"{RESUME}; its newest checkpoint is of step 2")
    again = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0 and sha(tmp_path / "run") == sha(whole), again.stderr[-3000:]


def test_the_time_limit_stops_with_a_checkpoint(whole, tmp_path):
    "The timer of 100 minutes is moved to now, in a step; and a limit that is over before the model is loaded."
    soon = "signal.setitimer(signal.ITIMER_REAL, 0.001)"
    done = qlora_nb("train", *SHORT, "--eval-steps", "2", "--output", "run", "--max-minutes", "100", cwd=tmp_path,
                    first=at("qlora_nb.training", "make_metrics_row", soon, 3))  # fmt: skip
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 124 and "stopped by --max-minutes at step" in said and "checkpoint saved" in said
    assert "max_minutes" not in (tmp_path / "run/config.yaml").read_text()
    again = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0 and sha(tmp_path / "run") == sha(whole), again.stderr[-3000:]
    early = qlora_nb("train", *SHORT, "--output", "early", "--max-minutes", "0.0001", cwd=tmp_path)
    assert early.returncode == 124 and not (tmp_path / "early").exists()
    assert early.stderr == "qlora_nb: stopped by --max-minutes: nothing was trained yet, so start again\n"


def test_an_interrupted_export_names_what_is_left(whole, tmp_path):
    "Also where the process was killed: the run records the formats."
    run = tmp_path / "a run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    done = qlora_nb("export", run, "--quantization=q8_0,q4_k_m", "--license", "mit", cwd=tmp_path,
                    first=at("qlora_nb.gguf_export", "quantize_with_llama", kill(signal.SIGHUP)))  # fmt: skip
    rest = f"a run-Q8_0.gguf is complete; continue with qlora_nb export '{run}' --license mit --quantization q4_k_m"
    check_stop((done.returncode, done.stderr), signal.SIGHUP, re.escape(rest))
    assert not unfinished_files(tmp_path) and not list(run.glob("*Q4_K_M*"))
    certify = qlora_nb("certify", run, "--model-rows", "1", cwd=tmp_path,
                       first=at("qlora_nb.certificate", "certify", kill(signal.SIGTERM)))  # fmt: skip
    rest = f"no certificate was written; repeat it with qlora_nb certify '{run}' --model-rows 1"
    check_stop((certify.returncode, certify.stderr), signal.SIGTERM, re.escape(rest))


OTHERS = [
    ("evaluate --limit 2", "qlora_nb.evaluation", "evaluate", "nothing was written; repeat it with"),
    ("chat --message hi", "qlora_nb.session:ModelSpeaker", "speak", "the conversation is over; begin another one with"),
    ("answer p.txt -o a.jsonl", "qlora_nb.answers", "answer_prompts", "0 rows are answered in a.jsonl; repeat it with"),
]


@pytest.mark.parametrize("words, where, name, sentence", OTHERS, ids=["evaluate", "chat", "answer"])
@pytest.mark.heavy
def test_other_commands_stop_with_a_sentence(words, where, name, sentence, tmp_path):
    (tmp_path / "p.txt").write_text("What is 1 + 1?\n")
    done = qlora_nb(*words.split(), cwd=tmp_path, first=at(where, name, kill(signal.SIGTERM)))
    check_stop((done.returncode, done.stderr), signal.SIGTERM, re.escape(f"{sentence} qlora_nb {words}"))


ON_A_TERMINAL = """
import fcntl, os, termios
os.setsid()
terminal = os.open({!r}, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in (0, 1, 2):
    os.dup2(terminal, number)
os.close(terminal)
assert all(map(os.isatty, (0, 1, 2)))
open("on a terminal", "w").write("yes\\n")
"""


def test_a_terminal_that_is_closed_saves_a_checkpoint(tmp_path):
    "A real one, whose closing sends SIGHUP: the progress bar then writes to what is no longer there."
    outer, inner = pty.openpty()
    process = Process(
        COMMAND, "train", *SHORT, "--output", "run", cwd=tmp_path, first=ON_A_TERMINAL.format(os.ttyname(inner))
    )
    wait_for(process, tmp_path / "on a terminal", 1)
    os.close(inner)
    wait_for(process, tmp_path / "run/metrics.jsonl", 1,
             lambda: select.select([outer], [], [], 0.05)[0] and os.read(outer, 1 << 16))  # fmt: skip
    os.close(outer)
    process.communicate(timeout=240)
    assert process.returncode == 129
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoints").glob("checkpoint-*"))
    assert (tmp_path / f"run/checkpoints/checkpoint-{newest}/trainer_state.json").exists()
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == newest
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_is_ignored_changes_nothing(number, whole, tmp_path):
    "`nohup` has SIGHUP ignored, `&` in a script SIGINT."
    ignore = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)"
    done = qlora_nb("train", *SHORT, "--output", "run", cwd=tmp_path,
                    first=ignore + at("qlora_nb.training", "make_metrics_row", kill(number), 3))  # fmt: skip
    assert done.returncode == 0 and sha(tmp_path / "run") == sha(whole), done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(24))
def test_a_signal_at_a_random_moment(seed, whole, tmp_path):
    "In an interpreter of its own, so that imports are among the moments; the first half second is Python's own start."
    draw = random.Random(seed)
    number, command = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]), ["train", *SHORT, "--output", "run"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *command, "--eval-steps", "2"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    time.sleep(draw.uniform(1.0, 25.0))
    if process.poll() is None:
        process.send_signal(number)
    out, err = process.communicate(timeout=240)
    if process.returncode == 0:
        return
    check_stop((process.returncode, err), number, "")
    assert not unfinished_files(tmp_path)
    if "--resume" in err.splitlines()[-1]:
        again = qlora_nb("train", "--resume", "run", cwd=tmp_path)
        assert again.returncode == 0 and sha(tmp_path / "run") == sha(whole), again.stderr[-3000:]


# --- a full disk ----------------------------------------------------------------------------------------------------


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def test_a_disk_that_fills_up_in_training(whole, tmp_path):
    "A real limit on what a file may hold, from the third step on: the checkpoint does not fit, in the largest file."
    done = qlora_nb("train", *SHORT, "--eval-steps", "2", "--output", "run", cwd=tmp_path,
                    first=at("qlora_nb.training", "make_metrics_row", LIMIT.format(900_000), 3))  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "no space left in" in last and last.endswith("its newest checkpoint is of step 2"), last
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0 and sha(tmp_path / "run") == sha(whole), done.stderr[-3000:]


@pytest.mark.heavy
def test_a_disk_that_is_full_when_the_adapter_is_saved(whole, tmp_path):
    done = qlora_nb("train", *SHORT, "--eval-steps", "2", "--output", "run", cwd=tmp_path,
                    first=at("qlora_nb.training", "save_adapter", LIMIT.format(100_000)))  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "no space left while writing" in last and "resume it with qlora_nb train --resume" in last, last
    assert not unfinished_files(tmp_path)
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0 and sha(tmp_path / "run") == sha(whole), done.stderr[-3000:]


def test_what_a_file_may_hold_is_asked_before_the_training(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    done = qlora_nb("train", *SHORT, "--output", "run", cwd=tmp_path, first=limit)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert re.fullmatch(r"qlora_nb: the adapter and the checkpoints need a file of .* MiB, and this process may write "
                        r".* at most \(ulimit -f\): raise the limit\n", done.stderr), done.stderr[-2000:]  # fmt: skip


@pytest.mark.quick
def test_the_innermost_explanation_of_a_full_disk_is_kept():
    with pytest.raises(FullDisk, match="no space left for x: free some; inner"):
        with explain_full_disk(lambda: "outer"), explain_full_disk(lambda: "inner"):
            raise OSError(28, "No space left on device", "x")
    for error in (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
                  OSError("Not enough disk space. Needed: 5 GiB"), OSError(122, "Disk quota exceeded")):  # fmt: skip
        with pytest.raises(FullDisk, match="no space left .*; go on"), explain_full_disk(lambda: "go on"):
            raise error


@pytest.mark.quick
def test_a_place_that_cannot_be_written(tmp_path):
    if os.getuid() == 0:
        place = "/proc/1"
    else:
        (place := tmp_path / "read-only").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written .*: free some, or choose another place"):
        check_space(place, 0, "a few files")


@pytest.mark.heavy
def test_the_formats_are_recorded_and_a_finished_run_says_what_is_left(tmp_path):
    "A kill in the export: --resume of the finished run names the rest."
    done = qlora_nb("train", *SHORT, "--export", "q8_0", "--output", "run", cwd=tmp_path,
                    first=at("qlora_nb.workflow", "export_gguf", kill(signal.SIGKILL), 2))  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["export"] == ["q8_0"]
    again = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 2 and f"qlora_nb export {tmp_path / 'run'} --quantization q8_0" in again.stderr
