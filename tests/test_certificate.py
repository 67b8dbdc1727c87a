"""The certificate: right exports pass on all four paths, deliberately wrong ones fail, and nothing is left running."""

import copy
import dataclasses
import json
import os
import signal
import socket
import threading
import time
import unittest.mock as mock
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlparse

import pytest
import torch
from gguf_models import needed
from repository import accept_changes
from safetensors.torch import load_file, save_file

from qlora_nb import certificate, certificate_checks, gguf_export, gguf_writer, llama, merging
from qlora_nb.certificate import certify, is_greedy
from qlora_nb.certificate_checks import (
    SPECIAL_KIND,
    Bounds,
    Case,
    Certificate,
    Distance,
    FileCheck,
    make_cases,
    measure_kl,
    open_subject,
    spread_evenly,
)
from qlora_nb.certificate_paths import encode_by_tokenizer, encode_cases
from qlora_nb.chat_templates import CHAT_TEMPLATES
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.gguf_export import export_gguf
from qlora_nb.gguf_tensors import gguf_tensors_sha256
from qlora_nb.llama import LlamaFile, chat_server, gguf_chat
from qlora_nb.model import add_lora, load_model, open_run
from qlora_nb.modelfile import format_modelfile, parse_modelfile
from qlora_nb.ollama_export import modelfile_for, modelfile_refusal, write_modelfile
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import copy_embedded_run
from qlora_nb.template import SYSTEM_PROMPT
from qlora_nb.workflow import load_run

for package in ("gguf", "llama_cpp", "xllamacpp"):
    needed(package)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("certificate")


@pytest.fixture(scope="module")
def run(place):
    "The run that comes with the package, its alpha doubled and its B halved: an export that forgets the scale shows."
    path = copy_embedded_run(place)
    weights, config = path / "adapter/adapter_model.safetensors", path / "adapter/adapter_config.json"
    tensors = {name: t / 2 if "lora_B" in name else t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    made = load_run(accept_changes(path))
    made.model, made.tokenizer = open_run(path)
    assert next(iter(made.model.peft_config.values())).lora_alpha == 32
    return made


@pytest.fixture(scope="module")
def files(run, place):
    return export_gguf(run.model, run.tokenizer, place / "apples", ["f16", "q8_0", "q4_k_m", "bf16", "f32"])


@pytest.fixture(scope="module")
def modelfile(run, files):
    return write_modelfile(files[0].parent, files[0], tokenizer=run.tokenizer, system=SYSTEM_PROMPT)


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run)


def encode_all(conversations, tokenizer):
    return encode_cases([Case("held out", messages) for messages in conversations], tokenizer)[0]


def short(subject, file, modelfile=None, **settings):
    settings = {"rows": 16, "model_rows": 4, "max_new_tokens": 0, **settings}
    return certify(subject, gguf=file, modelfile=modelfile, **settings)


# --- right exports --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run, files, modelfile):
    "The certificate of the acceptance: 200 conversations, a fifth of them through the models."
    return certify(run.path, gguf=files, modelfile=modelfile, model_rows=40)


def test_a_right_export_passes(whole):
    assert whole.passed, str(whole)
    assert sum(whole.rows.values()) == 200 and whole.left_out == {} and whole.reply_rows == 24
    assert set(whole.rows) == set(certificate_checks.CASE_KINDS)
    assert [check.quantization for check in whole.checks] == ["merged", "F16", "Q8_0", "Q4_K_M", "BF16", "F32"]


def test_ids_are_the_same_on_all_paths(whole):
    for check in whole.checks[1:]:
        assert [path.path for path in check.paths] == ["tokenizer", "GGUF", "Modelfile"]
        assert {(path.rows, path.same, path.bos, path.ends) for path in check.paths} == {(200, 200, 200, 200)}


def test_f16_is_what_was_trained(whole):
    f16 = whole.checks[1]
    assert f16.numbers()["top1"] >= 0.995 and f16.numbers()["replies"] >= 0.98
    assert f16.right == f16.trained_right
    assert (
        f16.bound / 50 < f16.distance.mean_kl < f16.bound / 2 < 1e-5
    )  # what rounding explains, measured on this model
    assert whole.checks[0].bound == f16.bound == whole.checks[5].bound < whole.checks[4].bound < 1e-3


def test_our_quantizations_are_llama_cpps_own(whole):
    assert [check.is_equal for check in whole.checks[1:]] == [False, True, True, False, False]
    assert all(0.99 < check.share.share()[0] < 1.001 for check in whole.checks[1:])
    assert "Q8_0: 38 of 38 tensors are llama.cpp's own quantization" in str(whole)


def test_each_format_loses_more_than_the_one_before(whole):
    merged, f16, q8, q4, bf16, f32 = [check.distance.mean_kl for check in whole.checks]
    assert merged < 1e-9 < f32 < f16 < bf16 < q8 < q4
    assert 0.97 < whole.checks[2].distance.perplexity_ratio < 1.03


