"""GGUF: llama.cpp computes what transformers computes and reads what the tokenizer reads, or the export is refused."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import processes
import pytest
import torch
from gguf_models import (
    MODELS,
    byte_level,
    large_tokenizer,
    llama_logits,
    needed,
    open_llama,
    random_model,
    sentencepiece,
    strings,
    write_llama_1b,
)

from qlora_nb import gguf_export
from qlora_nb.core import EMBEDDED_MODEL, UserError, file_sha256
from qlora_nb.gguf_export import GGUF_QUANTIZATIONS, export_gguf, quantize_q4_0, quantize_q8_0
from qlora_nb.llama import quiet_llama
from qlora_nb.merging import save_merged
from qlora_nb.weights import read_header

gguf, llama_cpp = needed("gguf"), needed("llama_cpp")


def test_a_missing_package_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ModuleNotFoundError):
        needed("there_is_no_such_package")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        needed("there_is_no_such_package")


KINDS = ("llama3", "smaug", "qwen2", "gpt2", "smollm")
SMALL = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {kind: byte_level(kind) for kind in KINDS}
    for kind in ("first", "always", "normalizer"):
        made[kind] = sentencepiece(tmp_path_factory.mktemp(kind), kind)
    return made


@pytest.fixture
def judge():
    "Opens a file in llama.cpp, and closes it in the end."
    opened = []

    def open_(path, **settings):
        opened.append(open_llama(path, **settings))
        return opened[-1]

    yield open_
    for llama in opened:
        llama.close()


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def keys(path):
    "The file's keys as Python values."
    return {name: part.contents() for name, part in gguf.GGUFReader(path).fields.items()}


def prompt(tokenizer):
    "Ids with every control token among them."
    text = "Tom has 3 apples.\n\n 你好 " * 6
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    assert len(special) >= 8
    return tokenizer(text)["input_ids"][:120] + sorted(special)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_each_architecture(name, tokenizers, judge, tmp_path):
    tokenizer = tokenizers["qwen2" if "qwen" in name else "llama3"]
    model, ids = random_model(name, len(tokenizer)), prompt(tokenizer)
    llama = judge(export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    wanted = torch_logits(model, ids)
    assert wanted.std() > 0.5, "logits this small would agree by chance"
    torch.testing.assert_close(llama_logits(llama, ids), wanted, rtol=0, atol=1e-4)


def test_the_same_from_a_folder_with_old_and_new_config(tokenizers, tmp_path):
    tokenizer, model = tokenizers["llama3"], random_model("llama 3 rope", len(tokenizers["llama3"]))
    new = export_gguf(model, tokenizer, tmp_path / "a" / "same.gguf", "f32")
    folder = tmp_path / "folder"
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    (folder / "config.json").write_text(json.dumps(config))
    old = export_gguf(folder, None, tmp_path / "b" / "same.gguf", "f32")
    assert tensors_of(old) == tensors_of(new)
    mine, theirs = keys(old), keys(new)
    for key in ("general.base_model.count", "general.base_model.0.name"):
        mine.pop(key, None), theirs.pop(key, None)
    assert mine == theirs


def tensors_of(path):
    return {t.name: (t.tensor_type.name, tuple(t.shape), bytes(t.data)) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "harm",
    [
        lambda m: m.setattr(gguf_export, "permute_rows", lambda weight, heads: weight),
        lambda m: m.setattr(gguf_export, "compute_rope_factors", lambda rope, dim: torch.ones(dim // 2)),
        lambda m: m.setattr(gguf_export, "head_size", lambda config: 32),
    ],
    ids=["no permutation", "no rope scaling", "nothing"],
)
def test_a_wrong_export_is_seen(harm, tokenizers, judge, tmp_path, monkeypatch, request):
    tokenizer = tokenizers["llama3"]
    model, ids = random_model("llama 3 rope", len(tokenizer)), prompt(tokenizer)
    harm(monkeypatch)
    llama = judge(export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    far = (llama_logits(llama, ids) - torch_logits(model, ids)).abs().max()
    assert far < 1e-4 if "nothing" in request.node.name else far > 0.05


@pytest.fixture(scope="module")
def quantized(tokenizers, tmp_path_factory):
    "One model in every format, from one pass. Its rows divide into blocks of 256."
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = random_model("llama", len(tokenizers["llama3"]), **sizes)
    files = export_gguf(model, tokenizers["llama3"], tmp_path_factory.mktemp("all") / "m", list(GGUF_QUANTIZATIONS))
    return model, dict(zip(GGUF_QUANTIZATIONS, files))


def test_names_and_types_of_each_format(quantized):
    files = quantized[1]
    assert [path.name for path in files.values()] == [f"m-{name.upper()}.gguf" for name in GGUF_QUANTIZATIONS]
    assert sorted(os.listdir(files["f16"].parent)) == sorted(path.name for path in files.values())
    for name, path in files.items():
        found = keys(path)
        assert found["general.file_type"] == GGUF_QUANTIZATIONS[name].file_type
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        kind = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}.get(name, name.upper())
        assert types["blk.0.attn_q.weight"] == kind
        assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
        assert types["output.weight"] == {"q4_0": "Q8_0", "q4_k_m": "Q6_K", "q5_k_m": "Q6_K"}.get(name, kind)
    assert sum(1 for path in files.values() if b"Written by qlora_nb" in path.read_bytes()) == len(files)


def test_finer_formats_are_nearer(quantized, tokenizers, judge):
    model, files = quantized
    ids = prompt(tokenizers["llama3"])
    wanted = torch_logits(model, ids)
    far = {name: float((llama_logits(judge(path), ids) - wanted).pow(2).mean().sqrt()) for name, path in files.items()}
    order = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
    assert sorted(far, key=far.get) == order, far
    share = {name: value / float(wanted.std()) for name, value in far.items()}
    bounds = {"f32": 1e-5, "f16": 2e-3, "bf16": 0.02, "q8_0": 0.06, "q6_k": 0.15}
    bounds |= {"q5_k_m": 0.25, "q4_k_m": 0.5, "q4_0": 0.6}
    assert not {name: value for name, value in share.items() if value > bounds[name]}


def rows_to_pack():
    draw = torch.Generator().manual_seed(0)
    yield from (torch.randn(64, 1024, generator=draw) * 10.0**e for e in (-30, -8, -3, 0, 3))
    yield from (torch.zeros(4, 64), -torch.zeros(4, 64))
    yield torch.randint(-3, 4, (64, 1024), generator=draw).float()  # many as large, of both signs
    yield torch.randint(-127, 128, (64, 1024), generator=draw) / 2  # halves: which way are they rounded?
    yield torch.randn(64, 1024, generator=draw).bfloat16().float()


@pytest.mark.parametrize("pack, name", [(quantize_q8_0, "Q8_0"), (quantize_q4_0, "Q4_0")], ids=["q8_0", "q4_0"])
def test_packed_bit_for_bit_as_the_reference(pack, name):
    for rows in rows_to_pack():
        reference = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[name])
        assert np.array_equal(pack(rows).numpy(), reference)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
def test_rows_that_are_no_whole_blocks(kind, tokenizers, judge, tmp_path):
    "As llama.cpp has it: F16 where 32 doesn't divide, a format with blocks of 32 where 256 doesn't."
    tokenizer = tokenizers["llama3"]
    model = random_model("llama", len(tokenizer), intermediate_size=250, **SMALL)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == {"q4_k_m": "Q5_0"}.get(kind, kind.upper())
    ids = prompt(tokenizer)
    far = (llama_logits(judge(path), ids) - torch_logits(model, ids)).pow(2).mean().sqrt()
    assert far < 0.3


@pytest.mark.parametrize("info", [b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", b"CPU : AVX2 = 1 | "])
def test_llama_without_amx(info, monkeypatch):
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: info)
    makers = [lambda: llama_cpp.llama_model_default_params(), lambda: llama_cpp.llama_cpp.llama_model_default_params()]
    with quiet_llama():
        assert [make().use_extra_bufts for make in makers] == [b"AMX" not in info] * 2
    assert [make().use_extra_bufts for make in makers] == [True] * 2


# --- the tokens -----------------------------------------------------------------------------------------------------


def differences(llama, tokenizer, texts):
    found = []
    with quiet_llama():
        for text, special in itertools.product(texts, (True, False)):
            wanted = tokenizer(text, add_special_tokens=special)["input_ids"]
            if llama.tokenize(text.encode(), add_bos=special, special=True) != wanted:
                found.append((text, special))
    return found


@pytest.mark.parametrize("kind", [*KINDS, "normalizer"])
def test_the_same_tokens(kind, tokenizers, judge, tmp_path):
    tokenizer = tokenizers[kind]
    model = random_model("qwen2" if kind == "qwen2" else "llama", len(tokenizer), **SMALL)
    llama = judge(export_gguf(model, tokenizer, tmp_path / "m.gguf", "f16"))
    texts = strings(list(tokenizer.added_tokens_encoder), count=400)
    if kind == "qwen2":  # transformers composes é from e and an accent first (NFC), llama.cpp doesn't
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert differences(llama, tokenizer, texts) == []


def test_the_same_tokens_as_the_embedded_tokenizer(judge, tmp_path):
    from transformers import AutoTokenizer

    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.template import render

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    llama = judge(export_gguf(EMBEDDED_MODEL, None, tmp_path / "m.gguf", "f16"))
    texts = strings(list(tokenizer.added_tokens_encoder), seed=1, count=400)
    texts += [render(row["messages"], tokenizer) for row in load_sft_dataset(split="heldout")]
    assert len(texts) > 500 and differences(llama, tokenizer, texts) == []


def test_sentencepiece_of_today_agrees_where_text_follows_a_control_token(tokenizers, judge, tmp_path):
    "transformers puts its space only at the very beginning: in a conversation the BOS stands there."
    tokenizer = tokenizers["first"]
    path = export_gguf(random_model("mistral", len(tokenizer), **SMALL), tokenizer, tmp_path / "m.gguf", "f16")
    assert keys(path)["tokenizer.ggml.add_space_prefix"] is False
    texts = [tokenizer.bos_token + text for text in strings(list(tokenizer.added_tokens_encoder), count=400)]
    llama = judge(path)
    assert [d for d in differences(llama, tokenizer, texts) if not d[1]] == []


def test_sentencepiece_with_a_space_always(tokenizers, judge, tmp_path):
    "Equal but for text that begins with a space itself, which transformers leaves alone."
    tokenizer = tokenizers["always"]
    path = export_gguf(random_model("llama", len(tokenizer), **SMALL), tokenizer, tmp_path / "m.gguf", "f16")
    assert keys(path)["tokenizer.ggml.add_space_prefix"] is True
    texts = strings(list(tokenizer.added_tokens_encoder), count=400)
    control = [*tokenizer.added_tokens_encoder]
    plain = [
        t for t in texts if not t.startswith((" ", "▁")) and not any(f"{c}{s}" in t for c in control for s in " ▁")
    ]
    assert len(plain) > 200 and differences(judge(path), tokenizer, plain) == []


def test_scores_are_those_of_sentencepiece(tokenizers, tmp_path):
    "Order matters: the pieces rank as in the file that sentencepiece itself wrote."
    import sentencepiece as spm

    tokenizer = tokenizers["first"]
    path = export_gguf(random_model("llama", len(tokenizer), **SMALL), tokenizer, tmp_path / "m.gguf", "f16")
    found = keys(path)
    theirs = spm.SentencePieceProcessor(model_file=str(tokenizer.sp_file))
    pieces = [
        i
        for i in range(theirs.vocab_size())
        if len(theirs.id_to_piece(i)) > 1 and found["tokenizer.ggml.token_type"][i] == 1
    ]
    mine = sorted(pieces, key=lambda i: -found["tokenizer.ggml.scores"][i])
    assert len(pieces) > 200 and mine == sorted(pieces, key=lambda i: -theirs.get_score(i))


def test_more_rows_than_tokens(tokenizers, judge, tmp_path):
    tokenizer = tokenizers["llama3"]
    size = len(tokenizer)
    path = export_gguf(random_model("llama", size + 60, **SMALL), tokenizer, tmp_path / "m.gguf", "f16")
    found = keys(path)
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 60)]
    assert set(found["tokenizer.ggml.token_type"][size:]) == {5} and found["llama.vocab_size"] == size + 60
    assert differences(judge(path), tokenizer, [f"[PAD{size}] x", "a[PAD3]"]) == []


# --- what the file says ---------------------------------------------------------------------------------------------


def test_keys_of_the_embedded_model(tmp_path):
    path = export_gguf(
        EMBEDDED_MODEL, None, tmp_path / "tiny" / "mine.gguf", "q8_0", name="My tutor", license="apache-2.0"
    )
    found = keys(path)
    wanted = {
        "general.architecture": "llama", "general.type": "model",
        "general.name": "My tutor", "general.license": "apache-2.0",
        "general.file_type": 7, "general.quantization_version": 2,
        "general.size_label": "2.6M", "llama.context_length": 2048,
        "llama.embedding_length": 256, "llama.block_count": 4,
        "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 64, "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 768,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 757,
        "tokenizer.ggml.eos_token_id": 766, "tokenizer.ggml.eot_token_id": 766, "tokenizer.ggml.eom_token_id": 765,
        "tokenizer.ggml.padding_token_id": 761, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["general.description"].startswith("Written by qlora_nb ")
    assert found["tokenizer.chat_template"] == (EMBEDDED_MODEL / "chat_template.jinja").read_text()
    assert math.isclose(found["llama.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]))
    assert types["<|eot_id|>"] == 3 and types["!"] == 1


def test_a_window_is_the_context(tokenizers, tmp_path):
    "llama.cpp sees the whole context; up to the window that is the same."
    tokenizer = tokenizers["llama3"]
    model = random_model("mistral", len(tokenizer), sliding_window=64, **SMALL)
    assert keys(export_gguf(model, tokenizer, tmp_path / "m.gguf"))["llama.context_length"] == 64


def test_the_same_bytes_twice(tokenizers, tmp_path):
    model = random_model("qwen3", len(tokenizers["qwen2"]))
    files = [export_gguf(model, tokenizers["qwen2"], tmp_path / name / "m.gguf", "q8_0") for name in "ab"]
    assert file_sha256(files[0]) == file_sha256(files[1])


def test_where_files_go(tokenizers, tmp_path):
    model, tokenizer = random_model("llama", len(tokenizers["llama3"]), **SMALL), tokenizers["llama3"]
    assert export_gguf(model, tokenizer, tmp_path / "my-model", "Q8_0") == tmp_path / "my-model" / "my-model-Q8_0.gguf"
    assert export_gguf(model, tokenizer, tmp_path / "my-model", ["f16"]) == [tmp_path / "my-model/my-model-F16.gguf"]
    with pytest.raises(UserError, match="m.gguf is one file, and 2 quantizations"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", ["f16", "q8_0"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: name a folder"):
        export_gguf(model, tokenizer, tmp_path / "file")
    with pytest.raises(UserError, match="no quantization 'q3_k': choose from f32, f16"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "q3_k")


# --- adapters -------------------------------------------------------------------------------------------------------


def with_adapter(model, **settings):
    import peft

    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data.mul_(1.1)
        elif "modules_to_save" in name or (settings.get("bias") == "all" and name.endswith("bias")):
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


PATTERNS = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 40}}
ADAPTERS = {
    "plain": {}, "rslora": {"use_rslora": True},
    "patterns": PATTERNS, "rslora, patterns": {**PATTERNS, "use_rslora": True},
    "dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["embed_tokens"]}, "bias": {"bias": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama, biases", "qwen2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_adapters(name, adapter, tokenizers, judge, tmp_path):
    tokenizer = tokenizers["qwen2" if "qwen" in name else "llama3"]
    model, ids = random_model(name, len(tokenizer)), prompt(tokenizer)
    plain = torch_logits(model, ids)
    model = with_adapter(model, **ADAPTERS[adapter])
    wanted = torch_logits(model, ids)
    assert (wanted - plain).abs().max() > 0.5
    llama = judge(export_gguf(model, tokenizer, tmp_path / "merged.gguf", "f32"))
    torch.testing.assert_close(llama_logits(llama, ids), wanted, rtol=0, atol=1e-4)


def test_a_4_bit_model_and_its_saved_adapter(judge, tmp_path):
    "The live 4-bit model, its folder, and its merged folder: the same file, but for the provenance."
    from qlora_nb.adapter import save_adapter
    from qlora_nb.model import add_lora, load_model

    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
    model = add_lora(model, r=8).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = prompt(tokenizer)
    wanted = torch_logits(model, ids)
    live = export_gguf(model, tokenizer, tmp_path / "live.gguf", "f32")
    torch.testing.assert_close(llama_logits(judge(live), ids), wanted, rtol=0, atol=1e-3)
    assert "LoRA (r=8, alpha=16), merged into its dequantized 4-bit weights" in keys(live)["general.description"]
    save_adapter(model, tokenizer, tmp_path / "adapter")
    save_merged(model, tokenizer, tmp_path / "merged")
    for folder in ("adapter", "merged"):
        assert tensors_of(export_gguf(tmp_path / folder, None, tmp_path / "f.gguf", "f32")) == tensors_of(live)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tokenizers, tmp_path):
    "A model's folder to spoil."
    random_model("llama", len(tokenizers["llama3"]), **SMALL).save_pretrained(tmp_path / "model")
    tokenizers["llama3"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(**changes):
    def harm(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return harm


def edit_tensors(change):
    def harm(folder):
        import safetensors.torch

        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    return harm


NORM = "model.layers.0.input_layernorm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
REFUSED = {
    "architecture": (
        edit_config(architectures=["GemmaForCausalLM"]),
        "architecture GemmaForCausalLM can't be exported: known",
    ),
    "no architecture": (edit_config(architectures=None, model_type="phi"), "architecture phi can't be exported"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "rope": (
        edit_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope type 'dynamic'",
    ),
    "part of the head": (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "quantized already"),
    "sizes": (edit_config(hidden_size=64), "has the shape .*, 128.* in the files, and .*64.* by config.json"),
    "heads": (edit_config(num_key_value_heads=4), "k_proj.weight has the shape .64, 128. in .*, and .128, 128. by"),
    "layers": (edit_config(num_hidden_layers=2), "has no model.layers.1.input_layernorm.weight"),
    "config": (lambda f: (f / "config.json").write_text("[1]"), "a list where a mapping was expected"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json can't be read"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), f"the model has no {NORM}"),
    "unknown": (
        edit_tensors(lambda t: t.update({"model.extra.weight": torch.ones(3)})),
        "model.extra.weight is in the files, but not in the model",
    ),
    "nan": (
        edit_tensors(lambda t: t[GATE].view(-1)[7:8].fill_(math.nan)),
        "gate_proj.weight holds NaN or infinity",
    ),
    "infinite": (edit_tensors(lambda t: t[GATE].view(-1)[7:8].fill_(-math.inf)), "NaN or infinity"),
    "too large": (
        edit_tensors(lambda t: t[GATE].view(-1)[7:8].fill_(1e6)),
        "holds 1e.06, which fp16 can't hold: export bf16",
    ),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 100_000), "damaged or incomplete"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged or incomplete"),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks model-2.safetensors, which its index names",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no .safetensors weights"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_leaves_the_old_file(what, folder, tmp_path):
    harm, said = REFUSED[what]
    old = export_gguf(folder, None, tmp_path / "out" / "m.gguf", "f16")
    before = file_sha256(old)
    harm(folder)
    with pytest.raises(UserError, match=said) as caught:
        export_gguf(folder, None, old, "f16")
    assert "\n" not in str(caught.value)
    assert file_sha256(old) == before and os.listdir(old.parent) == ["m.gguf"]


def spoiled(tokenizers, kind, change):
    "A tokenizer whose parts were changed as JSON."
    import copy

    from tokenizers import Tokenizer

    tokenizer = copy.deepcopy(tokenizers[kind])
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


def other_split(parts):
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}+|\s+"


def strip_token(parts):
    parts["added_tokens"][0]["lstrip"] = True


def without_a_merge(parts):
    parts["model"]["merges"] = [m for m in parts["model"]["merges"] if "".join(m) != "▁th" and m != "▁t h"]


TOKENIZERS = {
    "split": ("llama3", other_split, "splits text in a way that is not known"),
    "ignore_merges": ("qwen2", lambda p: p["model"].update(ignore_merges=True), "ignore_merges=True"),
    "normalizer": ("llama3", lambda p: p.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "prefix": ("gpt2", lambda p: p["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "strip": ("llama3", strip_token, "takes in the white space beside it"),
    "suffix": ("gpt2", lambda p: p["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "merges": ("normalizer", without_a_merge, "but doesn't merge the two"),
    "bytes": (
        "normalizer", lambda p: p["model"]["vocab"].update({"<0x!!>": p["model"]["vocab"].pop("<0x41>")}),
        "no token <0x41>",
    ),
    "spaces": ("first", lambda p: p.update(normalizer={"type": "NFKC"}), "prepares text in an unknown way"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizers_that_are_refused(what, tokenizers, tmp_path):
    kind, change, said = TOKENIZERS[what]
    tokenizer = spoiled(tokenizers, kind, change)
    model = random_model("llama", len(tokenizer) + 8, **SMALL)
    with pytest.raises(UserError, match=said):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_other_tokenizers_and_sizes_that_are_refused(tokenizers, tmp_path):
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast

    model = random_model("llama", 700, **SMALL)
    with pytest.raises(UserError, match="the tokenizer has 70. tokens and the embedding 700 rows"):
        export_gguf(model, tokenizers["llama3"], tmp_path / "m.gguf")
    unigram = PreTrainedTokenizerFast(tokenizer_object=hf.Tokenizer(hf.models.Unigram([("a", -1.0), ("b", -2.0)])))
    with pytest.raises(UserError, match="a Unigram: only BPE"):
        export_gguf(model, unigram, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="no tokenizer was given"):
        export_gguf(model, None, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        export_gguf(tmp_path / "nowhere", None, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    "Mounts a small disk with the given options; skipped where mounting is not allowed."
    place, mounted = tmp_path / "disk", []

    def mount(options):
        place.mkdir(exist_ok=True)
        command = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            failed = subprocess.run(command, capture_output=True).returncode
        except OSError:
            failed = 1
        if failed:
            pytest.skip("mounting is not allowed here")
        mounted.append(place)
        return place

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_k_m", ["q8_0", "q4_k_m"]], ids=str)
@pytest.mark.parametrize("asked_first", [True, False], ids=["asked first", "found while writing"])
def test_a_full_disk(quantization, asked_first, disk, tmp_path, monkeypatch):
    place = disk("size=5000k")
    old = export_gguf(EMBEDDED_MODEL, None, place / "m" / "m-Q8_0.gguf", "q8_0")
    before = file_sha256(old)
    if not asked_first:
        monkeypatch.setattr(gguf_export, "check_disk", lambda *_: None)
    with pytest.raises(UserError, match="free some") as caught:
        export_gguf(EMBEDDED_MODEL, None, place / "m", quantization)
    assert "\n" not in str(caught.value)
    assert file_sha256(old) == before and os.listdir(place / "m") == [old.name]


def test_llama_cpp_runs_out_of_space(disk, monkeypatch):
    "What it is made from fits, the K-quant doesn't."
    place = disk("size=6000k")
    monkeypatch.setattr(gguf_export, "check_disk", lambda *_: None)
    with pytest.raises(UserError, match="could not quantize to q6_k .no space left"):
        export_gguf(EMBEDDED_MODEL, None, place / "m.gguf", "q6_k")
    assert os.listdir(place) == []


def test_a_read_only_disk(disk):
    place = disk("size=20m,ro")
    with pytest.raises(UserError, match="can't be written"):
        export_gguf(EMBEDDED_MODEL, None, place / "m.gguf")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_locked_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written"):
        export_gguf(EMBEDDED_MODEL, None, tmp_path / "locked" / "m.gguf")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export_gguf(EMBEDDED_MODEL, None, tmp_path / "m.gguf")


AGAIN = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from qlora_nb.core import EMBEDDED_MODEL
from qlora_nb.gguf_export import export_gguf
export_gguf(EMBEDDED_MODEL, None, sys.argv[1], ["q8_0", "q4_0"])  # which takes away what a killed process left
pathlib.Path(sys.argv[2]).touch()
while True:
    export_gguf(EMBEDDED_MODEL, None, sys.argv[1], ["q8_0", "q4_0"])
"""


