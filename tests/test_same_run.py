"""A resumed run is the run that was begun: settings, paths, one writer; and how a finished one is extended."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from processes import COMMAND, Process, qlora_nb

from qlora_nb import core
from qlora_nb.core import EMBEDDED_MODEL, UserError, file_sha256, write_aside, write_json
from qlora_nb.model import add_lora, load_model
from qlora_nb.preparation import deciding_settings, read_run_to_resume
from qlora_nb.report import render_markdown
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RUN_FORMAT, RunFolder, read_config
from qlora_nb.workflow import train

SHORT = {"max_steps": 6, "warmup_steps": 1, "save_steps": 2, "save_total_limit": 3, "eval_rows": 2, "max_new_tokens": 2}
SHORT |= {"per_device_train_batch_size": 2}


def fresh():
    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", max_seq_length=256)
    return add_lora(model, r=4, lora_dropout=0.1), tokenizer


@pytest.fixture(scope="module")
def data():
    return load_sft_dataset(limit=40)


def sha(path):
    return file_sha256(Path(path) / "adapter/adapter_model.safetensors")


def record(path):
    "What a checkpoint records of its settings, where nothing else has written it yet."
    for checkpoint in reversed(RunFolder(path).checkpoints):  # the newest last: old ones are deleted by their time
        if not (checkpoint / "manifest.json").exists():
            config = RunFolder(path).config
            recorded = {"settings": deciding_settings(config), "data": config["fingerprints"]}
            write_json(checkpoint / "manifest.json", recorded)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    train(*fresh(), data, output=path, **SHORT)
    record(path)
    return path


def stopped(whole, path, step=4):
    "A copy of a run as it is when it is stopped after this step."
    shutil.copytree(whole, path)
    for name in ("manifest.json", "summary.json", "evaluation.jsonl", "heldout.jsonl", "report.md", "report.html"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "adapter")
    for checkpoint in RunFolder(path).checkpoints_after(step):
        shutil.rmtree(checkpoint)
    return path


def edit(path, **changes):
    config = read_config(path / "config.yaml")
    for name, value in changes.items():
        config.pop(name) if value is ... else config.update({name: value})
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


# --- settings -------------------------------------------------------------------------------------------------------

OTHERS = {
    "revision": "main", "backend": "unsloth", "engine": True, "load_in_4bit": False,
    "dtype": "bfloat16", "r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "all", "use_rslora": True,
    "target_modules": ["q_proj"], "random_state": 1, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "warmup_steps": 2, "max_steps": 9, "num_train_epochs": 1.0,
    "learning_rate": 0.01, "optim": "sgd", "weight_decay": 0.5, "lr_scheduler_type": "cosine", "max_grad_norm": 0.1,
    "packing": True, "loop": "own", "scale_batch": True, "trained_by": "own", "early_stopping": 2,
    "load_best_model_at_end": True, "seed": 1,
    "max_seq_length": 128, "truncation": "cut_prompt", "train_on": "last", "drop_invalid": True,
    "drop_duplicates": True, "eval_rows": 4, "max_new_tokens": 3, "scorer": "rouge", "base_data": "rows.jsonl",
    "template": "chatml", "template_kwargs": {"enable_thinking": False},
}  # fmt: skip


def test_every_setting_that_decides_is_compared(whole):
    assert set(deciding_settings(RunFolder(whole).config)) == {*OTHERS, "fingerprints"}


def test_an_edited_setting_is_refused_by_name_with_both_values(whole, tmp_path):
    path = stopped(whole, tmp_path / "run")
    config, file = read_config(path / "config.yaml"), path / "config.yaml"
    text = file.read_bytes()
    for name, value in [*OTHERS.items(), *((name, ...) for name in config if name in OTHERS)]:
        trained, now = config.get(name), value
        if value is ...:
            now = "last" if name == "train_on" else None  # what older runs did
            if trained in (None, False):  # to leave it out changes nothing
                continue
        edit(path, **{name: value})
        edited = file.read_bytes()
        with pytest.raises(UserError) as refused:
            read_run_to_resume(path, {})
        said = str(refused.value)
        assert f"{name} is {now!r} in {file}, but checkpoint-4 was trained with {trained!r}" in said
        assert "put that back to resume, or start a new run with --config" in said and "\n" not in said
        assert file.read_bytes() == edited and not list(path.rglob(".lock"))
        file.write_bytes(text)


def test_a_checkpoint_of_a_run_with_other_data_is_refused(whole, tmp_path):
    path = stopped(whole, tmp_path / "run")
    edit(path, fingerprints={**read_config(path / "config.yaml")["fingerprints"], "data": "0" * 64})
    with pytest.raises(UserError, match="the fingerprint of data in .*config.yaml is not that of checkpoint-4"):
        read_run_to_resume(path, {})


def test_at_the_command_line_an_edit_is_refused_before_a_model_is_loaded(whole, tmp_path):
    path = stopped(whole, tmp_path / "run")
    edit(path, learning_rate=0.01)
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "learning_rate is 0.01 in" in done.stderr and "trained with 0.003" in done.stderr
    assert read_config(path / "config.yaml")["learning_rate"] == 0.01


def test_what_changes_no_byte_is_taken_and_recorded(whole, data, tmp_path):
    "How often it is logged, saved and looked at; some by hand, some as arguments."
    path = stopped(whole, tmp_path / "run")
    edit(path, logging_steps=2, save_total_limit=1)
    run = train(*fresh(), data, resume=path, save_steps=5, eval_steps=1, sample_prompts="What is 1 + 1?")
    assert sha(path) == sha(whole)
    assert [checkpoint.name for checkpoint in RunFolder(path).checkpoints] == ["checkpoint-6", "checkpoint-5"]
    changed = {
        "logging_steps": 2,
        "save_total_limit": 1,
        "save_steps": 5,
        "eval_steps": 1,
        "sample_prompts": ["What is 1 + 1?"],
    }
    assert {name: read_config(path / "config.yaml")[name] for name in changed} == changed
    assert [row["step"] for row in run.metrics if "eval_loss" in row] == [5, 6]


def test_without_a_checkpoint_the_settings_are_the_run(whole, tmp_path):
    path = stopped(whole, tmp_path / "run", step=0)
    edit(path, learning_rate=0.01)
    assert read_run_to_resume(path, {})[1]["learning_rate"] == 0.01
    with pytest.raises(
        UserError, match="learning_rate is 0.5, but the run was started with 0.01: leave it out to resume"
    ):
        read_run_to_resume(path, {"learning_rate": 0.5})


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_relative_paths_are_found_from_where_the_run_began(tmp_path):
    began, elsewhere = tmp_path / "where it began", tmp_path / "elsewhere"
    for folder in (began, elsewhere):
        folder.mkdir()
    shutil.copytree(EMBEDDED_MODEL, began / "base")
    rows = [{"messages": messages} for messages in load_sft_dataset(limit=30)["messages"]]
    for name, some in (("rows.jsonl", rows[:20]), ("held.jsonl", rows[20:])):
        (began / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    given = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", value)]
    paths = ["--model", "./base", "--data", "rows.jsonl", "--eval-data", "held.jsonl", "--base-data", "held.jsonl"]
    done = qlora_nb("train", *paths, *given, "--lr-scheduler-type", "constant", "--output", "run", cwd=began)
    assert done.returncode == 0, done.stderr[-3000:]
    config = read_config(began / "run/config.yaml")
    assert config["started_in"] == str(began) and config["relative_paths"] == [
        "model",
        "data",
        "eval_data",
        "base_data",
    ]
    wanted = sha(began / "run")
    record(began / "run")
    run = stopped(began / "run", elsewhere / "run")
    done = qlora_nb("train", "--resume", "run", cwd=elsewhere)
    assert done.returncode == 0 and sha(run) == wanted, done.stderr[-3000:]
    again = read_config(run / "config.yaml")
    assert {name: again[name] for name in config} == config, "the paths stay as they were given"
    done = qlora_nb("chat", "run", "--message", "Hi", "--max-new-tokens", "2", cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-2000:]
    (run / "summary.json").unlink()
    (began / "rows.jsonl").unlink()
    done = qlora_nb("train", "--resume", "run", cwd=elsewhere)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"data is 'rows.jsonl', which is neither in {began}, where the run began, nor in {elsewhere}" in done.stderr


# --- a finished run that goes on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["trl", pytest.param("own", marks=pytest.mark.heavy)])
def test_with_a_constant_rate_an_extended_run_is_the_longer_one(data, tmp_path, loop):
    settings = {**SHORT, "lr_scheduler_type": "constant", "eval_rows": 0, "loop": loop}
    longer = train(*fresh(), data, output=tmp_path / "longer", **settings)
    run = train(*fresh(), data, output=tmp_path / "run", **{**settings, "max_steps": 4})
    record(run.path)
    extended = train(*fresh(), data, resume=run, extend=2)
    assert sha(run.path) == sha(longer.path)
    assert [row["loss"] for row in extended.metrics] == [row["loss"] for row in longer.metrics]
    assert [(entry["from"], entry["to"]) for entry in extended.summary["extended"]] == [(4, 6)]


def test_an_extended_run_follows_the_longer_schedule_and_says_so(whole, data, tmp_path, capsys):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    before = RunFolder(path).summary
    with pytest.raises(
        UserError, match=r"is finished.* export it with .*, go on with it by extend=100 \(the steps\), or"
    ):
        train(*fresh(), data, resume=path)
    with pytest.raises(UserError, match="extend is 0: give the number of further steps"):
        train(*fresh(), data, resume=path, extend=0)
    with pytest.raises(UserError, match="extend goes on with a finished run: name it with resume="):
        train(*fresh(), data, extend=2)
    capsys.readouterr()
    run = train(*fresh(), data, resume=path, extend=4)
    said = capsys.readouterr().err
    assert "extends the run from step 6 to 10; from here on the schedule (linear) is that of 10 steps" in said
    rates = [row["learning_rate"] for row in run.metrics]
    peak = 0.003
    assert rates[6:] == pytest.approx([peak * (10 - step) / 9 for step in range(6, 10)])
    (entry,) = run.summary["extended"]
    assert (entry["from"], entry["to"], entry["learning_rate"]) == (6, 10, pytest.approx(rates[6]))
    assert entry["learning_rate_before"] == rates[5] == pytest.approx(peak / 5)
    assert f"{rates[6]:g} at step 7 ({rates[5]:g} at step 6)" in said
    assert run.summary["steps"] == 10 and run.summary["before"] == before["before"]
    assert run.summary["after"] != before["after"] and run.summary["resumed_at"][-1] == 6
    assert "Extended from step 6 to 10" in render_markdown(path)
    config = read_config(path / "config.yaml")
    assert config["max_steps"] == 10 and config["extended"] == run.summary["extended"]
    # stopped before its first new checkpoint, and resumed: the same run
    wanted = sha(path)
    record(path)
    again = stopped(path, tmp_path / "again", step=6)
    train(*fresh(), data, resume=again)
    assert sha(again) == wanted
    assert [row["learning_rate"] for row in RunFolder(again).metrics] == rates
    unfinished = stopped(path, tmp_path / "unfinished", step=6)
    with pytest.raises(UserError, match="is not finished, so it can't be extended yet: resume it with"):
        read_run_to_resume(unfinished, {}, extend=2)
    edit(unfinished, max_steps=12)
    with pytest.raises(UserError, match="max_steps is 12 in .*, but the run was extended to 10: put that back"):
        read_run_to_resume(unfinished, {})


def test_a_run_that_cannot_go_on_is_not_extended(whole, data, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(path / "checkpoints/checkpoint-6")
    kept = (path / "summary.json").read_bytes()
    with pytest.raises(UserError, match="has no whole checkpoint of its last step, so it can't be extended"):
        train(*fresh(), data, resume=path, extend=2)
    assert (path / "summary.json").read_bytes() == kept
    done = qlora_nb("train", "--extend", "5", cwd=tmp_path)
    assert done.returncode == 2 and "--extend goes on with a finished run: name it with --resume" in done.stderr
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 2 and "go on with it by --extend 100 (the steps)" in done.stderr


# --- one writer -----------------------------------------------------------------------------------------------------


def test_the_second_writer_is_refused_and_named_the_first(whole, tmp_path):
    path = stopped(whole, tmp_path / "run")
    finished = Path(shutil.copytree(whole, tmp_path / "finished"))
    with RunFolder(path).lock("train --resume"), RunFolder(finished).lock("export"):
        for arguments in (
            ["train", "--resume", "run"],
            ["export", "finished"],
            ["train", "--resume", "finished", "--extend", "1"],
        ):
            done = qlora_nb(*arguments, cwd=tmp_path)
            assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
            said = done.stderr.splitlines()[-1]
            assert (
                f"{tmp_path}/" in said
                and f"is being written by process {os.getpid()} on {os.uname().nodename} (" in said
            )
        done = qlora_nb("report", "finished", cwd=tmp_path)
        assert done.returncode == 0, "a run may be looked at while it is written"
    assert not (path / ".lock").exists() and not list(finished.glob("*.gguf"))
    with RunFolder(path).lock("train"):
        pass


RACE = """
import os, sys, time
from qlora_nb.core import UserError
from qlora_nb.run import RunFolder
while time.time() < float(sys.argv[1]): pass
for number in range(20):
    try:
        folder = RunFolder.create(f"race/{number}")
        with folder.lock("train"):
            folder.take_over()
            folder.write("config.yaml", {"fingerprints": {}})
            folder.append_metrics({"step": 1, "loss": 1.0})
        print(number)
    except UserError as error:
        assert "is being written by" in str(error) or "holds another run" in str(error), error