def test_json_and_html(whole, place):
    path = whole.to_json()
    assert path == place / "apples" / "certificate.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["passed"] and stored["checks"][1]["sha256"] and stored["versions"]["llama-cpp-python"]
    assert stored["checks"][1]["rounding_bound"] > 0 and stored["checks"][1]["kl_by_position"][5][1] >= 0
    assert stored["checks"][2]["equal_tensors"] == [38, 38] and stored["hides"] == []
    assert stored["headline"].startswith("Certificate of run: PASSED in ")
    assert stored["headline"].endswith(": compared 200 of 200 conversations")
    assert "Compared with the base in 4 bits: config.yaml of its run says load_in_4bit: true." in stored["remarks"]
    hostile = copy.copy(whole)
    hostile.subject, hostile.notes = "<script>", ["<b>"]
    assert (
        "<script>" not in hostile._repr_html_()
        and "&lt;script&gt;" in hostile._repr_html_()
        and "&lt;b&gt;" in hostile._repr_html_()
    )
    assert "FAILED" in str(hostile) and "PASSED" in str(whole)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_named_templates_on_all_paths(subject, run, place, name):
    "A file whose own template is the named one, its date pinned, and the Modelfile of that name."
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = '{%- set date_string = "26 Jul 2024" %}' + CHAT_TEMPLATES[name]
    if name == "chatml":
        tokenizer.chat_template = "{{- bos_token }}" + CHAT_TEMPLATES[name].replace(
            "<|im_start|>", "<|start_header_id|>"
        ).replace("<|im_end|>", "<|eot_id|>")
    file = export_gguf(run.model, tokenizer, place / f"{name}.gguf", "f16")
    modelfile = write_modelfile(place / f"Modelfile-{name}", file, tokenizer=tokenizer)
    other = copy.copy(subject)
    other.tokenizer, other.config = tokenizer, {}
    found = short(other, file, modelfile, rows=40)
    assert found.passed, str(found)


# --- which template Ollama reads ------------------------------------------------------------------------------------


def with_template(run, subject, place, template, name):
    "The run with another chat template: its subject, its file."
    tokenizer, other = copy.deepcopy(run.tokenizer), copy.copy(subject)
    tokenizer.chat_template = template
    other.tokenizer, other.config = tokenizer, {}
    return other, export_gguf(run.model, tokenizer, place / f"{name}.gguf", "f16")


def test_the_certificate_says_which_template_ollama_reads(whole, run, place, subject, files):
    assert whole.facts["ollama_reads"] == "template"
    assert (
        "Ollama (0.30 and later) reads TEMPLATE of the Modelfile: " in str(whole) and "TEMPLATE" in whole._repr_html_()
    )
    other, file = with_template(run, subject, place, "{# tools #}" + run.tokenizer.chat_template, "tools")
    found = short(
        other,
        file,
        write_modelfile(place / "Modelfile-tools", file, tokenizer=other.tokenizer, ollama="0.29"),
        model_rows=4,
    )
    assert found.passed, str(found)  # no failure by itself
    stored = json.loads(found.to_json(place / "tools.json").read_text(encoding="utf-8"))
    assert stored["ollama_reads"] == "gguf" and "offers tools" in stored["ollama_reads_reason"]
    for text in (str(found), found._repr_html_()):
        assert "reads the chat template in the GGUF" in text and "its prompts are those of the path GGUF" in text
        assert "compared on 5 paths: training, tokenizer, GGUF, Modelfile, chat" in text
    stored = json.loads(short(subject, files[0], model_rows=4).to_json(place / "none.json").read_text(encoding="utf-8"))
    assert stored["ollama_reads"] is stored["ollama_reads_reason"] is None  # there is no Modelfile


def test_a_modelfile_without_template_is_certified_on_three_paths(run, place, subject):
    "Its last reply is written with an empty thought, as Qwen3's template does; no TEMPLATE can say that."
    thought = "('<think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] | trim"
    template = "{# tools #}" + run.tokenizer.chat_template.replace("message['content'] | trim", thought)
    other, file = with_template(run, subject, place, template, "thought")
    assert modelfile_refusal(other.tokenizer)
    path = write_modelfile(place / "Modelfile-without", file, tokenizer=other.tokenizer, without_template=True)
    found = short(other, file, path, model_rows=4)
    assert found.passed and found.facts["ollama_reads"] == "gguf", str(found)
    assert [check.path for check in found.checks[1].paths] == ["tokenizer", "GGUF", "chat"]
    assert "compared on 4 paths: training, tokenizer, GGUF, chat" in str(
        found
    ) and "not TEMPLATE: the Modelfile has none" in str(found)
    fails(short(other, file, edited(path, "PARAMETER stop", lambda v: None), model_rows=4), "no stop for <|eot_id|>")


def test_no_template_at_all_fails(run, place, subject, files, modelfile):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = None
    file = export_gguf(run.model, tokenizer, place / "bare.gguf", "f16")
    path = edited(edited(modelfile, "TEMPLATE", lambda v: None), "FROM", lambda v: f"../{file.name}")
    found = fails(
        short(subject, file, path, model_rows=4), "the Modelfile has no TEMPLATE and the GGUF no chat template"
    )
    assert found.facts["ollama_reads"] == "none" and "It can't serve a conversation" in str(found)