@pytest.mark.parametrize("turns", [3, pytest.param(6, marks=pytest.mark.heavy)])
def test_killed_at_any_moment(turns, tmp_path):
    "Old files or new ones, whole; what a killed process leaves beside them goes with the next export."
    target, draw = tmp_path / "m", random.Random(0)
    files = export_gguf(EMBEDDED_MODEL, None, target, ["q8_0", "q4_0"])
    before = {file.name: file_sha256(file) for file in files}
    left = 0
    for turn in range(turns):
        ready = tmp_path / f"ready{turn}"
        process = processes.Process(AGAIN, target, ready, cwd=tmp_path)
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(draw.uniform(0.3, 1.5))
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT if turn % 3 == 2 else signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == -(signal.SIGINT if turn % 3 == 2 else signal.SIGKILL)
        found = set(os.listdir(target)) - set(before)
        assert not found or turn % 3 != 2, "Ctrl-C leaves nothing"
        left += len(found)
        assert {name: file_sha256(target / name) for name in before} == before
    (target / f".{files[0].name}.{2**22 + 1}.part").write_bytes(b"of a process that is gone")
    (target / f".{files[0].name}.{os.getpid()}.part.note").write_bytes(b"another's")
    export_gguf(EMBEDDED_MODEL, None, target, ["q8_0", "q4_0"])
    assert set(os.listdir(target)) - set(before) == {f".{files[0].name}.{os.getpid()}.part.note"}