"""


def test_of_those_that_want_the_same_folder_at_once_one_gets_it(tmp_path):
    start = time.time() + 1
    racers = [Process(RACE, start, cwd=tmp_path) for _ in range(4)]
    got = [number for racer in racers for number in racer.communicate()[0].split()]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sorted(map(int, got)) == list(range(20))


LEAVES_A_CHILD = """
import multiprocessing, os, signal, sys, time
from qlora_nb.run import RunFolder
with RunFolder.create("run").lock("train"):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path):
    killed = Process(LEAVES_A_CHILD, cwd=tmp_path)
    child = int(killed.communicate()[0])
    try:
        os.kill(child, 0)  # it lives
        assert killed.returncode == -signal.SIGKILL and (tmp_path / "run/.lock").exists()
        with RunFolder.create(tmp_path / "run").lock("train"):
            assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder.create(tmp_path / "run").lock("train"):
        pass
    assert "the file system of" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {".lock"}  # perhaps another one's


@pytest.mark.parametrize("lock", ["", "[]", '{"pid": "x"}', "{" * 5000, "\x1b]0;x\x07"])
def test_whatever_a_lock_holds_it_is_a_sentence(tmp_path, lock):
    import fcntl

    folder = RunFolder.create(tmp_path / "run")
    with open(folder.path / ".lock", "w") as file:
        file.write(lock)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process: wait for it"), folder.lock("train"):
            pass