# --- wrong exports --------------------------------------------------------------------------------------------------


def wrong(run, place, module, step, instead):
    with mock.patch.object(module, step, instead):
        return export_gguf(run.model, run.tokenizer, place / "wrong.gguf", "f16")


def fails(found, *words):
    assert not found.passed
    for word in words:
        assert any(word in failure for failure in found.failures), found.failures
    return found


def test_no_permutation_fails(run, place, subject):
    file = wrong(run, place, gguf_export, "permute_rows", lambda rows, heads: rows)
    fails(short(subject, file), "F16: the mean KL", "of what the adapter adds")


def test_another_rope_base_fails(run, place, subject):
    real = gguf_writer.read_rope
    fails(
        short(subject, wrong(run, place, gguf_writer, "read_rope", lambda c: {**real(c), "rope_theta": 500_000.0})),
        "F16: the mean KL",
    )


def test_an_unscaled_adapter_fails(run, place, subject):
    def unscaled(layer, adapter, base):
        return base + (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).detach().float()

    with mock.patch.object(merging, "merge_weight", unscaled):
        found = short(subject, export_gguf(run.model, run.tokenizer, place / "wrong.gguf", "f16"))
    fails(found, "merged: the mean KL", "F16: the mean KL")
    assert (
        certify(subject, gguf=place / "wrong.gguf", rows=10, model_rows=2, max_new_tokens=0).checks[1].share.share()[0]
        < 0.6
    )


# What the exporter does wrong: (the module, its step, what it does instead of it), given the step itself.
FAULTS = {
    "adapter dropped": (merging, "merge_weight", lambda step: lambda layer, adapter, base: base),
    "twice the scale": (merging, "merge_weight", lambda step: lambda *given: 2 * step(*given) - given[2]),
    "a layer left out": (merging, "merge_weight", lambda step: lambda *given: leave_out(step, *given)),
    "digits split otherwise": (
        gguf_export,
        "read_vocabulary",
        lambda step: lambda *given: dataclasses.replace(step(*given), pre="gpt-2"),
    ),
    "another end of text": (
        gguf_export,
        "read_vocabulary",
        lambda step: lambda *given: with_eos(step(*given), 9),
    ),
    "q and k not permuted": (gguf_export, "permute_rows", lambda step: lambda rows, heads: rows),
    "another rope base": (gguf_writer, "read_rope", lambda step: lambda c: {**step(c), "rope_theta": 50_000.0}),
}


def leave_out(step, layer, adapter, base):
    "Merge all but the matrices with the most columns: the down projections."
    return base if base.shape[1] > base.shape[0] else step(layer, adapter, base)


def with_eos(vocabulary, more):
    return dataclasses.replace(vocabulary, special={**vocabulary.special, "eos": vocabulary.special["eos"] - more})


@pytest.mark.parametrize(
    "fault, kind",
    [*((fault, "f16") for fault in FAULTS), ("another rope base", "q4_k_m"), ("a layer left out", "q4_k_m")],
)
def test_a_planted_fault_fails(run, place, subject, fault, kind):
    "On the exact file, and by itself in four bits, where it is as small as the format's noise."
    module, step, instead = FAULTS[fault]
    with mock.patch.object(module, step, instead(getattr(module, step))):
        file = export_gguf(run.model, run.tokenizer, place / "fault.gguf", kind)
    found = short(subject, file, rows=20)
    named = (kind.upper(), "fault.gguf")
    assert not found.passed and all(failure.startswith(named) for failure in found.failures), str(found)


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_another_precisions_base_fails(run, place, subject, kind):
    "The run's adapter was trained on the base in 4 bits; merged into the base as it was, the model is another."
    file = export_gguf(run.path, None, place / "other.gguf", kind, load_in_4bit=False)
    fails(short(subject, file), f"{kind.upper()}: ")


def test_the_reverse_fails_and_the_record_decides(run, place, files):
    "An adapter that was trained on the base in 16 bits; the record says so, whatever the exporter assumed."
    import shutil

    path = place / "sixteen"
    if not path.exists():
        shutil.copytree(run.path, path)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("load_in_4bit: true", "load_in_4bit: false"))
    for card in path.glob("adapter/README.md"):
        card.unlink()
    sixteen = open_subject(accept_changes(path))
    fails(short(sixteen, files[0], rows=20), "F16: the mean KL")
    fails(short(sixteen, files[2], rows=20), "Q4_K_M: ")
    right = short(sixteen, export_gguf(path, None, place / "sixteen.gguf", "f16"), rows=20)
    assert right.passed, str(right)
    found = certify(path, gguf=files[0], rows=10, model_rows=2, max_new_tokens=0, load_in_4bit=True)
    assert "as asked, but config.yaml of its run says load_in_4bit: false: that is not what was trained" in str(found)
    assert not found.passed


