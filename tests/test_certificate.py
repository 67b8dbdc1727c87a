"""The certificate: right exports pass on all four paths, deliberately wrong ones fail, and nothing is left running."""

import copy
import json
import signal
import socket
import threading
import time
import unittest.mock as mock
from urllib.parse import urlparse

import pytest

from qlora_nb import certificate, gguf_export, merging
from qlora_nb.certificate import (
    THRESHOLDS,
    Bounds,
    Case,
    CertificateFailed,
    LlamaFile,
    certify,
    chat_server,
    divergence,
    file_logits,
    greedy,
    make_cases,
    open_subject,
    spread,
    tokenizer_ids,
    training_ids,
)
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.data import load_sft_dataset
from qlora_nb.gguf_export import export_gguf
from qlora_nb.model import add_lora, load_model
from qlora_nb.ollama_export import modelfile_text, parse_modelfile, write_modelfile
from qlora_nb.template import SYSTEM_PROMPT, TEMPLATES

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("certificate")


@pytest.fixture(scope="module")
def run(place):
    "A real, short fine-tune with alpha / r = 2, as the command line leaves it."
    from qlora_nb.training import train

    model, tokenizer = load_model(EMBEDDED_MODEL, backend="transformers")
    model = add_lora(model, r=8, lora_alpha=16)
    heldout = load_sft_dataset(split="heldout")
    return train(
        model, tokenizer, load_sft_dataset(), eval_data=heldout, output=place / "run", max_steps=120, eval_rows=0
    )


@pytest.fixture(scope="module")
def files(run, place):
    return export_gguf(run.model, run.tokenizer, place / "apples", ["f16", "q8_0", "q4_k_m", "bf16", "f32"])


@pytest.fixture(scope="module")
def modelfile(run, files):
    return write_modelfile(files[0].parent, files[0], tokenizer=run.tokenizer, system=SYSTEM_PROMPT)


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run)


def short(subject, file, modelfile=None, **settings):
    settings = {"rows": 40, "model_rows": 10, "max_new_tokens": 0, **settings}
    return certify(subject, gguf=file, modelfile=modelfile, **settings)


# --- right exports --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run, files, modelfile):
    "The certificate of the acceptance: 200 conversations, all of them through the models."
    return certify(run.path, gguf=files, modelfile=modelfile)


def test_a_right_export_passes(whole):
    assert whole.passed, str(whole)
    whole.raise_for_failures()
    assert sum(whole.rows.values()) == 200 and whole.left_out == 0 and whole.reply_rows == 120
    assert set(whole.rows) == set(certificate.KINDS)
    assert [check.quantization for check in whole.checks] == ["merged", "F16", "Q8_0", "Q4_K_M", "BF16", "F32"]


def test_ids_are_the_same_on_all_paths(whole):
    for check in whole.checks[1:]:
        assert [path.path for path in check.paths] == ["tokenizer", "GGUF", "Modelfile"]
        assert {(path.rows, path.same, path.bos, path.ends) for path in check.paths} == {(200, 200, 200, 200)}


def test_f16_reaches_its_bounds(whole):
    f16 = whole.checks[1].numbers()
    assert f16["top1"] >= 0.995 and f16["mean_kl"] <= 1e-4
    assert f16["replies"] >= 0.98 and abs(f16["accuracy"] - f16["reference_accuracy"]) <= 0.01
    assert (THRESHOLDS["F16"].top1, THRESHOLDS["F16"].mean_kl, THRESHOLDS["F16"].replies) == (0.995, 1e-4, 0.98)


def test_each_format_loses_more_than_the_one_before(whole):
    merged, f16, q8, q4, bf16, f32 = [check.distance.mean_kl for check in whole.checks]
    assert merged < 1e-9 < f16 < bf16 < q8 < q4 and f32 <= 1.5 * f16
    assert 0.97 < whole.checks[2].distance.perplexity_ratio < 1.03