# --- what a dead run leaves -----------------------------------------------------------------------------------------

BEGUN = f"format: {RUN_FORMAT}\nmodel: m\nfingerprints: {{}}\n"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, None),
        ({".lock": ""}, None),
        ({".lock": "", ".config.yaml.999999999.part": "for"}, None),
        ({"preflight.json": "{}"}, None),
        ({"config.yaml": BEGUN}, None),
        ({"config.yaml": BEGUN, "versions.json": "{}", "metrics.jsonl": "", "checkpoints/x": ...}, None),
        ({"config.yaml": BEGUN, "samples.jsonl": '{"step": 0, "prompt": "a", "reply": "b"}\n'}, None),
        ({"config.yaml": BEGUN, "metrics.jsonl": '{"step": 1}\n'}, "holds another run"),
        ({"config.yaml": BEGUN, "checkpoints/checkpoint-2/optimizer.pt": ""}, "holds another run"),
        ({"config.yaml": BEGUN, "summary.json": "{}"}, "holds another run"),
        ({"config.yaml": BEGUN, "notes.txt": ""}, "holds another run"),
        ({"config.yaml": "model: mine\n"}, "holds another run"),
        ({"config.yaml": "{"}, "holds another run"),
        ({"notes.txt": ""}, "holds other files"),
        ({"preflight.json": "{}", "rows.jsonl": ""}, "holds other files"),
        ({".hidden": ""}, "holds other files"),
    ],
)  # fmt: skip
def test_only_what_a_dead_run_leaves_is_taken_over(tmp_path, files, message):
    path = tmp_path / "run"
    path.mkdir()
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if text is not ...:
            (path / name).write_text(text)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        RunFolder.create(path)
    assert all((path / name).exists() for name, text in files.items() if text is not ...)
    if not message:
        with RunFolder.create(path).lock("train"):
            assert not list(path.glob(".*.part"))


