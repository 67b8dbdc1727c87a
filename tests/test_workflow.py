"""Before the training: what the export can't do. After it: whatever fails, what was made is whole and named."""

import ast
import errno
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf_models import needed
from repository import PACKAGE, accept_changes

from qlora_nb import cli, load_run, load_sft_dataset
from qlora_nb.core import FullDisk, UserError, file_sha256
from qlora_nb.gguf_export import export_gguf
from qlora_nb.run import copy_embedded_run
from qlora_nb.workflow import export_and_certify

needed("gguf"), needed("xllamacpp")
FORMATS = {"q8_0": "run-Q8_0.gguf", "q4_k_m": "run-Q4_K_M.gguf"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What the files are when nothing fails: name → SHA-256."
    run = copy_embedded_run(tmp_path_factory.mktemp("whole"))
    return {file.name: file_sha256(file) for file in export_gguf(run, None, run, list(FORMATS))}


@pytest.fixture
def run(tmp_path):
    "A finished run with four held-out rows."
    found = load_run(copy_embedded_run(tmp_path))
    found.eval_data = load_sft_dataset(split="heldout", limit=4)
    return found


# Each breaks one thing, where the operating system, torch or llama.cpp would.


def full_disk(name):
    "The disk is full when this file is to appear."

    def breaks(monkeypatch, run):
        replace = os.replace

        def full(source, target, **more):
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            return replace(source, target, **more)

        monkeypatch.setattr(os, "replace", full)

    return breaks


def small_files(monkeypatch, run):
    "No file may be larger than Q8_0: F16, of which K-quants are made, is cut off while it is written."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_500_000, hard))
    monkeypatch.setattr(run, "restore", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)), raising=False)


def gone_base(monkeypatch, run):
    path = run.path / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace("qlora_nb:embedded", "/gone/base"))
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("qlora_nb:embedded", "/gone/base"))
    accept_changes(run.path)


def quantizer_fails(monkeypatch, run):
    monkeypatch.setattr(needed("llama_cpp"), "llama_model_quantize", lambda *_: 1)


def out_of_memory(monkeypatch, run):
    import torch

    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate: 2.00 GiB")

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)


def server_refuses(monkeypatch, run):
    def refuse(settings):
        raise RuntimeError("failed to load the model")

    monkeypatch.setattr(needed("xllamacpp"), "Server", refuse)


def long_rows(monkeypatch, run):
    turns = [{"role": "user", "content": "so " * 4000}, {"role": "assistant", "content": "yes"}]
    run.eval_data = [{"messages": turns}]


