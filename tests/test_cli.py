"""The command line: the main job, mistakes, interrupts, a full disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import COMMAND, Process, qlora_nb, wait_for
from repository import ROOT

from qlora_nb.core import EMBEDDED_FOLDER
from qlora_nb.run import copy_embedded_run

FRESH = [sys.executable, "-c", COMMAND]
SHORT = ["--max-steps", "12", "--eval-rows", "0", "--save-steps", "4", "--limit", "200"]


def fresh_qlora_nb(*arguments, cwd, **more):
    "In a new interpreter, which imports what it needs by itself."
    command = [*FRESH, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, **more)


def sha(run):
    return json.loads((Path(run) / "summary.json").read_text())["adapter_sha256"]


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.heavy)])
def demo(request, tmp_path_factory):
    """What `make demo` does: train with no argument, then export and certify.

    On a push it is a fifteenth as long; there the quick start's notebook trains all 300 steps."""
    place = tmp_path_factory.mktemp("demo")
    less = ["--max-steps", "20", "--eval-rows", "4"] if request.param == "short" else []
    done = fresh_qlora_nb("train", "--export", "q8_0", *less, cwd=place)
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(done.stdout.splitlines()[-1]), done, (20, 4) if less else (300, 200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The run that comes with the package, exported by the command: it answers well."
    place = tmp_path_factory.mktemp("finished")
    run = copy_embedded_run(place)
    done = qlora_nb("export", run, "--quantization", "q8_0", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return run, place / done.stdout.strip()


def test_the_main_job(demo):
    run, done, (steps, held_out) = demo
    assert run.is_absolute() and run.parent.name == "runs"
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    rows = [json.loads(line) for line in open(run / "evaluation.jsonl")]
    assert len(rows) == 2 * held_out and sum(row["stage"] == "after" for row in rows) == held_out
    assert before["exact"] <= 0.25 and after["loss"] < 0.6 * before["loss"], summary
    if steps == 300:
        assert after["exact"] >= 0.80 and after["form"] >= 0.95 and after["stops"] >= 0.98, after
    assert before["base_perplexity"] > 1 and after["base_perplexity"] > 1
    assert summary["backend"] == "transformers" and summary["steps"] == steps
    print(f"before {before}, after {after}, {summary['seconds']} s")


def test_what_is_served_is_what_was_trained(demo):
    run, done, _ = demo
    summary, certificate = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "certificate"))
    assert summary["certified"] is True and certificate["passed"] is True and certificate["failures"] == []
    (gguf,) = run.glob("*.gguf")
    assert gguf.name == f"{run.name}-Q8_0.gguf" and f"FROM ./{gguf.name}" in (run / "Modelfile").read_text()
    assert "PASSED" in done.stderr and summary["seconds"] > summary["train_seconds"]
    assert "certified yet" not in (run / "report.html").read_text()


