"""The command line and the user's own rows: named columns, bad rows left out or written off, a template's switches."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import qlora_nb
from transformers import AutoTokenizer

from qlora_nb import ollama_export
from qlora_nb.cli import main, write_good_rows
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.go_template import render_go
from qlora_nb.modelfile import parse_modelfile
from qlora_nb.ollama_export import modelfile_for, to_ollama_data, to_ollama_messages
from qlora_nb.preflight import DatasetReport
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RunFolder, copy_embedded_run, pin_template_kwargs, read_own_config, resolve_settings
from qlora_nb.template import encode, prompt_ids, render
from qlora_nb.template_choice import TemplateDecision

GOOD = [{"frage": f"How many are {i} + {i + 1}?", "antwort": f"They are {2 * i + 1}."} for i in range(40)]
BAD = [
    {"frage": "What is nothing?", "antwort": ""},
    {"frage": "What is null?", "antwort": None},
    {"frage": "What was cut off?", "antwort": ""},
]
ROWS = [*GOOD[:10], BAD[0], *GOOD[10:], BAD[1], GOOD[3], BAD[2], GOOD[5]]  # bad: 10, 41, 43; repeated: 42, 44
COLUMNS = ("--columns", "prompt=frage,response=antwort")
SHORT = ("--max-steps", "2", "--warmup-steps", "0", "--eval-rows", "4", "--max-new-tokens", "4")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the user's rows, in which commands run."
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "held.jsonl", [GOOD[7], {"frage": "How many are 100 + 1?", "antwort": "They are 101."}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_NB_PROFILE", "tiny")
    return tmp_path


def run_command(capsys, *arguments):
    "(exit code, stdout, stderr) of a command in this process."
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code or 0, *capsys.readouterr()


def test_check_names_every_row_and_writes_the_good_ones(place, capsys):
    code, out, _ = run_command(capsys, "check", "rows.jsonl", *COLUMNS, "--json")
    found = json.loads(out)
    assert code == 1 and found["invalid_rows"] == [10, 41, 43] and found["duplicate_rows"] == [42, 44]
    assert found["summary"]["usable"] == len(ROWS) - 3

    how = ("--eval-data", "held.jsonl", "--drop-duplicates", "--write", "good.jsonl")
    code, out, err = run_command(capsys, "check", "rows.jsonl", *COLUMNS, *how)
    assert code == 0 and "good.jsonl: 39 rows written; left out: 3 invalid, 1 leaked, 2 duplicate" in err
    wanted = [row for row in GOOD if row is not GOOD[7]]
    rows = load_sft_dataset("good.jsonl", system=False)
    turns = [[turn["content"] for turn in messages] for messages in rows["messages"]]
    assert turns == [[row["frage"], row["antwort"]] for row in wanted]

    code, out, _ = run_command(capsys, "check", "good.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and found["summary"]["usable"] == 39 and found["invalid_rows"] == found["duplicate_rows"] == []
    before = Path("good.jsonl").read_bytes()
    code, _, err = run_command(capsys, "check", "rows.jsonl", *COLUMNS, "--write", "good.jsonl")
    assert code == 2 and "--overwrite" in err and Path("good.jsonl").read_bytes() == before
    write_jsonl(place / "silent.jsonl", BAD)
    code, out, err = run_command(capsys, "check", "silent.jsonl", *COLUMNS, "--write", "good.jsonl", "--overwrite")
    assert code == 1 and "empty_content" in out and "good.jsonl: not written, since no row is left" in err
    assert Path("good.jsonl").read_bytes() == before
    code, _, _ = run_command(capsys, "check", "rows.jsonl", *COLUMNS, "--write", "good.jsonl", "--overwrite")
    assert code == 0 and len(Path("good.jsonl").read_text().splitlines()) == 42


def test_written_rows_load_back_with_their_tools_and_reasoning(place, capsys):
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "rain", "arguments": {"zip": 1, "a": [None, {"b": "ü"}]}},
    }
    talk = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "Sun?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "It is dry."},
    ]
    write_jsonl(place / "tools.jsonl", [{"messages": talk, "tools": [tool]}, {"messages": [*talk[:1], *talk[3:]]}])
    for streaming in (True, False):
        rows = load_sft_dataset("tools.jsonl", streaming=streaming)
        report = DatasetReport([], {"rows": 2, "usable": 2})
        write_good_rows(rows, report, place / "again.jsonl", drop_duplicates=False)
        found = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
        assert found == [{"messages": talk, "tools": [tool]}, {"messages": [*talk[:1], *talk[3:]]}]
        arguments = found[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert json.dumps(arguments) == json.dumps(call["function"]["arguments"])  # the order of its keys, too


HEADER = "<|start_header_id|>system<|end_header_id|>"
SWITCH = f"{{% if terse is defined and terse %}}{{{{ '{HEADER}\\n\\nBe terse.<|eot_id|>' }}}}{{% endif %}}"


@pytest.fixture
def switched(place):
    "The embedded model, with a template that has a switch."
    shutil.copytree(EMBEDDED_MODEL, place / "model")
    text = (place / "model/chat_template.jinja").read_text()
    head, bos, rest = text.partition("bos_token }}")
    (place / "model/chat_template.jinja").write_text(head + bos + SWITCH + rest)
    return place / "model"


def test_bad_rows_stop_a_run_without_a_trace_or_are_left_out_and_counted(switched, place, capsys):
    how = ("train", "--model", "model", "--data", "rows.jsonl", *COLUMNS, *SHORT, "--output", "run")
    code, out, err = run_command(capsys, *how)
    assert code == 2 and out == "" and not (place / "run").exists(), err[-2000:]
    assert "--drop-invalid" in err.splitlines()[-1] and "check --write FILE" in err.splitlines()[-1]
    done = qlora_nb(*how, "--drop-invalid", "--drop-duplicates", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 of 41 rows have an error and were left out" in done.stderr
    assert "2 of 41 rows repeat an earlier row and were left out" in done.stderr
    config = yaml.safe_load((place / "run/config.yaml").read_text())
    assert config["drop_invalid"] and config["columns"] == {"prompt": "frage", "response": "antwort"}
    read = config["rows_read"]
    assert (read["rows"], read["invalid"], read["duplicate"], read["left_out"]) == (36, 3, 2, 0)
    summary = json.loads((place / "run/summary.json").read_text())
    assert (summary["data"]["invalid"], summary["data"]["duplicate"]) == (3, 2)
    asked = [json.loads(line) for line in (place / "run/evaluation.jsonl").read_text().splitlines()]
    assert {row["problem"] for row in asked} <= {row["frage"] for row in GOOD} and len(asked) == 8


def test_switches_reach_all_that_follows_a_run(switched, place, capsys, monkeypatch):
    write_jsonl(place / "good.jsonl", GOOD)
    how = ("--model", "model", "--data", "good.jsonl", *COLUMNS, *SHORT, "--template-kwargs", "terse=true")
    done = qlora_nb("train", *how, "--output", "run", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = RunFolder.open(place / "run")
    assert folder.config["template_kwargs"] == {"terse": True}

    base, own = AutoTokenizer.from_pretrained(switched), AutoTokenizer.from_pretrained(folder.adapter)
    talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2."}]
    plain, terse = (render(talk, base, template_kwargs=kwargs) for kwargs in (None, {"terse": True}))
    assert "Be terse." in terse and "Be terse." not in plain
    assert render(talk, own) == terse  # whoever opens the adapter gets what was trained
    assert encode(talk, own) == encode(talk, base, template_kwargs={"terse": True})
    assert prompt_ids(talk[:1], own) == prompt_ids(talk[:1], base, template_kwargs={"terse": True})

    (place / "run/empty.gguf").touch()
    kept = lambda file, text, *more, **settings: TemplateDecision(text, None, None)  # noqa: E731
    monkeypatch.setattr(ollama_export, "decide_template", kept)
    text = parse_modelfile(modelfile_for(place / "run", place / "run/empty.gguf").read_text()).one("TEMPLATE")
    assert own.bos_token + render_go(text, to_ollama_data(to_ollama_messages(talk))) == terse

    code, _, err = run_command(capsys, "chat", "run", "--message", "1 + 1?", "--template-kwargs", "terse=false")
    assert code == 2 and "was trained with terse=True" in err
    (place / "own.yaml").write_text("template_kwargs: terse\n")
    with pytest.raises(UserError, match="template_kwargs is 'terse': give name=value"):
        resolve_settings({}, read_own_config("own.yaml"))


@pytest.mark.parametrize("value", [True, 3, 2.5, None, 'a "b"\n{{ c }}', ["x", {"y": False}], "é 東"])
def test_a_pinned_switch_renders_as_a_passed_one(value):
    import jinja2

    loop = "{% for m in messages %}{{ show(level) }}{{ level is none }}{% endfor %}"
    text = "\n{% macro show(v) %}[{{ v | tojson }}]{% endmacro %}" + loop
    for options in ({}, {"trim_blocks": True, "lstrip_blocks": True}):
        template = jinja2.Environment(**options).from_string
        if not options:
            text = text.lstrip("\n")
        wanted = template(text).render(messages=[1, 2], level=value)
        assert template(pin_template_kwargs(text, {"level": value})).render(messages=[1, 2]) == wanted


def test_plan_says_which_file_it_misses(place, capsys):
    (place / "bare").mkdir()
    shutil.copy(EMBEDDED_MODEL / "config.json", place / "bare")
    write_jsonl(place / "good.jsonl", GOOD)
    how = ("plan", "--model", "./bare", "--gpu", "T4", "--data", "good.jsonl", *COLUMNS)
    code, out, err = run_command(capsys, *how)
    assert code == 2 and out == "" and "bare has no tokenizer (tokenizer.json)" in err and "safetensors" not in err
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_MODEL / name, place / "bare")
    code, out, err = run_command(capsys, *how)
    assert code == 0 and "rows: 40 of mean" in out, err


def test_a_run_from_before_the_setting_learned_the_last_reply(tmp_path):
    run = copy_embedded_run(tmp_path)
    assert "train_on" not in yaml.safe_load((run / "config.yaml").read_text())
    assert RunFolder.open(run).config["train_on"] == read_own_config(run / "config.yaml")["train_on"] == "last"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check", "rows.jsonl", "--columns", "frage"], "columns is 'frage': give name=value"),
        (["check", "rows.jsonl", "--columns", "prompt=frage,response=none"], "none"),
        (["check", "rows.jsonl", "--data", "rows.jsonl"], "given twice"),
        (["check", "rows.jsonl", "--write", "rows.csv"], "not a .jsonl file"),
        (["check", "rows.jsonl", *COLUMNS, "--train-on", "first"], "train_on is 'first'"),
        (["check", "rows.jsonl", *COLUMNS, "--template-kwargs", "messages=1"], "isn't a chat template's switch"),
        (["train", "--data", "rows.jsonl", *COLUMNS, "--train-on", "first"], "train_on is 'first': choose all or last"),
    ],
)
def test_mistakes(arguments, message, place, capsys):
    code, out, err = run_command(capsys, *arguments)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_templates_switches_are_set_in_all_its_forms(tmp_path):
    "A tokenizer may have one form for tools beside the usual one; neither is lost where switches are set."
    from qlora_nb.training import with_template

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    usual = tokenizer.chat_template
    tokenizer.chat_template = {
        "default": usual,
        "tool_use": "{{ terse }} {{ tools | tojson }} {{ messages[0].content }}",
    }
    with_template(tokenizer, None, {"terse": "short"}).save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    asked = {"conversation": [{"role": "user", "content": "Rain?"}], "tokenize": False}
    assert found.apply_chat_template(**asked, tools=[{"name": "rain"}]) == 'short [{"name": "rain"}] Rain?'
    assert found.chat_template["default"] == pin_template_kwargs(usual, {"terse": "short"})
    assert tokenizer.chat_template["default"] == usual
    assert with_template(tokenizer, "llama-3.1", {"terse": "short"}).chat_template.count("terse") == 1