@pytest.mark.heavy
def test_a_run_killed_before_its_first_step_is_taken_over_by_the_same_command(tmp_path):
    command = [
        "train",
        "--max-steps",
        "2",
        "--limit",
        "40",
        "--eval-rows",
        "40",
        "--max-new-tokens",
        "40",
        "--output",
        "my run",
    ]
    process, path = Process(COMMAND, *command, cwd=tmp_path), tmp_path / "my run"
    while not (path / "versions.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    done = qlora_nb("train", "--resume", "my run", cwd=tmp_path)
    assert done.returncode == 2 and "is being written by process" in done.stderr, "not while it lives"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (path / ".lock").exists() and not (path / "metrics.jsonl").exists()
    command[command.index("--eval-rows") + 1] = "0"
    done = qlora_nb(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == str(path), done.stderr[-2000:]
    assert not (path / ".lock").exists() and read_config(path / "config.yaml")["eval_rows"] == 0


def test_a_folder_without_settings_names_the_way_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 2 and "is not a run folder (it has no config.yaml)" in done.stderr
    assert "give the first command again: its output folder is taken over" in done.stderr


def test_what_a_killed_writer_was_about_to_replace_is_there(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "weights").write_text("old")
    with write_aside(path, folder=True) as part:
        (part / "weights").write_text("new")
    assert (path / "weights").read_text() == "new" and os.listdir(tmp_path) == ["adapter"]
    # a file system that can't exchange two folders, and a process that ends between the two renames
    monkeypatch.setattr(core, "exchange_paths", lambda *_: False)
    monkeypatch.setattr(core, "shutil", None)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if to.suffix == ".old" else os._exit(9))
    if not (child := os.fork()):
        with write_aside(path, folder=True) as part:
            (part / "weights").write_text("newer")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert not path.exists() and len(os.listdir(tmp_path)) == 2
    with RunFolder(tmp_path).lock("train"):
        assert sorted(os.listdir(tmp_path)) == [".lock", "adapter"] and (path / "weights").read_text() == "new"


# --- commands that are printed --------------------------------------------------------------------------------------


def test_a_printed_command_can_be_pasted(tmp_path):
    folder = RunFolder(tmp_path / "my run; touch X")
    said = folder.how_to_resume()
    command = re.search(r"resume it with (.*) \(in Python: ", said)[1]
    assert shlex.split(command) == ["qlora_nb", "train", "--resume", str(folder.path)]