def test_a_precision_that_nobody_recorded_is_named(run, place, files):
    import shutil

    alone = place / "alone"
    shutil.copytree(run.path / "adapter", alone)
    (alone / "README.md").unlink()
    data = load_sft_dataset(split="heldout")
    found = certify(alone, gguf=files[0], data=data, rows=10, model_rows=2, max_new_tokens=0)
    assert not found.passed  # it was in 4 bits
    assert "The precision of training is not recorded" in str(found) and "compared with the base in 16 bits" in str(
        found
    )


def test_other_tensors_than_the_models_fail(run, place, subject, files):
    "A head of its own where the model has one matrix for both; a file that lacks a layer's adapter."
    import gguf

    file = place / "head.gguf"
    file.write_bytes(files[0].read_bytes())
    reader = gguf.GGUFReader(file, "r+")
    next(tensor for tensor in reader.tensors if tensor.name in ("output.weight", "token_embd.weight")).data[::2] *= 1.01
    reader.data.flush()
    fails(short(subject, file, rows=20), "F16: the mean KL")
    assert gguf_tensors_sha256(file) != gguf_tensors_sha256(files[0])


def test_a_missing_stretch_of_the_positions_fails(place):
    "Llama 3's rope factors, left out of the file."
    from gguf_models import byte_level, random_model

    tokenizer = byte_level("llama3")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 10_000.0, "original_max_position_embeddings": 32, **scaling}
    model = random_model("llama", len(tokenizer), rope_parameters=rope)
    other = open_subject(model.float().eval(), tokenizer)
    data = load_sft_dataset(split="heldout").select(range(20))
    right = short(other, export_gguf(model, tokenizer, place / "rope.gguf", "f16"), data=data, rows=20)
    assert right.passed, str(right)
    real = gguf_export.plan_tensors
    without = lambda *given: [one for one in real(*given) if "rope" not in one.name]  # noqa: E731
    with mock.patch.object(gguf_export, "plan_tensors", without):
        file = export_gguf(model, tokenizer, place / "norope.gguf", "f16")
    fails(short(other, file, data=data, rows=20), "F16: the mean KL")


def test_another_template_in_the_file_fails(run, place, subject, modelfile):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = run.tokenizer.chat_template.replace("\\n\\n", "\\n")
    found = fails(
        short(subject, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")), "on the path GGUF, 16 of 16"
    )
    assert not any("mean KL" in failure for failure in found.failures)  # the weights are right


def test_a_template_with_the_date_fails(run, place, subject):
    "Whatever the day: on some it has as many tokens as training's, and on others it hasn't."
    tokenizer, real, told = copy.deepcopy(run.tokenizer), llama._post, set()
    tokenizer.chat_template = CHAT_TEMPLATES["llama-3.1"].replace("date_string", "datetime")  # llama.cpp gives both
    other = copy.copy(subject)
    other.tokenizer = tokenizer
    file = export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")
    for day in (None, "Nov 27 2026", "Dec 01 2026"):
        kwargs = {"chat_template_kwargs": {"datetime": day}} if day else {}  # None: by the server's own clock
        with mock.patch.object(
            llama, "_post", lambda place, body, timeout=120, more=kwargs: real(place, {**body, **more}, timeout)
        ):
            found = fails(short(other, file, model_rows=1), "on the path GGUF, 16 of 16", "training has")
        told.add(len(found.failures))
    assert told == {1, 2}, "days of either kind were tried"


def edited(modelfile, name, value):
    "A Modelfile beside the right one, with one instruction changed (None leaves it out) or, with a +, added."
    lines = parse_modelfile(modelfile.read_text(encoding="utf-8")).instructions
    if name.startswith("+"):
        lines = [*lines, (name[1:], value)]
    else:
        lines = [(k, value(v) if k == name else v) for k, v in lines if k != name or value(v) is not None]
    path = modelfile.with_name("Modelfile-edited")
    path.write_text(format_modelfile(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("TEMPLATE", lambda v: "<|begin_of_text|>" + v, ("don't begin with the BOS of training", "different tokens")),
        ("TEMPLATE", lambda v: v.replace("<|eot_id|>", ""), ("different number of end-of-turn tokens",)),
        (
            "TEMPLATE",
            lambda v: v.replace('{{ template "trim" .Content }}', "{{ .Content }}"),
            ("of 16 conversations have different tokens", "white space"),
        ),
        ("SYSTEM", lambda v: None, ("SYSTEM is not the system text",)),
        ("PARAMETER stop", lambda v: None, ("no stop for <|eot_id|>",)),
        ("FROM", lambda v: "./other.gguf", ("names ./other.gguf, which is not one of the certified files",)),
        ("+ADAPTER", "./other-lora.gguf", ("has ADAPTER ./other-lora.gguf",)),
        ("+RENDERER", "qwen3-coder", ("has RENDERER qwen3-coder",)),
        ("+PARSER", "qwen3-coder", ("has PARSER qwen3-coder",)),
        ("+PARAMETER stop", "answer", ("a stop 'answer', which training doesn't use",)),
    ],
)
def test_a_wrong_modelfile_fails(subject, files, modelfile, name, value, words):
    fails(short(subject, files[0], edited(modelfile, name, value), model_rows=4), *words)


def test_a_system_text_that_training_did_not_have_fails(subject, files, modelfile):
    other = copy.copy(subject)
    other.config = {**subject.config, "system": None}
    fails(short(other, files[0], modelfile, model_rows=4), "a SYSTEM text, but training didn't put one")


def test_bos_doubled_by_the_file_fails(run, place, subject):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + run.tokenizer.chat_template
    fails(
        short(subject, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")),
        "on the path GGUF, 16 of 16 conversations don't begin",
    )


def test_neighbours_of_one_role_fail_on_the_modelfile_alone(subject, files, modelfile):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "One."},
                {"role": "user", "content": f"And {i}?"},
                {"role": "assistant", "content": "5"},
            ]
        }
        for i in range(4)
    ]
    found = fails(short(subject, files[0], modelfile, data=rows, rows=4), "on the path Modelfile, 4 of 4")
    assert not any("path GGUF" in failure for failure in found.failures)