BOTH, Q8 = set(FORMATS.values()), {"run-Q8_0.gguf"}
FAULTS = {  # name: (what breaks, formats, files that are there, what is said, what repeats it)
    "merge": (gone_base, "q8_0,q4_k_m", set(), "/gone/base", "export {run} --quantization q8_0"),
    "write": (
        small_files,
        "q8_0,q4_k_m",
        Q8,
        "not exported: q4_k_m (the GGUF files (f32, q4_k_m) need a file of 9.76 MiB",
        "export {run} --quantization q4_k_m",
    ),
    "appear": (
        full_disk("run-Q8_0.gguf"),
        "q8_0",
        set(),
        "not exported: q8_0 (no space left",
        "export {run} --quantization q8_0",
    ),
    "quantize": (
        quantizer_fails,
        "q8_0,q4_k_m",
        Q8,
        "could not quantize to q4_k_m",
        "export {run} --quantization q4_k_m",
    ),
    "modelfile": (
        full_disk("Modelfile"),
        "q8_0",
        Q8,
        "the Modelfile was not written (no space left",
        "modelfile {run}",
    ),
    "memory": (out_of_memory, "q8_0", Q8, "not certified (out of memory)", "certify {run}"),
    "server": (server_refuses, "q8_0", Q8, "can't open", "certify {run}"),
    "rows": (long_rows, "q8_0", Q8, "can be rendered within", "certify {run}"),
    "certificate": (full_disk("certificate.json"), "q8_0", Q8, "not certified (no space left", "certify {run}"),
    "summary": (full_disk("summary.json"), "q8_0", Q8, "certificate.json is complete, but summary.json does not", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_made_is_whole_and_named(fault, run, whole, monkeypatch, capsys):
    breaks, formats, files, said, again = FAULTS[fault]
    if "q4_k_m" in formats:
        needed("llama_cpp")
    before = {path.name: file_sha256(path) for path in (run.path / "adapter").iterdir()}
    breaks(monkeypatch, run)
    ended = None
    try:
        passed = export_and_certify(run, formats.split(","), time.time(), model_rows=1)
    except FullDisk as error:
        passed, ended = False, str(error)
    finally:
        getattr(run, "restore", lambda: None)()
        monkeypatch.undo()
    told = capsys.readouterr().err
    assert "Traceback" not in told and said in told, told
    assert (ended is not None) == ("no space left" in said), (ended, told)
    names = {path.name for path in run.path.iterdir()}
    assert {name for name in names if name.endswith(".gguf")} == files
    assert not [name for name in names if name.endswith((".part", ".old"))]
    assert {name: file_sha256(run.path / name) for name in files} == {name: whole[name] for name in files}
    if fault == "summary":  # all that was asked for is there
        assert passed and json.loads((run.path / "certificate.json").read_text())["passed"]
        return
    assert not passed and f"qlora_nb {again.format(run=run.path)}" in told
    *_, complete, way = [*told.splitlines(), *([ended] if ended else ())]  # the last line, in a terminal
    assert f"the run {run.path} is finished, but its" in way and f"qlora_nb {again.format(run=run.path)}" in way, way
    listed = complete.partition(": ")[2].split(", ")
    assert complete.startswith("Complete in ") and {"adapter", *files} <= set(listed) <= names
    if "export" in again:  # what is exported later is certified, too
        assert way.endswith(f" && qlora_nb certify {run.path}")
    json.loads((run.path / "summary.json").read_text())
    if fault != "merge":
        assert {path.name: file_sha256(path) for path in (run.path / "adapter").iterdir()} == before
    if fault in ("memory", "server", "rows"):
        assert "Modelfile" in listed and "certificate.json" not in names
    if fault == "modelfile":  # the files are certified without it
        assert "not certified" not in told and json.loads((run.path / "certificate.json").read_text())["passed"]


# --- the command ----------------------------------------------------------------------------------------------------

SHORT = ("--max-steps", "2", "--eval-rows", "2", "--limit", "40", "--r", "4", "--output", "run")


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    "Runs the command in this process: (exit code, stdout, stderr)."
    monkeypatch.setenv("QLORA_NB_PROFILE", "tiny")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stopped:
            return stopped.code or 0, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run


def test_the_path_is_on_stdout_whatever_fails_later(command, monkeypatch, tmp_path):
    def refuse(settings):
        raise RuntimeError("failed to load the model")

    server = needed("xllamacpp").Server
    calls = []

    def second(settings):  # the first is for the stand-in, before the training
        calls.append(settings.model.path)
        return server(settings) if len(calls) == 1 else refuse(settings)

    monkeypatch.setattr(needed("xllamacpp"), "Server", second)
    code, out, err = command("train", *SHORT, "--export", "q8_0")
    assert (code, out.splitlines()) == (1, [str(tmp_path / "run")]), err
    assert "not certified" in err and "Traceback" not in err and (tmp_path / "run/run-Q8_0.gguf").exists()


def test_the_held_out_rows_can_be_answered_later(command, monkeypatch, tmp_path):
    "No memory is left after the training: the adapter is saved, and --resume answers the rows without a further step."
    import torch

    from qlora_nb import training

    save, forward = training.save_adapter, torch.nn.Embedding.forward

    def save_and_break(*given):
        out_of_memory(monkeypatch, None)
        return save(*given)

    monkeypatch.setattr(training, "save_adapter", save_and_break)
    code, out, err = command("train", *SHORT, "--save-steps", "1")
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and "were not answered (out of memory): resume it with" in last, err
    saved = file_sha256(tmp_path / "run/adapter/adapter_model.safetensors")
    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    monkeypatch.setattr(training, "save_adapter", save)
    code, out, err = command("train", "--resume", "run")
    assert (code, out.strip()) == (0, str(tmp_path / "run")), err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"] and summary["steps"] == 2 and summary["adapter_sha256"] == saved


def test_run_export_names_the_file_where_the_modelfile_fails(run, whole, monkeypatch):
    full_disk("Modelfile")(monkeypatch, run)
    with pytest.raises(UserError, match="no space left .*; already written and complete: run-Q8_0.gguf"):
        run.export("q8_0")
    assert file_sha256(run.path / "run-Q8_0.gguf") == whole["run-Q8_0.gguf"]


@pytest.mark.parametrize("fault", ["kquant", "server", "disk"])
def test_what_cannot_be_exported_is_said_before_the_training(fault, command, monkeypatch, tmp_path):
    if fault == "kquant":
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
        said = "q4_k_m are made by llama.cpp's library"
    elif fault == "server":
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        said = r"pip install 'qlora_nb\[serve\]'"
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1e6, total=1e9, used=1e9))
        said = "the run and its GGUF files .* need about"
    code, out, err = command("train", *SHORT, "--export", "q4_k_m" if fault == "kquant" else "q8_0")
    assert (code, out) == (2, "") and re.search(said, err.splitlines()[-1]), err
    assert not (tmp_path / "run").exists()