def test_json_and_html(whole, place):
    path = whole.to_json()
    assert path == place / "apples" / "certificate.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["passed"] and stored["checks"][1]["sha256"] and stored["versions"]["llama-cpp-python"]
    assert stored["thresholds"]["F16"]["mean_kl"] == 1e-4 and stored["checks"][1]["kl_by_position"][5][1] >= 0
    hostile = copy.copy(whole)
    hostile.subject, hostile.notes = "<script>", ["<b>"]
    assert (
        "<script>" not in hostile._repr_html_()
        and "&lt;script&gt;" in hostile._repr_html_()
        and "&lt;b&gt;" in hostile._repr_html_()
    )
    assert "FAILED" in str(hostile) and "PASSED" in str(whole)


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_on_all_paths(subject, run, place, name):
    "A file whose own template is the named one, its date pinned, and the Modelfile of that name."
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = '{%- set date_string = "26 Jul 2024" %}' + TEMPLATES[name]
    if name == "chatml":
        tokenizer.chat_template = "{{- bos_token }}" + TEMPLATES[name].replace(
            "<|im_start|>", "<|start_header_id|>"
        ).replace("<|im_end|>", "<|eot_id|>")
    file = export_gguf(run.model, tokenizer, place / f"{name}.gguf", "f16")
    modelfile = write_modelfile(place / f"Modelfile-{name}", file, tokenizer=tokenizer)
    other = copy.copy(subject)
    other.tokenizer, other.config = tokenizer, {}
    found = short(other, file, modelfile, rows=100, model_rows=5)
    assert found.passed, str(found)


# --- wrong exports --------------------------------------------------------------------------------------------------


def wrong(run, place, module, step, instead):
    with mock.patch.object(module, step, instead):
        return export_gguf(run.model, run.tokenizer, place / "wrong.gguf", "f16")


def fails(found, *words):
    assert not found.passed
    for word in words:
        assert any(word in failure for failure in found.failures), found.failures
    with pytest.raises(CertificateFailed) as error:
        found.raise_for_failures()
    assert error.value.exit_code == 1
    return found


def test_no_permutation_fails(run, place, subject):
    fails(
        short(subject, wrong(run, place, gguf_export, "permute_rows", lambda rows, heads: rows)),
        "F16: the mean KL",
        "the most likely token",
    )


def test_another_rope_base_fails(run, place, subject):
    real = gguf_export.rope_of
    fails(
        short(subject, wrong(run, place, gguf_export, "rope_of", lambda c: {**real(c), "rope_theta": 500_000.0})),
        "F16: the mean KL",
    )


def test_an_unscaled_adapter_fails(run, place, subject):
    def unscaled(layer, adapter, base):
        return base + merging.lora_update(layer, adapter) / layer.scaling[adapter]

    with mock.patch.object(merging, "merge_weight", unscaled):
        found = short(subject, export_gguf(run.model, run.tokenizer, place / "wrong.gguf", "f16"))
    fails(found, "merged: the mean KL", "F16: the mean KL")


