"""What reaches a terminal, and what leaves the machine: no control sequence, no path, usual modes, private caches."""

import json
import os
import re
import shutil
import socket
import traceback

import pytest
import yaml
from processes import qlora_nb

from qlora_nb.core import EMBEDDED_MODEL, UserError, format_json, make_cache_folder
from qlora_nb.run import copy_embedded_run
from qlora_nb.session import print_piece

# Sets the title, clears the screen, goes back, turns the line, ends in C1 and in what has no width.
HOSTILE = "a\x1b]0;t\x07\x1b[2J\rb\u202ec\x9bd\u200be\x7f\u2066"
NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
TINY = {"QLORA_NB_PROFILE": "tiny"}


def check_shown(text):
    "No control character, but for a carriage return at the head of a progress bar's write."
    found = NOT_SHOWN.search(re.sub(r"\r(?=[ \d]|$)|(?<=\s)\r", "", text, flags=re.M))
    assert not found, ascii(text[max(0, found.start() - 200) : found.end() + 100])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "A folder in which all has the hostile name: rows, their columns and texts, code, a model, a run and its records."
    place = tmp_path_factory.mktemp("hostile")
    rows = [{"prompt": f"{HOSTILE} {i}", HOSTILE: HOSTILE, "response": f"{HOSTILE}{i}"} for i in range(20)]
    (place / f"{HOSTILE}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "columns.jsonl").write_text(json.dumps({HOSTILE: 1, f"{HOSTILE}2": 2}) + "\n")
    text = HOSTILE.replace("\r", "")
    (place / f"{HOSTILE}.py").write_text(
        f"import trl  # {text}\nT = trl.SFTTrainer(tokenizer='{text}', max_seq_length=1)\n"
    )
    shutil.copytree(EMBEDDED_MODEL, place / HOSTILE)
    copy_embedded_run(place).rename(place / "run")
    run = place / f"{HOSTILE}run"
    shutil.copytree(place / "run", run)
    (run / "diagnosis.json").write_text(
        json.dumps([{"severity": "error", "code": HOSTILE, "cause": HOSTILE, "fix": HOSTILE}])
    )
    (place / "bad.yaml").write_text(json.dumps({HOSTILE: 1}))
    return place


def read_commands(text):
    "Commands, one a line; @ is the hostile name."
    return [[word.replace("@", HOSTILE) for word in line.split()] for line in text.strip().splitlines()]


# One for each door, and what each quotes.
COMMANDS = read_commands("""
    train --config bad.yaml
    train -d columns.jsonl
    plan -m @ --gpu @
    doctor @.py
    doctor @.py --json
    diagnose @run
    compare @run run --json
    export @no
    @
""")
MORE_COMMANDS = read_commands("""
    train -m @/no
    train --resume @run
    train --optim @
    train --plan @
    train --output @run
    train --@
    train --limit @
    train -m @ -d @.jsonl -o @new --max-steps 2 --eval-rows 2 --eval-steps 1 --sample-prompts @ --max-new-tokens 2
    check @.jsonl
    check @.jsonl --json
    answer one.txt @run --max-new-tokens 1
    check -m @ @.jsonl
    check @.jsonl --columns prompt=@,response=@x
    plan -m @
    plan -m @ --gpu T4 --json
    recommend -m @ -d @.jsonl
    recommend -m @ --rows 9 --json --config @.yaml
    report @run
    report @no
    diagnose @run --json
    compare @run run
    chat @run --message @ --max-new-tokens 4
    chat @run --model @
    evaluate @run -d @.jsonl --limit 2 --max-new-tokens 2
    export @ --quantization @
    export @ -o @.gguf
    modelfile @run @.gguf --name @
    certify @run
    chat @.gguf --message @ --max-new-tokens 2
    publish @run --repo me/x --dry-run
    publish @run --repo @
    info --json
    --show-completion
""")


@pytest.mark.parametrize(
    "commands", [COMMANDS, pytest.param(MORE_COMMANDS, marks=pytest.mark.heavy)], ids=["each door", "all"]
)
def test_no_command_shows_a_control_character(hostile, commands):
    (hostile / "one.txt").write_text(HOSTILE.replace("\r", "") + "\n")
    named = 0
    for arguments in commands:
        done = qlora_nb(*arguments, cwd=hostile, env=TINY)
        print(arguments[:2], done.returncode, ascii(done.stdout[-150:]), ascii(done.stderr[-300:]))
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        check_shown(done.stdout + done.stderr)
        named += r"\x1b[2J" in done.stdout + done.stderr or r"\u001b[2J" in done.stdout
        if "--json" in arguments:
            json.loads(done.stdout)
    assert named > len(commands) / 2


def test_json_holds_the_value_itself():
    assert json.loads(format_json({HOSTILE: "é"}, indent=2)) == {HOSTILE: "é"}
    assert not NOT_SHOWN.search(format_json({HOSTILE: "é"}, indent=2)) and "é" in format_json({HOSTILE: "é"})


def test_a_reply_is_shown_escaped_however_it_comes_in_pieces(capsys):
    for piece in ("a\x1b", "[2J\n", "\rb\t\u202e"):
        print_piece(piece)
    assert capsys.readouterr().out == "a\\x1b[2J\n\\rb\t\\u202e"


def test_an_error_of_ours_is_shown_escaped_in_python_too():
    assert str(UserError(f"there is no {HOSTILE}")).isprintable()
    assert "\x1b" not in "".join(traceback.format_exception(UserError(HOSTILE)))


MARK = "ann_Zq7x"  # in the name of every folder


@pytest.fixture(
    scope="module", params=[0o027, *(pytest.param(mask, marks=pytest.mark.heavy) for mask in (0o022, 0o077))]
)
def shared(request, tmp_path_factory):
    "A run on absolute paths in folders with that name, its export, and what would be published; with a umask."
    home = tmp_path_factory.mktemp(MARK)
    base = home / ".cache/huggingface/hub/models--org--name/snapshots/0123"
    shutil.copytree(EMBEDDED_MODEL, base)
    rows = [{"question": f"What is {i} + {i}?", "answer": f"The answer is {2 * i}."} for i in range(40)]
    for name in ("rows", "old"):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"cwd": home, "env": {**TINY, "HOME": str(home)}, "first": f"import os; os.umask({request.param})"}
    settings = [
        "--max-steps",
        "2",
        "--save-steps",
        "1",
        "--eval-rows",
        "2",
        "--max-new-tokens",
        "4",
        "--eval-steps",
        "1",
        "--sample-prompts",
        "1",
    ]
    for arguments in (
        [
            "train",
            "-m",
            base,
            "-d",
            home / "rows.jsonl",
            "--base-data",
            home / "old.jsonl",
            "-o",
            home / "run",
            *settings,
        ],
        ["export", home / "run"],
        ["modelfile", home / "run", home / "run/run-Q8_0.gguf"],
        [
            "publish",
            home / "run",
            "--repo",
            "me/it",
            "--what",
            "adapter,gguf",
            "--dry-run",
            "--license",
            "mit",
            "-o",
            home / "out",
        ],
    ):
        done = qlora_nb(*arguments, **how)
        assert done.returncode == 0, done.stderr[-3000:]
    return home, request.param, how


