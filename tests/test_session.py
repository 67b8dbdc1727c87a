"""The conversation at the command line: a real terminal, Ctrl-C, pipes, files of prompts; --help, flags, publishing."""

import json
import re

import pytest
from processes import COMMAND, Process, qlora_nb
from repository import accept_changes

from qlora_nb.core import UserError
from qlora_nb.run import Settings, copy_embedded_run

# A person at a terminal of their own, who types a line once the prompt or a reply is there, and presses Ctrl-C in one.
PERSON = """
import os, pty, signal, threading
outer, inner = pty.openpty()
os.dup2(inner, 0), os.dup2(inner, 1)
sys_pid, screen = os.getpid(), []

def read_until(*wanted):
    while not any(text in "".join(screen) for text in wanted):
        screen.append(os.read(outer, 1 << 16).decode("utf-8", "replace"))

def person():
    lines = ["/system Be brief.", "What is 3 + 4?", None, "/sytem", "What is 5 + 6?", "/save talk.jsonl", "/exit"]
    for text, wait in zip(lines, ["> ", "> ", "The answer", "> ", "> ", "answer is 11.", "> "]):
        read_until(wait)
        screen.clear()
        if text is None:
            os.kill(sys_pid, signal.SIGINT)
        else:
            os.write(outer, f"{text}\\n".encode())
    while True:
        os.read(outer, 1 << 16)

threading.Thread(target=person, daemon=True).start()
"""


def test_a_conversation_at_a_terminal(tmp_path):
    "Ctrl-C ends a reply, not the session; a wrong command is named; what was said is saved, cut replies with weight 0."
    process = Process(COMMAND, "chat", "--temperature", "0", cwd=tmp_path, first=PERSON)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert "/help lists the commands" in err and "system text: Be brief." in err and "there is no command /sytem" in err
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    first, second = row["messages"][2], row["messages"][4]
    assert second["content"] == "The answer is 11." and "weight" not in second
    if "(interrupted)" in err:  # the reply has seven tokens: now and then it is complete before Ctrl-C is there
        assert "The answer is 7.".startswith(first["content"]) and first["weight"] == 0


def test_a_pipe_of_questions_and_commands(tmp_path):
    "With --history a pipe is one conversation; the first wrong command ends it, after what was answered before."
    lines = "What is 3 + 4?\n//exit\n/save talk.jsonl\n/nope\nWhat is 1 + 1?\n"
    done = qlora_nb("chat", "--history", "--temperature", "0", "--max-new-tokens", "8", cwd=tmp_path, input=lines)
    assert done.returncode == 2 and done.stderr.strip().endswith(
        "there is no command /nope: /help lists them, and // begins a message with a slash"
    )
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    asked = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    assert asked == ["What is 3 + 4?", "/exit"]
    assert done.stdout == "".join(turn["content"] + "\n" for turn in row["messages"] if turn["role"] == "assistant")


def test_reset_forgets_what_was_said_and_keeps_the_system_text(tmp_path):
    "Also how far a full context has pushed it: two long questions after /reset fill it as two before did."
    fills = [f"{'apple ' * 550}What is {i} + 4?" for i in (1, 2, 3, 4)]
    lines = ["/system Be brief.", *fills[:2], "/reset", *fills[2:], "/reset", "What is 3 + 4?", "/save talk.jsonl"]
    arguments = ("chat", "--history", "--temperature", "0", "--max-new-tokens", "8")
    done = qlora_nb(*arguments, cwd=tmp_path, input="\n".join(lines))
    assert done.returncode == 0, done.stderr[-1500:]
    said = [
        line.partition(": ")[2] or line for line in done.stderr.splitlines() if "forgotten" in line or "full" in line
    ]
    full, forgotten = "the oldest question with its reply is no longer sent", "everything that was said is forgotten"
    assert said == [full, forgotten, full, forgotten]
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in row["messages"]] == ["Be brief.", "What is 3 + 4?", "The answer is 7."]