def test_chat_with_the_file(finished, tmp_path):
    run, gguf = finished
    story = "Mia has 12 apples. She buys 5 bags of 3 apples. She gives 7 to Tom. How many apples does Mia have now?"
    asked = ("--message", story, "--temperature", "0")
    served = qlora_nb("chat", gguf, *asked, cwd=tmp_path)
    assert served.returncode == 0, served.stderr[-2000:]
    assert served.stdout.startswith("<think>") and served.stdout == qlora_nb("chat", run, *asked, cwd=tmp_path).stdout
    short = ("--temperature", "0", "--max-new-tokens", "5")
    lines = qlora_nb(
        "chat", gguf, *short, cwd=tmp_path, input="What is 2 + 2?\n\nWhat is 3 + 4?\nWhat is 2 + 2?\n"
    ).stdout
    alone = qlora_nb("chat", gguf, *short, "--message", "What is 3 + 4?", cwd=tmp_path).stdout
    first = lines[: (len(lines) - len(alone)) // 2]
    assert first and lines == first + alone + first, "a line of a pipe is a question of its own"


def test_what_a_gguf_is_not_asked_with(mistake):
    mistake(["chat", "gone.gguf", "--message", "x"], "there is no file gone.gguf")
    mistake(["chat", "gone.gguf", "--message", "x", "--backend", "unsloth"], "a GGUF can't be combined with")


def test_the_commands_after_a_run(finished, tmp_path):
    run, _ = finished
    done = qlora_nb("export", run / "adapter", "--quantization", "f16,q4_k_m", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    files = done.stdout.split()
    assert [Path(file).name for file in files] == ["out-F16.gguf", "out-Q4_K_M.gguf"] and all(
        map(os.path.isfile, files)
    )
    done = qlora_nb("modelfile", run, files[0], cwd=tmp_path)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == "Modelfile" and "ollama create" in done.stderr
    done = qlora_nb(
        "certify", run, files[0], "--rows", "20", "--model-rows", "4", "--max-new-tokens", "0", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(Path(done.stdout.strip()).read_text())["passed"] is True
    done = qlora_nb("certify", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "no GGUF" in done.stderr
    assert qlora_nb("diagnose", run, cwd=tmp_path).returncode == 0
    assert "learning_rate" in qlora_nb("recommend", "--rows", "1000", "--json", cwd=tmp_path).stdout
    assert Path(qlora_nb("report", run, cwd=tmp_path).stdout.strip()).name == "report.html"


def test_the_shares_are_counted_from_the_replies(demo):
    "What summary.json says follows from evaluation.jsonl, by a parser that shares no code with ours."
    for run in (demo[0], EMBEDDED_FOLDER / "run"):
        rows = [json.loads(line) for line in open(run / "evaluation.jsonl")]
        after = [row for row in rows if row["stage"] == "after"]
        last = [re.findall(r"\d+", row["reply"].split("</think>")[-1])[-1:] for row in after]
        wanted = [re.findall(r"\d+", row["expected"].split("</think>")[-1])[-1:] for row in after]
        exact = sum(a == b for a, b in zip(last, wanted)) / len(after)
        assert json.loads((run / "summary.json").read_text())["after"]["exact"] == pytest.approx(exact)


def test_the_run_folder(demo):
    run, _, (steps, _) = demo
    assert {path.name for path in run.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "evaluation.jsonl", "heldout.jsonl", "loss.png", "manifest.json",
        "metrics.jsonl", "preflight.json", "report.html", "report.md", "summary.json", "versions.json",
        "certificate.json", "Modelfile", f"{run.name}-Q8_0.gguf",
    }  # fmt: skip
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    assert set(metrics[0]) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_allocated"}
    shipped = [json.loads(line) for line in open(EMBEDDED_FOLDER / "run/metrics.jsonl")]
    for ours, theirs in zip(metrics[:5], shipped):  # the same rows, weights and warm-up, whatever the number of steps
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), ours
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["seed"], config["random_state"], config["r"]) == (3407, 3407, 16)
    assert set(config["fingerprints"]) == {"data", "eval_data", "template"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "versions.json").read_text())["peft"]


def test_what_others_get_holds_no_path_of_this_machine(demo):
    paths = [ROOT, demo[0].parent, f"{Path.home()}/", Path(sys.prefix)]
    for path in demo[0].rglob("*"):
        if path.is_file():
            assert not [p for p in paths if str(p).encode() in path.read_bytes()], path


def test_chat_with_the_run(finished, tmp_path):
    run, _ = finished
    story = "Mia has 12 apples. She buys 5 bags of 3 apples. How many apples does Mia have now?"
    done = qlora_nb("chat", run, "--message", story, "--temperature", "0", cwd=tmp_path)
    assert done.stdout.startswith("<think>\n") and "</think>" in done.stdout and "<|" not in done.stdout
    lines = qlora_nb(
        "chat", run, "--temperature", "0", "--max-new-tokens", "64", cwd=tmp_path, input=f"{story}\n\n{story}\n"
    )
    assert lines.stdout == done.stdout * 2


def test_evaluate_says_the_same_again(finished, tmp_path):
    run, _ = finished
    done = qlora_nb("evaluate", run, "--limit", "24", "--max-new-tokens", "112", cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in open(run / "evaluation.jsonl")]
    first = [row for row in rows if row["stage"] == "after"][:24]
    assert found["n"] == 24 and found["exact"] == pytest.approx(sum(row["exact"] for row in first) / 24)


def test_info(tmp_path):
    out = qlora_nb("info", cwd=tmp_path).stdout
    for name in ("transformers", "bitsandbytes", "device", "profile", "backend"):
        assert re.search(rf"^{name}\s+\S", out, re.M)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    done = qlora_nb("train", *SHORT, "--output", "run", cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "run"


@pytest.mark.parametrize(
    "how, code, fresh",
    [
        (signal.SIGINT, 130, False),
        pytest.param(signal.SIGINT, 130, True, marks=pytest.mark.heavy),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, True, marks=pytest.mark.heavy),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(how, code, fresh, whole, tmp_path):
    command = ["train", *SHORT, "--output", "run"]
    if fresh:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*FRESH, *command], cwd=tmp_path, **pipes)
    else:
        process = Process(COMMAND, *command, cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 6)
    process.send_signal(how)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code and out == ""
    if how == signal.SIGINT:
        assert "checkpoint saved: resume it with qlora_nb train --resume" in err and "Traceback" not in err
    assert not (tmp_path / "run/summary.json").exists()
    assert "is not finished" in qlora_nb("chat", "run", "--message", "x", cwd=tmp_path).stderr
    done = qlora_nb("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha(tmp_path / "run") == sha(whole)
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 12


def test_config_is_taken_back(whole, tmp_path):
    done = qlora_nb("train", "--config", whole / "config.yaml", "--output", "again", cwd=tmp_path)
    assert done.returncode == 0 and sha(tmp_path / "again") == sha(whole)


# What a user gets wrong. The command runs in this process (imports once), which changes nothing of what it prints.


@pytest.fixture
def mistake(capfd, monkeypatch, tmp_path):
    from qlora_nb.cli import main

    monkeypatch.setenv("QLORA_NB_PROFILE", "tiny")
    monkeypatch.chdir(tmp_path)

    def check(arguments, message):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert (stopped.value.code, out) == (2, ""), err
        last = err.strip().splitlines()[-1]
        assert last.startswith("qlora_nb: ") and re.search(message, last), err
        assert "Traceback" not in err

    return check


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "none.jsonl"], "no file or folder none.jsonl"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2, is not JSON"),
        (["--data", "ok.jsonl", "--eval-data", "broken.jsonl"], "broken.jsonl, line 2, is not JSON"),
        (["--data", "columns.csv"], "found colour, size; known are"),
        (["--model", "./none"], r"no folder \./none"),
        (["--max-length", "0"], "max_seq_length is 0"),
        (["--effective-batch", "-1"], "effective_batch is -1"),
        (["--limit", "0"], "limit is 0"),
        (["--template", "magic"], "no template 'magic'"),
    ],
)
def test_a_mistake_with_check_is_one_sentence(arguments, message, mistake, tmp_path):
    (tmp_path / "ok.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    (tmp_path / "columns.csv").write_text("colour,size\nred,3\n")
    mistake(["check", *arguments], message)


def test_check_says_it_to_people_and_to_machines(capfd, monkeypatch, tmp_path):
    from qlora_nb.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_NB_PROFILE", "tiny")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(20)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = [*rows, {"question": "What?", "answer": None}, {"question": "Tell me.", "answer": "so " * 300}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))

    def check(*arguments):
        try:
            main(["check", *arguments])
        except SystemExit as stopped:
            return stopped.code or 0, *capfd.readouterr()
        return 0, *capfd.readouterr()

    code, out, err = check("--data", "good.jsonl")
    assert code == 0 and "no findings" in out and "rows 20" in out and "read as question/answer" in err
    code, out, err = check("--data", "bad.jsonl", "--max-length", "128")
    assert code == 1 and "error: non_string_content (1; rows 20)" in out and "Traceback" not in err
    code, out, _ = check("--data", "bad.jsonl", "--max-seq-length", "128", "--json")
    found = json.loads(out)
    assert code == 1 and found["ok"] is False and found["summary"]["rows"] == 22
    rows_of = {f["code"]: (f["severity"], f["rows"]) for f in found["findings"]}
    assert rows_of["non_string_content"] == ("error", [20]) and rows_of["row_dropped"] == ("warning", [21])
    code, out, _ = check("--data", "good.jsonl", "--eval-data", "good.jsonl", "--json")
    assert code == 1 and [f["code"] for f in json.loads(out)["findings"]] == ["leakage"]
    code, out, _ = check(
        "--data", "bad.jsonl", "--limit", "20", "--max-steps", "60", "--template", "llama-3.1", "--json"
    )
    assert code == 0 and [f["code"] for f in json.loads(out)["findings"]] == ["too_few_rows"]
    assert check("--json")[0] == 0, "the embedded set on the embedded model"


def test_check_flags_are_the_settings_names():
    import inspect

    from qlora_nb.cli import TRAIN_FLAGS, check
    from qlora_nb.preflight import check_dataset
    from qlora_nb.run import Settings

    known = {*vars(Settings()), *TRAIN_FLAGS, *inspect.signature(check_dataset).parameters}
    own = {"as_json", "source", "write", "overwrite"}
    assert set(inspect.signature(check).parameters) - known == own


def small_gpt2(path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from qlora_nb.core import EMBEDDED_MODEL

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=64, vocab_size=768)).save_pretrained(path)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "./none"], r"there is no folder \./none"),
        (["--model", "file.txt"], "is a file"),
        (["--model", "empty"], "holds no config.json"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "columns.csv"], "colour"),
        (["--data", "broken.jsonl"], "broken.jsonl.*(line|row) 2"),
        (["--r", "0"], "r is 0"),
        (["--r", "200"], "k_proj has only 128 rows or columns"),
        (["--lora-alpha", "-1"], "lora_alpha is -1"),
        (["--target-modules", "q_proj,c_attn"], "no layers named c_attn"),
        (["--backend", "vllm"], "no backend 'vllm'"),
        (["--dtype", "int8"], "no dtype 'int8'"),
        (["--max-steps", "0"], "max_steps is 0"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--max-seq-length", "4096"], "takes 1 to 2048"),
        (["--output", "old"], "holds another run"),
        (["--output", "file.txt"], "is a file"),
        (["--config", "none.yaml"], "can't be read"),
        (["--config", "odd.yaml"], "unknown settings: learning_rat"),
        (["--resume", "empty"], "is not a run folder"),
        (["--optim", "magic"], "optim.*magic"),
        (["--lr-scheduler-type", "magic"], "lr_scheduler_type.*magic"),
        (["--template", "magic"], "magic"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, mistake, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("r: 16\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.csv").write_text("colour,size\nred,3\n")
    (tmp_path / "broken.jsonl").write_text('{"problem": "a", "solution": "b"}\n{"problem": \n')
    (tmp_path / "odd.yaml").write_text("learning_rat: 1\n")
    before = sorted(tmp_path.rglob("*"))
    mistake(["train", *arguments], message)
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [p for p in before if p.is_file()]
    assert (tmp_path / "old/config.yaml").read_text() == "r: 16\n"


def test_a_model_without_the_known_projections(tmp_path):
    small_gpt2(tmp_path / "gpt2")
    (tmp_path / "x.jsonl").write_text('{"problem": "1 + 1?", "solution": "2"}\n' * 30)
    arguments = ["train", "--model", "gpt2", "--data", "x.jsonl", "--max-seq-length", "512"]
    for more, message in [
        ([], "no layers named .*q_proj.*choose target_modules from .*c_attn"),
        (["--target-modules", "wte"], r"wte \(Embedding\) can't be quantized to 4 bits"),
    ]:
        done = qlora_nb(*arguments, *more, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.search(message, done.stderr.splitlines()[-1]), done.stderr


def test_a_damaged_model(mistake, tmp_path):
    import shutil

    from qlora_nb.core import EMBEDDED_MODEL

    shutil.copytree(EMBEDDED_MODEL, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    mistake(["chat", "--model", "cut", "--message", "x"], "cut/model.safetensors can't be read .*damaged")
    weights.unlink()
    mistake(["chat", "--model", "cut", "--message", "x"], "folder cut holds no .safetensors weights")
    (tmp_path / "cut/pytorch_model.bin").write_bytes(b"a pickle, which nobody reads")
    mistake(["chat", "--model", "cut", "--message", "x"], "folder cut holds no .safetensors weights")


def test_a_hub_model_that_is_not_to_be_had(mistake):
    mistake(["chat", "--model", "nobody/no-such-model", "--message", "x"], "nobody/no-such-model can't be loaded")


def test_a_full_disk_is_found_before_training(mistake, monkeypatch, tmp_path):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    said = "the adapter and the checkpoints need about .* MiB and .* has 0.954 MiB free"
    mistake(["train", *SHORT, "--output", "run"], said)


def test_a_file_that_the_system_will_not_hold_is_named_before_training(tmp_path):
    "A real limit on what a file may hold. A disk that fills up on the way is in test_signals and test_faults."
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    done = qlora_nb("train", *SHORT, "--output", "run", cwd=tmp_path, first=limit)
    assert done.returncode == 2 and done.stdout == "", done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "need a file of 2 MiB, and this process may write 0.381 MiB at most (ulimit -f)" in last
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so(tmp_path):
    done = qlora_nb("train", *SHORT, "--learning-rate", "1e6", "--output", "run", cwd=tmp_path)
    assert done.returncode == 2 and re.search("loss is .* lower the learning rate", done.stderr), done.stderr[-2000:]
    assert not (tmp_path / "run/summary.json").exists()


def test_ctrl_c_while_evaluating_says_how_to_go_on(tmp_path):
    process = Process(COMMAND, "train", "--output", "run", cwd=tmp_path)
    wait_for(process, tmp_path / "run/versions.json", 1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "--resume" in err.splitlines()[-1] and "Traceback" not in err


def test_data_of_one_question_and_a_config_without_data(tmp_path):
    "Rows that share their question are data too; and data without a name is not replaced by other data in silence."
    (tmp_path / "same.jsonl").write_text('{"problem": "Go on.", "solution": "1, 2, 3"}\n' * 40)
    done = qlora_nb(
        "train", "--data", "same.jsonl", "--max-steps", "2", "--eval-rows", "4", "--output", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "c.yaml").write_text("data: (given in Python)\n")
    done = qlora_nb("train", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "name it with --data" in done.stderr


# --- plan -----------------------------------------------------------------------------------------------------------

SHAPE_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
}  # fmt: skip


@pytest.fixture
def command(command, tmp_path):
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b/config.json").write_text(json.dumps(SHAPE_8B))
    return command


def test_plan_says_it_to_people_and_to_machines(command):
    code, out, _ = command("plan", "--model", "8b", "--gpu", "T4")
    assert code == 0 and "take qlora, 8 x 1, 2048 tokens" in out and "computes in fp16" in out
    wishes = ["--method", "lora", "--seq-length", "512"]
    code, out, _ = command("plan", "--model", "8b", "--gpu", "A100 80GB", *wishes, "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["choice"]["method"] == "lora" and found["choice"]["seq_length"] == 512
    assert found["settings"]["load_model"]["load_in_4bit"] is False and found["rejected"]
    code, out, _ = command("plan", "--model", "8b", "--gpu", "4 GB")
    assert code == 1 and "nothing fits; the smallest option" in out
    code, out, _ = command("plan", "--model", "8b", "--gpu", "4 GB", "--json")
    assert code == 1 and json.loads(out)["fits"] is False and json.loads(out)["advice"]


def test_plan_for_several_cards(command, tmp_path):
    "A remedy is in the words of the command line, and is one."
    plan = ["plan", "--model", "8b", "--gpu"]
    code, out, _ = command(*plan, "8 GB", "--gpus", "2", "--backend", "transformers")
    assert code == 1 and "2 x 8 GB: 7.8 GiB available on each" in out
    assert "or cut the base among 2 such cards: --shard; or --max-seq-length 1024" in out
    code, out, _ = command(*plan, "6 GB", "--backend", "unsloth")
    assert code == 1 and "among 4 such cards: --gpus 4, --shard, --backend engine" in out
    assert command(*plan, "6 GB", "--gpus", "4", "--shard", "--backend", "engine")[0] == 0
    code, out, _ = command(*plan, "8 GB", "--gpus", "2", "--shard", "--json", "--config", "two.yaml")
    found = json.loads(out)
    assert code == 0 and (found["gpus"], found["shard"], found["backend"]) == (2, True, "engine")
    assert yaml.safe_load((tmp_path / "two.yaml").read_text())["gpus"] == 2
    code, out, _ = command(*plan, "L4", "--gpus", "2")
    assert code == 0 and "each of 2 GPUs: " in out and "sharded" not in out


def test_plan_without_a_card_looks_at_all_the_usual_ones(command):
    import torch

    from qlora_nb.cards import KNOWN_CARDS

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    code, out, _ = command("plan", "--model", "8b", "--method", "lora")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + len(KNOWN_CARDS) and "nothing fits" in lines[1] and "lora" in lines[-1]
    assert len(json.loads(command("plan", "--model", "8b", "--json")[1])) == len(KNOWN_CARDS)


def test_plan_counts_the_rows_of_the_data(command, tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wishes = ["--r", "8", "--effective-batch", "4", "--json"]
    code, out, _ = command("plan", "--gpu", "T4", "--data", "rows.jsonl", *wishes)
    found = json.loads(out)
    assert code == 0 and found["rows"] == 40 and found["mean_length"] < 40 and found["r"] == 8
    assert found["choice"]["batch"] * found["choice"]["accumulation"] == 4 and found["choice"]["seq_length"] == 256


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "T5"], "there is no card 'T5': choose one of T4"),
        (["--gpu", "T4", "--model", "./none"], "there is no folder ./none"),
        (["--gpu", "T4", "--method", "full"], "method is 'full'"),
        (["--gpu", "T4", "--backend", "mlx"], "backend is 'mlx'"),
        (["--gpu", "T4", "--r", "0"], "r is 0"),
        (["--gpu", "T4", "--effective-batch", "0"], "effective_batch is 0"),
        (["--gpu", "T4", "--seq-length", "100000"], "context of 2048"),
        (["--gpu", "T4", "--data", "none.jsonl"], "none.jsonl"),
        (["--gpu", "T4", "--shard"], "give --gpus 2 or more"),
        (["--gpu", "T4", "--gpus", "2", "--backend", "unsloth"], "choose --backend engine"),
        (["--gpu", "T4", "--gpus", "3"], "take 6 or 9"),
    ],
)
def test_a_mistake_with_plan_is_one_sentence(arguments, message, mistake):
    mistake(["plan", *arguments], message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--plan", "T5"], "there is no card 'T5'"),
        (["--plan", "auto", "--resume", "x"], "there is no folder"),
        (["--truncation", "left"], "truncation is 'left'"),
    ],
)
def test_a_mistake_with_a_planned_run_is_one_sentence(arguments, message, mistake):
    mistake(["train", *arguments], message)


def test_train_follows_a_plan_and_its_configuration_is_taken_back(command, tmp_path):
    short = ["--max-steps", "2", "--eval-rows", "0", "--limit", "100"]
    code, out, err = command("train", *short, "--plan", "L4", "--output", "run")
    assert code == 0 and "plan for L4: qlora, 8 x 1, 256 tokens" in err, err[-2000:]
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["optim"] == "adamw_8bit" and config["plan"]["card"] == "L4" and config["truncation"] == "drop"
    code, _, err = command("train", "--config", "run/config.yaml", "--output", "again")
    assert code == 0 and "plan for" not in err and sha(tmp_path / "again") == sha(tmp_path / "run")


def test_train_warns_before_it_loads_a_model_that_can_not_fit(tmp_path, capsys):
    "From config.json alone: there are no weights."
    import shutil

    from qlora_nb.cards import Card
    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.memory import CUDA_CONTEXT
    from qlora_nb.preparation import warn_of_large_model
    from qlora_nb.run import Settings

    shutil.copy(EMBEDDED_MODEL / "config.json", tmp_path)
    for mib, settings, said in [
        (2000, Settings(), ""),
        (1, Settings(), "warning: this run should need"),
        (1, Settings(engine=True), "warning: this run should need"),
        (1, Settings(optim="adafactor"), ""),
    ]:
        warn_of_large_model(str(tmp_path), settings, Card("a card", CUDA_CONTEXT + mib * 2**20))
        err = capsys.readouterr().err
        assert err.startswith(said) if said else err == ""


def test_a_plan_takes_what_auto_takes_on_that_card():
    from qlora_nb.preparation import plan_for_cards

    def taken(card, backend=None, model="qlora_nb:embedded"):
        return plan_for_cards(model, card, backend=backend)[0].backend

    assert [taken(card) for card in ("H100", "H200", "A100 80GB", "T4")] == ["engine", "engine", "unsloth", "unsloth"]
    assert (taken("H200", "unsloth"), taken("T4", "engine")) == ("unsloth", "engine")


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "old", "--message", "hi"),
        ("evaluate", "old"),
        ("export", "old"),
        ("export", "old/adapter"),
        ("modelfile", "old", "old/x.gguf"),
        ("certify", "old", "old/x.gguf"),
        ("report", "old"),
        ("compare", "old", "old"),
        ("diagnose", "old"),
        ("train", "--resume", "old"),
        ("train", "--config", "old/config.yaml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_run_of_another_format_is_refused(command, tmp_path, arguments):
    "The number came with format 2: a folder without one is from before."
    import shutil

    from qlora_nb.core import EMBEDDED_FOLDER

    old = tmp_path / "old"
    shutil.copytree(EMBEDDED_FOLDER / "run", old)
    (old / "x.gguf").write_bytes(b"GGUF")
    config = yaml.safe_load((old / "config.yaml").read_text())
    assert config.pop("format") == 3
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    if "--resume" in arguments:
        (old / "summary.json").unlink()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and "format 1" in err and "reads format 3" in err, err[-1500:]


DROPS_SYSTEM = """{{- bos_token }}
{%- for message in messages if message['role'] != 'system' %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""


def test_a_modelfile_that_cant_be_derived_is_said_before_the_training(tmp_path):
    import shutil

    from qlora_nb.core import EMBEDDED_MODEL

    shutil.copytree(EMBEDDED_MODEL, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(DROPS_SYSTEM)
    rows = (json.dumps({"prompt": f"{i} + 1?", "response": f"{i + 1}"}) for i in range(40))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = qlora_nb("train", "--model", "base", "--data", "rows.jsonl", "--max-steps", "2", "--eval-rows", "0",
                    "--max-seq-length", "128", "--export", "f16", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = "no TEMPLATE for Ollama can be derived"
    assert 0 < done.stderr.index(said) < done.stderr.index("step/s"), done.stderr
    run = Path(done.stdout.splitlines()[-1])
    assert list(run.glob("*.gguf")) and "TEMPLATE" not in (run / "Modelfile").read_text()


def test_a_system_text_is_left_out_or_put_in(tmp_path):
    rows = [{"prompt": f"{i} + 1?", "response": f"<think>one more</think>{i + 1}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("--data", "rows.jsonl", "--max-steps", "2", "--eval-rows", "0")
    found = {}
    for name, flags in (("a", ()), ("b", ("--no-system",)), ("c", ("--system", "Be brief."))):
        done = qlora_nb("train", *short, *flags, "--output", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("was added to 40 rows" in done.stderr) == (name == "c")
        found[name] = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
    assert (found["a"]["system"], found["a"]["add_system"]) == (None, None)
    assert (found["b"]["system"], found["b"]["add_system"]) == (None, False)
    assert (found["c"]["system"], found["c"]["add_system"]) == ("Be brief.", "Be brief.")
    done = qlora_nb("train", "--config", "b/config.yaml", "--output", "again", cwd=tmp_path)
    assert done.returncode == 0 and "note: data is not" not in done.stderr
    assert sha(tmp_path / "again") == sha(tmp_path / "b")
    both = qlora_nb("check", *short[:2], "--system", "x", "--no-system", cwd=tmp_path)
    assert both.returncode == 2 and "--system and --no-system are both given" in both.stderr