def test_bounds_can_be_given(subject, files):
    found = short(subject, files[2], thresholds={"Q4_K_M": Bounds(mean_kl=1e-9)})
    fails(found, "Q4_K_M: the mean KL is", "above 1e-09")


@pytest.mark.parametrize(
    "number, words", [(12, "Q3_K_M: this is what the file's header says"), (999, "file type 999: llama.cpp's own")]
)
def test_a_header_with_another_format_fails(subject, files, tmp_path, number, words):
    "The header of a right F16 says Q3_K_M, and a format that nobody knows."
    import gguf

    file = tmp_path / "other.gguf"
    file.write_bytes(files[0].read_bytes())
    reader = gguf.GGUFReader(file, "r+")
    reader.fields["general.file_type"].parts[-1][0] = number
    reader.data.flush()
    found = fails(short(subject, file, rows=20), words)
    assert found.failures == found.failures[:1]
    if number == 999:
        assert short(subject, file, rows=20, thresholds={"file type 999": Bounds(0.995, 1e-4)}).passed


def test_logits_that_are_no_numbers_fail(subject, files, tmp_path):
    "A BF16 file in which the last norm is NaN, as a broken conversion leaves it."
    import gguf

    file = tmp_path / "nan.gguf"
    file.write_bytes(files[3].read_bytes())
    reader = gguf.GGUFReader(file, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight").data[:] = float("nan")
    reader.data.flush()
    found = fails(short(subject, file, max_new_tokens=4), "BF16: the logits are NaN or infinite")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    stored = json.loads(found.to_json().read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["checks"][1]["mean_kl"] is None and stored["checks"][1]["max_kl"] is None


def test_a_large_loss_has_a_ratio():
    assert Distance(loss=1e5, tokens=1).perplexity_ratio > 1e300


@pytest.fixture(scope="module")
def gentle(subject):
    "A fine-tune of a hundredth of the run's scale."
    made = dataclasses.replace(subject, model=copy.deepcopy(subject.model), kept={}, precision=None)
    for layer in made.model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] /= 100
    return made


def test_a_format_that_hides_the_training_passes_and_says_so(gentle, place):
    found = short(gentle, export_gguf(gentle.model, gentle.tokenizer, place / "gentle", ["f16", "q4_0"]))
    assert found.passed, str(found)
    assert found.headline.startswith("Certificate of run: PASSED, but Q4_0 hides what was trained, in ")
    f16, q4 = found.checks[1:3]
    assert f16.hides() is None and q4.base.reply_kl < q4.distance.reply_kl
    for figure in (q4.base.reply_kl, q4.distance.reply_kl):
        assert f"{figure:.1e}" in q4.hides()
    assert f"{q4.distance.tokens:,} tokens of replies" in q4.hides() and q4.hides() in str(found)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
def test_the_base_passed_off_as_the_run_fails(gentle, place, kind):
    "The format's noise hides what was trained; that nothing of it is in the weights shows all the same."
    found = short(gentle, export_gguf(EMBEDDED_MODEL, None, place / "base.gguf", kind), rows=20)
    fails(found, "of what the adapter adds is in the file's weights")
    assert "hides" not in found.headline and found.hidden == []  # which would say that the export is right


def test_files_of_one_format_are_told_apart():
    near, far = Distance(positions=10, agreed=10, kl=1e-7, tokens=5), Distance(positions=10, kl=5.0, tokens=5)
    checks = [FileCheck(name, "F16", one, bound=1e-6) for name, one in (("a.gguf", near), ("b.gguf", far))]
    found = Certificate("m", {}, {}, 1, 0, checks, {}, [], {})
    assert [said.partition(":")[0] for said in found.failures] == ["b.gguf"]
    assert "\na.gguf " in str(found) and "b.gguf: rounding explains" in str(found)


def test_an_adapter_that_changes_nothing_is_hidden_everywhere():
    nothing, near = Distance(positions=10, tokens=5), Distance(positions=10, agreed=10, kl=1e-7, tokens=5)
    check = FileCheck("a", "F16", near, base=nothing, bound=1e-6)
    assert check.failures() == [] and "hides" in check.hides()


def test_one_answer_of_forty_is_no_failure():
    def check(right, answers):
        hits = [i < right for i in range(answers)]
        return FileCheck("a", "F16", None, right=hits, trained_right=[True] * answers)

    assert check(39, 40).failures() == []
    assert check(30, 40).failures() == ["F16: held-out accuracy is 30 of 40, and the trained model's 40"]
    assert check(970, 1000).failures() and not check(999, 1000).failures()


def test_a_file_is_made_to_compare_where_none_is_exact(subject, files):
    found = short(subject, files[1], rows=10)
    assert [(check.quantization, check.own) for check in found.checks] == [
        ("merged", False),
        ("F32", True),
        ("Q8_0", False),
    ]
    assert found.checks[1].paths == [] and "F32 (made to compare)" in str(found) and found.passed


def test_a_budget_takes_what_fits_and_says_how_many(subject, files, capsys):
    found = short(subject, files[0], rows=100, model_rows=60, max_new_tokens=4, minutes=1e-6)
    assert found.passed and found.model_rows == 8 and found.reply_rows == 8
    assert "compared 8 of 100 conversations; 92 left out: the time was up" in found.headline
    assert "logits: the time is up" in capsys.readouterr().err or found.seconds < 20
    with pytest.raises(UserError, match="minutes is -1: give more than 0"):
        short(subject, files[0], minutes=-1)


def test_without_llama_cpps_library_tokens_weights_and_replies_are_compared(subject, files, place, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    found = short(subject, [files[0], files[2]], rows=10, max_new_tokens=8)
    assert found.passed, str(found)
    assert "logits not compared" in str(found) and "pip install 'qlora_nb[gguf]'" in str(found)
    assert found.model_rows == 4 and found.checks[1].distance is None and found.checks[1].same and found.checks[1].share
    dropped = export_gguf(EMBEDDED_MODEL, None, place / "dropped.gguf", "q8_0")
    fails(short(subject, dropped, rows=10), "Q8_0: 0% of what the adapter adds is in the file's weights")


def test_rows_with_tools_go_by_the_paths_that_can(run, subject, place):
    "Such rows are compared by tokenizer, GGUF and chat; where training leaves them out, they are counted."
    head = "<|start_header_id|>tools<|end_header_id|>"
    named = (
        "{%- if tools %}{{ '"
        + head
        + "' + tools[0].function.name + ': ' + tools[0].function.description + '<|eot_id|>' }}{% endif %}"
    )
    text = run.tokenizer.chat_template.replace("{%- for", named + "{%- for", 1)
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    data, tools = load_sft_dataset(split="heldout").select(range(8)), [{"type": "function", "function": function}]
    rows = [{"messages": row["messages"], "tools": tools if i < 3 else None} for i, row in enumerate(data)]
    other, file = with_template(run, subject, place, text, "sometools")
    found = short(other, file, data=rows, rows=20)
    assert found.passed, str(found)
    assert found.rows[SPECIAL_KIND] == 3 and found.checks[1].paths[0].rows == 20
    left = short(subject, export_gguf(run.model, run.tokenizer, place / "plain.gguf", "f16"), data=rows, rows=20)
    assert left.left_out == {"training leaves them out, too (tools_unsupported)": 3}
    assert (
        "compared 17 of 20 conversations; 3 left out: training leaves them out, too (tools_unsupported)"
        in left.headline
    )


def test_thinking_switches_are_counted(run, subject, place):
    "A template that writes more where it is told to think: only one of the two prompts is training's."
    switch = "{%- if enable_thinking is defined and enable_thinking %}{{ 'x' }}{% endif %}"
    text = run.tokenizer.chat_template.replace("{%- for", switch + "{%- for", 1)
    other, file = with_template(run, subject, place, text, "thinks")
    found = short(other, file, rows=20)
    assert found.passed, str(found)
    assert "Of 8 prompts 0 are training's with thinking on" in str(found) and "and 8 with it off" in str(found)


def test_replies_are_asked_for_the_rows_whose_logits_are_compared(subject, files):
    found = short(subject, files[1], max_new_tokens=8, rows=20, model_rows=10)
    kinds = [case.kind for case in make_cases(load_sft_dataset(split="heldout"), subject.tokenizer, 20)]
    assert found.reply_rows == sum(kinds[i] == "held out" for i in spread_evenly(20, 10)) == 6
    assert len(found.checks[2].right) == 6


def test_a_reply_that_parts_at_a_tie(subject):
    "Another token counts as the same if the trained model finds it as likely, and not if it doesn't."
    (case, *_), model = make_cases(load_sft_dataset(split="heldout"), subject.tokenizer, 20), subject.model
    (row,) = encode_all([case.messages], subject.tokenizer)
    prompt, reply = row.prompt, []
    for _ in range(6):
        with torch.no_grad():
            likely = model(input_ids=torch.tensor([prompt + reply])).logits[0, -1].log_softmax(-1)
        reply.append(int(likely.argmax()))
    assert is_greedy(model, prompt, reply, tie=1e-4)
    (first, second), (_, other) = likely.topk(2)
    gap, parted = (first - second).item(), [*reply[:-1], int(other)]
    assert is_greedy(model, prompt, parted, tie=1.01 * gap) and not is_greedy(model, prompt, parted, tie=0.99 * gap)
    assert not is_greedy(model, prompt, [model.config.vocab_size], tie=1.0)


def test_a_reply_that_is_cut_short_is_another_one(subject, files, monkeypatch):
    "Each of its tokens is the trained model's, and yet it is not what was trained."
    assert all(short(subject, files[0], max_new_tokens=40).checks[1].same)
    real = LlamaFile.reply_greedily
    monkeypatch.setattr(LlamaFile, "reply_greedily", lambda *given: [row[:-2] for row in real(*given)])
    assert not all(short(subject, files[0], max_new_tokens=40).checks[1].same)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_cases(run):
    data = load_sft_dataset(split="heldout")
    cases = make_cases(data, run.tokenizer, 60)
    assert len(cases) == 60 and sum(case.kind == "held out" for case in cases) == 36
    assert cases == make_cases(data, run.tokenizer, 60)
    kinds = {case.kind: case.messages for case in cases}
    assert kinds["other system turn"][0]["role"] == "user" and len(kinds["several turns"]) == 5
    assert kinds["white space"][1]["content"] != kinds["white space"][1]["content"].strip()
    assert all(encode_all([case.messages for case in cases], run.tokenizer))
    assert len(make_cases(data.select(range(3)), run.tokenizer, 200)) == 200
    with pytest.raises(UserError, match="found 0 held-out rows"):
        make_cases([], run.tokenizer)


def test_spread():
    assert spread_evenly(10, 3) == [0, 3, 6] and spread_evenly(5, 5) == [0, 1, 2, 3, 4] and spread_evenly(5, 0) == []


def test_divergence_is_zero_only_for_the_same():
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))
    assert float(measure_kl(logits, logits + 3).max()) < 1e-12  # a constant changes no probability
    assert float(measure_kl(logits, logits.flip(-1)).min()) > 0.01