def test_what_others_get_names_no_place(shared):
    home, _, how = shared
    private = [home / "run/config.yaml", *(home / "run/checkpoints").rglob("*")]  # which are not given away
    words = [MARK, *([socket.gethostname()] if len(socket.gethostname()) > 6 else [])]
    for file in [*(home / "run").rglob("*"), *(home / "out").rglob("*")]:
        if file.is_file() and file not in private:
            content = file.read_bytes()
            assert not [word for word in words if word.encode() in content], file
    assert not [*(home / "run").rglob("training_args.bin")]
    config = yaml.safe_load((home / "run/config.yaml").read_text())
    assert MARK in config["model"] and MARK in config["data"]  # the run knows where they were
    for folder in ("run/adapter", "out"):
        assert json.loads((home / folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    page = (home / "run/report.html").read_text()
    assert "org/name" in page and "rows.jsonl" in page
    assert "While it was trained" in (home / "run/report.md").read_text()


def test_an_adapter_finds_its_base_by_its_run_and_says_so_without(shared):
    home, _, how = shared
    ask = ["--message", "2+2?", "--max-new-tokens", "1"]
    done = qlora_nb("chat", home / "run/adapter", *ask, **how)
    assert done.returncode == 0, done.stderr
    shutil.copytree(home / "run/adapter", home / "alone", dirs_exist_ok=True)
    done = qlora_nb("chat", home / "alone", *ask, **how)
    assert done.returncode == 2 and "name its base: --base" in done.stderr, done.stderr


def test_all_files_have_the_mode_of_the_umask(shared):
    home, mask, _ = shared
    for place in [*(home / "run").rglob("*"), *(home / "out").rglob("*")]:
        wanted = (0o777 if place.is_dir() else 0o666) & ~mask
        assert place.stat().st_mode & 0o777 == wanted, (place, oct(place.stat().st_mode))


def as_user(number, call):
    "The result of a call, or its error's text, as another user, in a fork."
    ends = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setgroups([])
            os.setgid(number)
            os.setuid(number)
            os.write(ends[1], str(call()).encode())
        except Exception as error:
            os.write(ends[1], f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return os.read(ends[0], 10_000).decode()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become another user")
def test_a_cache_is_its_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    for folder in (tmp_path, *tmp_path.parents):
        if (
            folder.stat().st_uid == 0
            and folder != folder.parent
            and folder.is_relative_to("/tmp")
            and str(folder) != "/tmp"
        ):
            folder.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o1777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    mine, theirs = 65531, 65532
    assert as_user(mine, lambda: make_cache_folder("code")) == f"{home}/qlora_nb/code"
    assert (home / "qlora_nb").stat().st_mode & 0o777 == 0o700
    elsewhere = f"{tmp_path}/tmp/qlora_nb-{theirs}/code"
    assert as_user(theirs, lambda: make_cache_folder("code")) == elsewhere  # one's own place is taken by another
    shutil.rmtree(home / "qlora_nb")
    (tmp_path / "target").mkdir()
    os.chown(tmp_path / "target", theirs, theirs)
    (home / "qlora_nb").symlink_to(tmp_path / "target")  # a trap: the folder is theirs, and the link another's
    os.chown(home / "qlora_nb", mine, mine, follow_symlinks=False)
    assert as_user(theirs, lambda: make_cache_folder("code")) == elsewhere
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("HOME")
    assert (
        as_user(65530, lambda: make_cache_folder("code")) == f"{tmp_path}/tmp/qlora_nb-65530/code"
    )  # a user without a home
    (tmp_path / "tmp").chmod(0o755)
    assert as_user(65529, lambda: make_cache_folder("code")).startswith("UserError: no private cache can be made in")