@pytest.fixture
def command(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return command


def test_a_file_of_prompts(command, tmp_path):
    rows = [
        {"prompt": "What is 3 + 4?"},
        {"prompt": "more " * 3000},
        {"prompt": None},
        {"prompt": "What is 5 + 6?", "response": "11"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("answer", "prompts.jsonl", "--max-new-tokens", "8", "-o", "replies.jsonl")
    found = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert code == 1 and out.strip() == "replies.jsonl" and "2 of 4 rows answered; no reply to rows 2, 3" in err
    assert [row["row"] for row in found] == [1, 2, 3, 4] and [("error" in row) for row in found] == [
        False,
        True,
        True,
        False,
    ]
    assert found[0] == {"row": 1, "reply": "The answer is 7.", "stopped": True, "tokens": 7}
    assert found[3]["expected"] == "11" and "context holds 2048" in found[1]["error"]
    code, out, err = command("answer", "prompts.jsonl", "-o", "replies.jsonl")
    assert (code, out) == (2, "") and "already exists" in err


@pytest.mark.parametrize("name", ["train", "chat", "answer", "evaluate", "plan", "check", "publish", "certify"])
def test_help_fits_80_columns_and_cuts_no_name(name, command):
    from qlora_nb.cli import list_flags

    code, out, _ = command(name, "-h")
    assert (
        code == 0
        and max(map(len, out.splitlines())) <= 80
        and "…" not in re.sub("cosine, …|wandb, …|'24 GB', …", "", out)
    )
    for flag in list_flags(name).values():
        long = flag.opts[0].removeprefix("--")
        assert f"--{long}" in out or f"--[no-]{long}" in out, long
    if name == "train":
        heads = re.findall(r"^(\S.*):$", out, re.M)
        assert heads == ["Model", "Data", "Adapter", "Training", "Evaluation", "Output", "Options"]
        for f in Settings.__dataclass_fields__:
            assert f == "add_system" or f"{f.replace('_', '-')} " in out or f"{f.replace('_', '-')}\n" in out, f


def test_the_commonest_flags_have_a_letter(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    code, out, _ = command("check", "-d", "rows.jsonl", "-m", "qlora_nb:embedded", "--json")
    assert code == 0 and json.loads(out)["summary"]["rows"] == 1
    code, out, _ = command("--version")
    assert code == 0 and re.fullmatch(r"qlora_nb \d+\.\d+\.\d+\n", out)
    code, out, _ = command("--help")
    assert (
        code == 0
        and [
            head in out
            for head in (
                "Before a run:",
                "Train, and look at it:",
                "Ask the model:",
                "Hand it on:",
                "--install-completion",
            )
        ]
        == [True] * 5
    )


@pytest.mark.parametrize(
    "typed, wanted",
    [("qlora_nb tr", ["train"]), ("qlora_nb train --learn", ["--learning-rate"]), ("qlora_nb a", ["answer"])],
)
def test_a_shell_completes_commands_and_flags(typed, wanted, tmp_path):
    "What the lines that --install-completion adds to bash's start ask for."
    asks = {"_QLORA_NB_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    first = "import sys; sys.argv[0] = 'qlora_nb'"  # a shell calls it by this name
    done = qlora_nb(cwd=tmp_path, env=asks, first=first)
    assert done.returncode == 0 and done.stdout.split() == wanted, done.stderr[-1000:]


def test_check_json_names_every_row(command, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": None if i % 2 else str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = command("check", "rows.jsonl", "--json")
    found = {finding["code"]: finding for finding in json.loads(out)["findings"]}["non_string_content"]
    assert code == 1 and found["count"] == 20 and found["rows"] == list(range(1, 40, 2))


def test_a_plan_and_an_advice_are_configurations(command, tmp_path):
    for arguments in (("plan", "--gpu", "T4"), ("recommend", "--rows", "500", "--device", "T4")):
        file = f"{arguments[0]}.yaml"
        code, _, err = command(*arguments, "-c", file)
        assert code == 0 and "qlora_nb train --config" in err, err[-1500:]
        code, _, err = command("train", "-c", file, "-d", "none.jsonl")
        assert code == 2 and "no file or folder none.jsonl" in err, "the file was read, and then the data was missing"


def test_a_run_is_published_without_what_is_private(command, tmp_path, monkeypatch):
    "No place of this machine, no held-out row unless it is asked for; without a token nothing is built."
    run = copy_embedded_run(tmp_path / "private-place")
    row = json.loads((run / "evaluation.jsonl").read_text().splitlines()[0])
    code, out, err = command("publish", run, "--repo", "someone/apples", "--dry-run", "-o", "hub")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "hub"), err[-1500:]
    assert "--example puts" in out and "README.md" in out
    for file in (tmp_path / "hub").rglob("*"):
        assert b"private-place" not in file.read_bytes() and row["problem"].encode() not in file.read_bytes(), file
    assert not list((tmp_path / "hub").rglob("*.jsonl"))
    code, out, _ = command("publish", run, "--repo", "someone/apples", "--dry-run", "--example", "--json")
    assert code == 0 and row["problem"] in json.loads(out)["card"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, out, err = command("publish", run, "--repo", "someone/apples", "-o", "other")
    assert (code, out) == (2, "") and "there is no token" in err and not (tmp_path / "other").exists()


def test_a_base_that_only_this_machine_has_is_not_published_by_its_path(tmp_path):
    import yaml

    from qlora_nb.publishing import push_to_hub

    run = copy_embedded_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump(config | {"model": str(tmp_path / "base"), "data": str(tmp_path / "acme/rows.jsonl")})
    )
    accept_changes(run)
    with pytest.raises(UserError, match="only this machine has.*--base-model"):
        push_to_hub(run, "a/b", dry_run=True)
    with pytest.raises(UserError, match="the licence of some/base is not known"):
        push_to_hub(run, "a/b", dry_run=True, base_model="some/base")
    found = push_to_hub(run, "a/b", dry_run=True, base_model="some/base", license="mit", output=tmp_path / "hub")
    assert json.loads((tmp_path / "hub/adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    settings = yaml.safe_load((tmp_path / "hub/training.yaml").read_text())
    assert (settings["model"], settings["data"]) == ("some/base", "rows.jsonl")
    assert "base_model: some/base" in found.card and "rows.jsonl" in found.card and str(tmp_path) not in found.card