def test_the_reference_is_the_adapter_model_and_no_merge(run, subject):
    "Unpacked or not, merged by peft or not: one model. With the adapter taken off, another."
    ids = torch.tensor([encode_all([load_sft_dataset(split="heldout")[0]["messages"]], run.tokenizer)[0].whole])
    with torch.no_grad():
        reference = subject.model(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, reference, atol=1e-4, rtol=1e-4)
        with subject.model.disable_adapter():
            assert float(measure_kl(reference[0], subject.model(ids).logits[0]).mean()) > 0.01


def test_greedy_is_one_token_after_the_other(run, files):
    "Many conversations at once give what each gives alone, by the logits of the whole."
    data = load_sft_dataset(split="heldout")
    prompts = [row.prompt for row in encode_all([data[i]["messages"] for i in range(40)], run.tokenizer)]
    with LlamaFile(files[0]) as file:
        many = file.reply_greedily(prompts, 24, {run.tokenizer.eos_token_id})
        assert [len(row) for row in many] == [24] * 40
        for prompt, said in zip(prompts[::13], many[::13]):
            logits = file.logits(prompt + said)
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == said


def test_the_server_stops_and_leaves_interrupts_alone(files):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    addresses = []
    real = llama._post

    def ask(address, *more):
        addresses.append(address)
        return real(address, *more)

    with mock.patch.object(llama, "_post", ask), pytest.raises(ZeroDivisionError):
        with chat_server(files[0]) as asked:
            assert asked("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})["prompt"]
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
            time.sleep(0.3)  # by now the server has taken them
            asked("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError
    place = urlparse(addresses[0])
    with socket.socket() as probe:
        assert probe.connect_ex((place.hostname, place.port)) != 0
    assert not [thread for thread in threading.enumerate() if "llama" in thread.name.lower()]


def test_a_template_that_the_server_refuses_is_a_failure(run, place, subject):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = run.tokenizer.chat_template.replace(
        "{%- for", "{%- if messages|length > 4 %}{{ raise_exception('too many') }}{% endif %}{%- for", 1
    )
    found = short(subject, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16"))
    fails(found, "on the path GGUF", "several turns: llama.cpp's server refuses")


@pytest.fixture
def slow_server():
    "A server that takes a while."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            time.sleep(0.6)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"said": 1}')

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *words: None  # a client that has gone away
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_chat_waits_as_long_as_it_takes(slow_server, files):
    with pytest.raises(UserError, match="doesn't answer"):
        llama._post(slow_server, {}, timeout=0.1)
    assert llama._post(slow_server, {}, timeout=None) == {"said": 1}
    with mock.patch.object(llama, "_post", wraps=llama._post) as asked:
        with gguf_chat(files[1]) as reply:
            assert reply("2 + 3?", max_new_tokens=4)
    assert asked.call_args.args[2] is None


def test_the_folder_of_the_adapter_knows_its_run(run, files, place):
    "RUN and RUN/adapter are one subject, and give one Modelfile."
    from qlora_nb.adapter import model_info

    whole, part = open_subject(run.path), open_subject(run.path / "adapter")
    assert part.config == whole.config and part.config["system"] == SYSTEM_PROMPT
    assert model_info(part.model) == model_info(whole.model)
    made = [modelfile_for(at, files[0], place / name) for at, name in ((run.path, "M1"), (run.path / "adapter", "M2"))]
    assert made[0].read_text() == made[1].read_text() and SYSTEM_PROMPT in made[1].read_text()


def test_a_broken_configuration_is_one_sentence(run, files, tmp_path):
    import shutil

    shutil.copytree(run.path / "adapter", tmp_path / "adapter")
    for at in (tmp_path, tmp_path / "adapter"):
        for use in (
            open_subject,
            lambda at: modelfile_for(at, files[0], tmp_path / "M"),
            lambda at: export_gguf(at, None, tmp_path / "a.gguf"),
        ):
            for text, said in (("system: [", "config.yaml is not YAML .*fix it"), ("{}", "holds no settings of a run")):
                (tmp_path / "config.yaml").write_text(text + "\n")
                with pytest.raises(UserError, match=said):
                    use(at)


def test_a_base_with_a_short_context(tmp_path):
    "256 tokens: its model's folder and its adapter's, alone, can be certified and exported."
    model, tokenizer = load_model(EMBEDDED_MODEL, backend="transformers", load_in_4bit=False, dtype="float32")
    model.config.max_position_embeddings = 256
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    small, _ = load_model(tmp_path / "base", backend="transformers", max_seq_length=256)
    adapted = add_lora(small, r=4)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "lora")
    heldout = load_sft_dataset(split="heldout")
    for name in ("base", "lora"):
        file = export_gguf(tmp_path / name, tokenizer, tmp_path / f"{name}.gguf", "f16")
        found = certify(tmp_path / name, gguf=file, data=heldout, rows=10, model_rows=4, max_new_tokens=0)
        assert found.passed, str(found)


def test_a_folder_is_a_place_for_the_certificate(whole, tmp_path):
    assert whole.to_json(tmp_path) == tmp_path / "certificate.json" and (tmp_path / "certificate.json").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't be written .(not a directory|file exists)"):
        whole.to_json(tmp_path / "file" / "certificate.json")
    (tmp_path / "place" / "certificate.json").mkdir(parents=True)
    with pytest.raises(UserError, match="can't be written .is a directory.: choose another place"):
        whole.to_json(tmp_path / "place")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["certificate.json"]


def test_a_read_only_file_system_is_a_users_mistake(tmp_path):
    import errno

    from qlora_nb.core import write_aside

    with pytest.raises(UserError, match="can't be written .read-only file system.: choose another place"):
        with write_aside(tmp_path / "a"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_another_models_file_is_named(subject, tmp_path):
    from gguf_models import byte_level, random_model

    tokenizer = byte_level("llama3")
    file = export_gguf(random_model("llama", len(tokenizer)), tokenizer, tmp_path / "another.gguf", "f16")
    with mock.patch.object(certificate, "measure_distances", side_effect=AssertionError("measured")):
        with pytest.raises(UserError, match="another.gguf has 7.. tokens and the model 768: it belongs to"):
            short(subject, file)


@pytest.mark.parametrize("wrong", [{"model_rows": 0}, {"model_rows": -3}, {"rows": 0}])
def test_there_must_be_rows(subject, files, wrong):
    with pytest.raises(UserError, match="rows is -?[0-9]+: give at least 1"):
        short(subject, files[0], **wrong)


def test_mistakes_are_named(run, place, files, tmp_path):
    with pytest.raises(UserError, match="there is no file .*none.gguf"):
        certify(run, gguf=tmp_path / "none.gguf")
    with pytest.raises(UserError, match="no GGUF was given"):
        certify(run, gguf=[])
    with pytest.raises(UserError, match="there is no folder"):
        certify(tmp_path / "none", gguf=files[0])
    with pytest.raises(UserError, match="can't be read"):
        certify(run, gguf=files[0], modelfile=tmp_path / "none")
    with pytest.raises(UserError, match="without its tokenizer"):
        certify(run.model, gguf=files[0])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files[0].read_bytes()[:5000])
    with pytest.raises(UserError, match="llama.cpp can't read"):
        certify(run, gguf=broken)
    with pytest.raises(UserError, match="can't open"):
        with chat_server(broken):
            pass


def test_the_tokenizers_path_is_its_own(run):
    case = Case("held out", load_sft_dataset(split="heldout")[0]["messages"])
    want = encode_all([case.messages], run.tokenizer)[0]
    assert encode_by_tokenizer(case, run.tokenizer) == want
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| upper")
    assert encode_by_tokenizer(case, tokenizer) != want