def test_another_template_in_the_file_fails(run, place, subject, modelfile):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = run.tokenizer.chat_template.replace("\\n\\n", "\\n")
    found = fails(
        short(subject, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")), "on the path GGUF, 40 of 40"
    )
    assert not any("mean KL" in failure for failure in found.failures)  # the weights are right


def test_a_template_with_the_date_fails(run, place, subject):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = TEMPLATES["llama-3.1"].replace("date_string", "datetime")  # llama.cpp gives both
    other = copy.copy(subject)
    other.tokenizer = tokenizer
    fails(
        short(other, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")),
        "on the path GGUF",
        "training has",
    )


def edited(modelfile, name, value):
    "A Modelfile beside the right one, with one instruction changed; None leaves it out."
    found = parse_modelfile(modelfile.read_text(encoding="utf-8"))
    lines = [(k, value(v) if k == name else v) for k, v in found.instructions if k != name or value(v) is not None]
    path = modelfile.with_name("Modelfile-edited")
    path.write_text(modelfile_text(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("TEMPLATE", lambda v: "<|begin_of_text|>" + v, ("don't begin with the BOS of training, once", "other tokens")),
        ("TEMPLATE", lambda v: v.replace("<|eot_id|>", ""), ("another number of end-of-turn tokens",)),
        (
            "TEMPLATE",
            lambda v: v.replace('{{ template "trim" .Content }}', "{{ .Content }}"),
            ("of 40 conversations have other tokens", "white space"),
        ),
        ("SYSTEM", lambda v: None, ("SYSTEM is not the system text",)),
        ("PARAMETER stop", lambda v: None, ("no stop for <|eot_id|>",)),
        ("FROM", lambda v: "./other.gguf", ("names ./other.gguf, which is none of the files",)),
    ],
)
def test_a_wrong_modelfile_fails(subject, files, modelfile, name, value, words):
    fails(short(subject, files[0], edited(modelfile, name, value), model_rows=4), *words)


def test_bos_doubled_by_the_file_fails(run, place, subject):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + run.tokenizer.chat_template
    fails(
        short(subject, export_gguf(run.model, tokenizer, place / "wrong.gguf", "f16")),
        "on the path GGUF, 40 of 40 conversations don't begin",
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


# --- parts ----------------------------------------------------------------------------------------------------------


def test_cases(run):
    data = load_sft_dataset(split="heldout")
    cases = make_cases(data, run.tokenizer, 60)
    assert len(cases) == 60 and sum(case.kind == "held out" for case in cases) == 36
    assert cases == make_cases(data, run.tokenizer, 60)
    kinds = {case.kind: case.messages for case in cases}
    assert kinds["other system turn"][0]["role"] == "user" and len(kinds["several turns"]) == 5
    assert kinds["white space"][1]["content"] != kinds["white space"][1]["content"].strip()
    assert all(training_ids([case.messages for case in cases], run.tokenizer))
    assert len(make_cases(data.select(range(3)), run.tokenizer, 200)) == 200
    with pytest.raises(UserError, match="found 0 held-out rows"):
        make_cases([], run.tokenizer)


def test_spread():
    assert spread(10, 3) == [0, 3, 6] and spread(5, 5) == [0, 1, 2, 3, 4] and spread(5, 0) == []


def test_divergence_is_zero_only_for_the_same():
    import torch

    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))
    assert float(divergence(logits, logits + 3).max()) < 1e-12  # a constant changes no probability
    assert float(divergence(logits, logits.flip(-1)).min()) > 0.01


def test_the_reference_is_the_adapter_model_and_no_merge(run, subject):
    "Unpacked or not, merged by peft or not: one model. With the adapter taken off, another."
    import torch

    ids = torch.tensor([training_ids([load_sft_dataset(split="heldout")[0]["messages"]], run.tokenizer)[0].whole])
    with torch.no_grad():
        reference = subject.model(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, reference, atol=1e-4, rtol=1e-4)
        with subject.model.disable_adapter():
            assert float(divergence(reference[0], subject.model(ids).logits[0]).mean()) > 0.01


def test_greedy_is_one_token_after_the_other(run, files):
    "Many conversations at once give what each gives alone, by the logits of the whole."
    data = load_sft_dataset(split="heldout")
    prompts = [row.prompt for row in training_ids([data[i]["messages"] for i in range(40)], run.tokenizer)]
    with LlamaFile(files[0]) as file:
        many = greedy(file, prompts, 24, {run.tokenizer.eos_token_id})
        assert [len(row) for row in many] == [24] * 40
        for prompt, said in zip(prompts[::13], many[::13]):
            logits = file_logits(file, prompt + said)
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == said


def test_the_server_stops_and_leaves_interrupts_alone(files):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    addresses = []
    real = certificate._ask

    def ask(address, body):
        addresses.append(address)
        return real(address, body)

    with mock.patch.object(certificate, "_ask", ask), pytest.raises(ZeroDivisionError):
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
    want = training_ids([case.messages], run.tokenizer)[0]
    assert tokenizer_ids(case.messages, run.tokenizer) == want
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| upper")
    assert tokenizer_ids(case.messages, tokenizer) != want