def test_what_will_be_missing_is_said_before_the_training(command, monkeypatch, tmp_path):
    "No held-out rows and no llama.cpp library: both are said, the file is written, and that is no failure."
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    said = []
    monkeypatch.setattr("qlora_nb.workflow.train_adapter", lambda *_, **__: said.append(1) or sys.exit(7))
    code, _, err = command("train", *SHORT[:2], "--eval-rows", "0", "--data", "rows.jsonl", "--export", "q8_0")
    assert code == 7 and said and "no rows will be held out" in err and "(--eval-data)" in err and "above 0" in err
    assert "logits not compared" in err


# --- sentences name what the door has -------------------------------------------------------------------------------

PYTHON_ONLY = {  # arguments that no command has: what raises the sentence that names them can't be reached from there
    "tokenizer": "the commands load the tokenizer with the model",
    "go_template": "a text in Python", "without_template": "the same", "check": "the commands always check",
    "trainable": "for load_adapter", "streaming": "the commands choose it", "do_sample": "--temperature 0 is greedy",
    "dtype": "for save_merged", "tie_word_embeddings": "of a model's config", "double_quant": "for quantize_nf4",
    "blocksize": "the same", "kind": "for a code of 16 values", "ends": "the same", "normalized": "of a tokenizer",
    "ignore_merges": "the same", "lora_bias": "of peft", "init_lora_weights": "of peft", "block_count": "of a GGUF",
    "save_embedding_layers": "of peft", "path_initial_model_for_weight_conversion": "of peft",
    "prompt": "within --columns", "response": "the same",
}  # fmt: skip


def sentences():
    "(file, line, text with … for what is filled in) of each error that the package raises."
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", "")
            if (
                isinstance(node, ast.Call)
                and node.args
                and name in ("UserError", "TrainingDiverged", "TrainingInterrupted")
            ):
                parts = getattr(node.args[0], "values", [node.args[0]])
                text = "".join(
                    str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "…" for part in parts
                )
                yield f"{path.name}:{node.lineno}", text


def test_no_sentence_names_an_argument_that_the_command_line_lacks():
    import typer

    flags = {name for command in typer.main.get_command(cli.app).commands for name in cli.list_flags(command)}
    named = [(place, name, text) for place, text in sentences() for name in re.findall(r"\b([a-z][a-z0-9_]*)=", text)]
    assert len(named) > 40
    unknown = [(place, name, text) for place, name, text in named if name not in flags and name not in PYTHON_ONLY]
    assert not unknown, unknown
    for place, text in sentences():
        translated = cli.name_flags(text, "train")
        train = cli.list_flags("train")
        assert not [name for name in re.findall(r"\b([a-z][a-z0-9_]*)=", translated) if name in train], (
            place,
            translated,
        )


def test_a_command_speaks_of_its_own_flags(command, tmp_path):
    code, _, err = command("train", "--backend", "unsloth", "--engine")
    assert code == 2 and "--engine and --backend unsloth are both given" in err and "backend=" not in err