# --- memory ---------------------------------------------------------------------------------------------------------

WATCH = """
import json, sys, threading, time
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

start, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
from qlora_nb import export_gguf
files = export_gguf(sys.argv[1], tokenizer, sys.argv[2], sys.argv[3:])
done.set()
thread.join()
print(json.dumps([peak[0] - start, *(file.stat().st_size for file in files)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.heavy
def test_a_2_5_gb_folder_is_streamed(tmp_path):
    "The shape of Llama-3.2-1B, with a vocabulary as large: the bound is three times the largest tensor and 500 MB."
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    folder = tmp_path / "model"
    folder.mkdir()
    large_tokenizer().save_pretrained(folder)
    write_llama_1b(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = max(
        math.prod(entry["shape"]) * 2 for file in folder.glob("*.safetensors") for entry in read_header(file).values()
    )
    assert 2.4e9 < size < 2.6e9 and largest == 128_256 * 2048 * 2
    try:
        command = [sys.executable, "-c", WATCH, str(folder), str(tmp_path / "out"), "q8_0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        peak, written = json.loads(done.stdout)
        assert 0.53 < written / size < 0.54  # 8.5 bits of 16, and the tokenizer
        assert peak <= 3 * largest + 500e6
        assert peak < 400e6, "no tensor is held whole: it was 60 MB when this was written"
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(folder)


def test_licence_and_base_from_the_model_card(folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: llama3.2\nbase_model: meta-llama/Llama-3.2-1B\n---\n\n# Mine\n")
    found = keys(export_gguf(folder, None, tmp_path / "m.gguf"))
    assert found["general.license"] == "llama3.2" and found["general.base_model.0.name"] == "meta-llama/Llama-3.2-1B"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/Llama-3.2-1B"


def test_a_tied_head_that_is_stored_after_all(tokenizers, judge, tmp_path):
    "Some files hold it twice. Equal: left out. Different: one of the two is wrong."
    import safetensors.torch

    tokenizer = tokenizers["llama3"]
    model, file = random_model("llama, tied", len(tokenizer), **SMALL), tmp_path / "f" / "model.safetensors"
    model.save_pretrained(tmp_path / "f")
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    llama = judge(export_gguf(tmp_path / "f", tokenizer, tmp_path / "m.gguf", "f32"))
    ids = prompt(tokenizer)
    torch.testing.assert_close(llama_logits(llama, ids), torch_logits(model, ids), rtol=0, atol=1e-4)
    assert "output.weight" not in tensors_of(tmp_path / "m.gguf")
    tensors["lm_head.weight"][3, 3] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(UserError, match="though config.json ties them"):
        export_gguf(tmp_path / "f", tokenizer, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("bits", [4, 16])
def test_a_run_is_merged_into_what_it_was_trained_on(bits, judge, tmp_path):
    "config.yaml says whether the base was in 4 bits; the run's folder and its adapter's give the same file."
    from qlora_nb.adapter import save_adapter
    from qlora_nb.core import write_yaml
    from qlora_nb.manifest import write_manifest
    from qlora_nb.model import add_lora, load_model
    from qlora_nb.run import RUN_FORMAT

    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=bits == 4, backend="transformers")
    model = add_lora(model, r=4).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, tokenizer, tmp_path / "run" / "adapter")
    settings = {"format": RUN_FORMAT, "model": "qlora_nb:embedded", "revision": None, "max_seq_length": 512}
    settings |= {"load_in_4bit": bits == 4, "dtype": "float32"}
    write_yaml(tmp_path / "run" / "config.yaml", settings)
    write_manifest(tmp_path / "run", only=["adapter"])
    files = [export_gguf(tmp_path / place, None, tmp_path / "m.gguf", "f32") for place in ("run", "run/adapter")]
    assert files[0] == files[1]
    ids = prompt(tokenizer)
    torch.testing.assert_close(llama_logits(judge(files[0]), ids), torch_logits(model, ids), rtol=0, atol=1e-3)
