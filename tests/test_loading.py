"""What is loaded is whole, and is what its files say: weights, tokenizers, adapters with template and precision."""

import ast
import base64
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf_models
import pytest
import regex
import torch
from peft import LoraConfig, get_peft_model
from repository import MODULES, PACKAGE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_nb.adapter import load_adapter, model_info, save_adapter, trained_in_4bit
from qlora_nb.certificate import certify
from qlora_nb.cli import main, open_for_chat
from qlora_nb.core import EMBEDDED_DATA, EMBEDDED_MODEL, UserError
from qlora_nb.evaluation import evaluate
from qlora_nb.generation import chat
from qlora_nb.gguf_export import export_gguf
from qlora_nb.gguf_tokens import _TEKKEN as TEKKEN
from qlora_nb.llama import chat_server
from qlora_nb.loading import load_tokenizer
from qlora_nb.merging import merge_adapter, save_merged
from qlora_nb.model import add_lora, load_model, open_run
from qlora_nb.ollama_export import modelfile_for
from qlora_nb.rows import load_sft_dataset
from qlora_nb.template import render
from qlora_nb.workflow import train

WEIGHTS = load_file(EMBEDDED_MODEL / "model.safetensors")
MLP, NORM, QUERY = (f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "input_layernorm", "self_attn.q_proj"))
ENV = {**os.environ, "QLORA_NB_PROFILE": "tiny"}


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    "A command of `qlora_nb`, in this process and an empty folder: its exit code, stdout and stderr."
    monkeypatch.setenv("QLORA_NB_PROFILE", "tiny")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return SimpleNamespace(code=ended.value.code, **capfd.readouterr()._asdict())

    return run


def base(folder, change=None, config=None, tokenizer=None):
    "A copy of the embedded model with other weights, and other entries in two of its files."
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    if change:
        change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file, entries in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        found = json.loads((folder / file).read_text()) | (entries or {})
        (folder / file).write_text(json.dumps(found))
    return folder


def without(*names):
    def change(weights):
        for name in [name for name in weights if any(part in name for part in names)]:
            del weights[name]

    return change


def spoiled(name, value):
    def change(weights):
        weights[name].view(-1)[7] = value

    return change


def shorter(name):
    def change(weights):
        weights[name] = weights[name][:-64].contiguous()

    return change


def zeroed(name):
    def change(weights):
        weights[name].zero_()

    return change


def other_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def added(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)


NAN, INF = float("nan"), float("inf")
DAMAGED = {
    "no embedding": (without("embed_tokens"), {}, r"model\.embed_tokens\.weight is missing from the files"),
    "no norm": (without(NORM), {}, rf"{NORM} is missing"),
    "no matrix": (without(MLP), {}, rf"{MLP} is missing"),
    "no last norm": (without("model.norm"), {}, r"model\.norm\.weight is missing"),
    "a layer missing": (without("layers.3."), {}, r"model\.layers\.3\..* is missing.*and 6 more"),
    "fewer layers": (
        None,
        {"num_hidden_layers": 2},
        r"model\.layers\.\{2, 3\}\..* is in the files, but not in the model",
    ),
    "more layers": (None, {"num_hidden_layers": 5}, r"model\.layers\.4\..* is missing"),
    "a bias too many": (added, {}, r"model\.layers\.0\.self_attn\.q_proj\.bias is in the files, but not in the model"),
    "vocabulary": (
        None,
        {"vocab_size": 900},
        r"model\.embed_tokens\.weight has the shape \(768, 256\) .* \(900, 256\)",
    ),
    "width": (None, {"intermediate_size": 640}, r"mlp\.\w+\.weight has the shape"),
    "heads": (
        None,
        {"num_key_value_heads": 4},
        r"self_attn\.[kv]_proj\.weight has the shape \(128, 256\) .* \(256, 256\)",
    ),
    "cut matrix": (shorter(MLP), {}, rf"{MLP} has the shape \(448, 256\) .* \(512, 256\)"),
    "cut norm": (shorter(NORM), {}, rf"{NORM} has the shape \(192,?\) .* \(256,?\)"),
    "NaN in a matrix": (spoiled(QUERY, NAN), {}, rf"{QUERY} in .*model\.safetensors holds NaN or infinite"),
    "infinity in a matrix": (spoiled(QUERY, -INF), {}, rf"{QUERY} in .* holds NaN or infinite"),
    "NaN in a norm": (spoiled(NORM, NAN), {}, rf"{NORM} in .* holds NaN or infinite"),
    "an empty matrix": (zeroed(QUERY), {}, rf"{QUERY} in .* holds nothing but zeros"),
    "an empty embedding": (zeroed("model.embed_tokens.weight"), {}, r"embed_tokens\.weight .* nothing but zeros"),
    "another head": (other_head, {}, r"lm_head\.weight in .* isn't model\.embed_tokens\.weight, though"),
    "infinity in the embedding": (
        spoiled("model.embed_tokens.weight", INF),
        {},
        r"embed_tokens\.weight in .* holds NaN",
    ),
}


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_base_that_is_not_whole(kind, load_in_4bit, tmp_path):
    change, config, said = DAMAGED[kind]
    folder = base(tmp_path / "base", change, config)
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder, load_in_4bit=load_in_4bit)
    assert str(folder) in str(caught.value) and "download or copy" in str(caught.value)


def test_constants_of_older_files_are_no_damage(tmp_path):
    def buffers(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)
        weights["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)

    load_model(base(tmp_path / "base", buffers))


def test_a_base_in_4_bits(tmp_path):
    for part in load_model("qlora_nb:embedded"):
        part.save_pretrained(tmp_path / "packed")
    assert load_model(tmp_path / "packed")[0].model.layers[0].mlp.up_proj.weight.quant_state.nested
    with pytest.raises(UserError, match="is stored in 4 bits: load it with load_in_4bit=True"):
        load_model(tmp_path / "packed", load_in_4bit=False)
    weights = load_file(tmp_path / "packed/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file(weights, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight\.nested_absmax is missing"):
        load_model(tmp_path / "packed")


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_whole_base_in_shards(load_in_4bit, tmp_path, capfd):
    folder = base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="2MB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    capfd.readouterr()
    load_model(folder, load_in_4bit=load_in_4bit)
    assert capfd.readouterr().err == ""
    weights = load_file(shards[1])
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[0] = NAN
    save_file(weights, shards[1], metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} in .*{shards[1].name} holds NaN"):
        load_model(folder, load_in_4bit=load_in_4bit)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"can't be loaded.*{shards[1].name}|{shards[1].name}"):
        load_model(folder, load_in_4bit=load_in_4bit)


def test_numbers_that_a_dtype_cant_hold(tmp_path):
    folder = base(tmp_path / "base", spoiled(NORM, 1e6))
    load_model(folder)
    with pytest.raises(UserError, match=f"{NORM} is NaN or infinite in float16; load it with dtype='float32'"):
        load_model(folder, dtype="float16")


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
def test_unsloth_is_held_to_the_same(tmp_path):
    kinds = ["no embedding", "a layer missing", "fewer layers", "vocabulary", "cut matrix", "NaN in a matrix"]
    for kind in kinds:
        base(tmp_path / kind.replace(" ", "-"), *DAMAGED[kind][:2])
    code = """
import sys
from qlora_nb import load_model
from qlora_nb.core import UserError
for name in sys.argv[1:]:
    for bits in (True, False):
        try:
            load_model(name, backend="unsloth", load_in_4bit=bits)
            print("loaded")
        except UserError as error:
            print(str(error).replace(chr(10), " "))
"""
    names = [f"./{kind.replace(' ', '-')}" for kind in kinds]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(kinds), done.stderr[-3000:]
    for i, kind in enumerate(kinds):
        for line in said[2 * i : 2 * i + 2]:
            # Unsloth ties the embedding to the head by itself, and names the head
            part = DAMAGED[kind][2] if kind != "no embedding" else r"lm_head\.weight is missing"
            assert re.search(part, line), (kind, line)


def hub_cache(place, folder, name="me/tiny"):
    "The folder as the Hub's client would have downloaded it."
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = place / f"hub/models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    shutil.copytree(folder, model / f"snapshots/{commit}")


@pytest.mark.heavy
def test_a_model_from_the_hub_is_looked_at_too(tmp_path):
    hub_cache(tmp_path, base(tmp_path / "whole", tokenizer={"tokenizer_class": "LlamaTokenizerFast"}), "me/whole")
    hub_cache(tmp_path, base(tmp_path / "nan", spoiled(QUERY, NAN)), "me/nan")
    code = """
from qlora_nb import load_model
from qlora_nb.core import UserError
tokenizer = load_model("me/whole", max_seq_length=256)[1]
print(tokenizer.decode(tokenizer("Olga buys  3 boxes")["input_ids"], skip_special_tokens=True))
try:
    load_model("me/nan", max_seq_length=256)
except UserError as error:
    print(error)
"""
    env = {**ENV, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env = {key: value for key, value in env.items() if key not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == "Olga buys  3 boxes" and f"{QUERY} in " in second and "holds NaN" in second


# --- tokenizers -----------------------------------------------------------------------------------------------------

CLASSES = [
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
    "T5Tokenizer",
    "PreTrainedTokenizerFast",
    "SomethingElse",
]
TEXTS = [
    "Olga buys 3 boxes.",
    "  two   blanks ",
    "a\n\n b\tc",
    "1,234.5 x  49",
    "naïve — 東京 👩‍💻",
    "don't I'LL",
    "<b>&amp;</b>\\n",
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_files_own_ids_whatever_class_is_named(name, tmp_path, capfd):
    folder = base(tmp_path / "base", tokenizer={"tokenizer_class": name})
    own, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    usual = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    assert (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer)) == (
        usual.chat_template,
        usual.eos_token,
        len(usual),
    )
    departs = name.startswith(("Llama", "GPT2", "Qwen", "Gemma", "T5"))
    assert ("so the file's own tokenizer is used" in capfd.readouterr().err) == departs


def test_a_tokenizer_that_cant_do_what_its_file_says(tmp_path):
    token = {
        "content": "boxes",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    folder = base(tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.setdefault("added_tokens_decoder", {})["768"] = token
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="doesn't do what its tokenizer.json says .*'Olga buys 3 boxes.'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["null", "[]", '"x"', ""])
def test_a_damaged_tokenizer_is_named(file, text, tmp_path):
    folder = base(tmp_path / "base")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=f"{file} is not a JSON object"):
        load_tokenizer(folder)


def test_a_special_token_outside_the_embedding(tmp_path):
    with pytest.raises(UserError, match=r"pad_token of .* is '\[PAD\]' with the id 768, .* has 768 rows"):
        load_model(base(tmp_path / "base", tokenizer={"pad_token": "[PAD]"}))


def test_every_door_takes_the_files_tokenizer(tmp_path, command):
    folder = base(tmp_path / "base", tokenizer={"tokenizer_class": "LlamaTokenizerFast"})
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)("Olga buys 3 boxes.")["input_ids"]
    assert load_model(folder)[1]("Olga buys 3 boxes.")["input_ids"] == ids
    rows = EMBEDDED_DATA / "train.parquet"
    reports = [
        command("check", "--model", model, "--data", rows, "--limit", 60, "--json")
        for model in (folder, EMBEDDED_MODEL)
    ]
    assert reports[0].code == 0 and json.loads(reports[0].out)["summary"]["usable"] == 60
    assert reports[0].out == reports[1].out
    from gguf import GGUFReader

    tokens = [
        GGUFReader(export_gguf(source, None, tmp_path / f"{i}.gguf")).fields["tokenizer.ggml.tokens"].contents()
        for i, source in enumerate((folder, EMBEDDED_MODEL))
    ]
    assert tokens[0] == tokens[1]


# --- tokenizers in other files ----------------------------------------------------------------------------------------

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ROW = [{"role": "user", "content": "How  many\nboxes?"}, {"role": "assistant", "content": "Cafe\u0301: 3 × 49 = 147."}]


def tekken(folder, size=768, file="tekken.json", **config):
    "A tekken.json of this many tokens in a folder: bytes, and the pairs of letters that English has."
    words = [bytes([i]) for i in range(256)] + [
        b" the",
        b"the",
        b"th",
        b"ox",
        b"box",
        b" box",
        b"boxes",
        b" boxes",
        b"many",
    ]
    pairs = (bytes([a, b]) for a in b"etaoinshrdlu " for b in b"abcdefghijklmnopqrstuvwxyz\n")
    words += [pair for pair in pairs if pair not in words]
    words += [bytes([a, b, c]) for a in b"0123456789" for b in b"0123456789" for c in b"0123"]  # no regex lets them be
    config = {"pattern": TEKKEN, "default_vocab_size": size, "default_num_special_tokens": 32, **config}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(word).decode()} for i, word in enumerate(words)]
    (folder / file).write_text(json.dumps({"config": config, "vocab": vocab}))
    return words[: size - 32]


def in_other_file(folder, write):
    "The embedded model with its tokenizer in another file."
    folder = base(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(MISTRAL)
    write(folder)
    return folder


def by_hand(text, rank, first):
    "tiktoken's way: the neighbours whose union ranks first are joined, until none is left."
    ids = []
    for word in regex.findall(TEKKEN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in rank:
            parts = [word.encode()]
        while unions := [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]:
            at = min(unions)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [first + rank[part] for part in parts]
    return ids


@pytest.mark.parametrize("file", ["tekken.json", "tekken_240911.json"])
def test_the_ids_of_a_tekken_file(file, tmp_path, capfd):
    words = tekken(tmp_path, file=file)
    tokenizer = load_tokenizer(tmp_path)
    rank = {word: i for i, word in enumerate(words)}
    for text in [*TEXTS, *gguf_models.strings(count=200)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == by_hand(text, rank, 32), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("a[INST]b")["input_ids"] == [1, 32 + 97, 3, 32 + 98]
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (768, 2, 11)
    assert capfd.readouterr().err == ""


def test_control_tokens_that_a_tekken_file_lists(tmp_path):
    tekken(tmp_path)
    found = json.loads((tmp_path / "tekken.json").read_text())
    names = ["<unk>", "<s>", "</s>", "[INST]", "[THINK]"]
    found["special_tokens"] = [
        {"rank": i, "token_str": name, "is_control": True} for i, name in reversed(list(enumerate(names)))
    ]
    (tmp_path / "tekken.json").write_text(json.dumps(found))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(range(6)) == [*names, "<SPECIAL_5>"] and tokenizer.pad_token is None
    assert tokenizer("[THINK]a", add_special_tokens=False)["input_ids"] == [4, 32 + 97]


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory):
    "A SentencePiece BPE, trained here."
    gguf_models.needed("sentencepiece")
    return gguf_models.sentencepiece(tmp_path_factory.mktemp("spm")).sp_file


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.model.v3"])
def test_the_ids_of_a_sentencepiece_file(file, spm_file, tmp_path, capfd):
    import sentencepiece

    shutil.copy(spm_file, tmp_path / file)
    processor, tokenizer = sentencepiece.SentencePieceProcessor(str(spm_file)), load_tokenizer(tmp_path)
    for text in filter(None, [*TEXTS, *gguf_models.strings(count=200)]):
        turn = tokenizer(f"</s> {text}", add_special_tokens=False)["input_ids"]
        assert turn == [tokenizer.eos_token_id, *processor.encode(text)], text
        if not text.startswith((" ", "▁")):
            ids = tokenizer(text)["input_ids"]
            assert ids == [tokenizer.bos_token_id, *processor.encode(text)], text
            assert tokenizer.decode(ids[1:]) == processor.decode(ids[1:])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert capfd.readouterr().err == ""


def test_the_settings_beside_a_tokenizer_file_hold(spm_file, tmp_path):
    shutil.copy(spm_file, tmp_path)
    size = len(load_tokenizer(tmp_path))
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {str(size): {**token, "single_word": False}},
        "model_max_length": 77,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token, len(tokenizer)) == (size, "<s>", size + 1)
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("{{ messages }}", 77)
    tokenizer.save_pretrained(tmp_path / "again")  # as an adapter's folder gets it: tokenizer.json
    again = load_tokenizer(tmp_path / "again")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def unigram(folder):
    import sentencepiece as spm

    (folder / "text.txt").write_text("the boxes of Olga\n" * 50)
    kind = {"model_type": "unigram", "vocab_size": 20, "hard_vocab_limit": False}
    prefix = str(folder / "tokenizer")
    spm.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=prefix, minloglevel=2, **kind)


REFUSED = {
    "unigram": (unigram, "tokenizer.model can't be converted: it isn't a BPE model; put the tokenizer.json"),
    "tiktoken": (
        lambda folder: (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"),
        "tokenizer.model is a tiktoken file, which doesn't say how text is split: put the tokenizer.json",
    ),
    "cut": (
        lambda folder: (folder / "tekken.json").write_text('{"config": {"pattern"'),
        "tekken.json can't be read as a tokenizer .*: the file is damaged",
    ),
    "a page": (lambda folder: (folder / "tekken.json").write_text("<html>"), "tekken.json is not a JSON object"),
    "two": (
        lambda folder: (tekken(folder, file="tekken_1.json"), tekken(folder, file="tekken_2.json")),
        "holds tekken_1.json and tekken_2.json: leave only the tokenizer file that belongs to the model",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_file_that_cant_be_read_is_named(kind, tmp_path):
    write, said = REFUSED[kind]
    if kind == "unigram":
        gguf_models.needed("sentencepiece")
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_every_door_takes_a_tekken_file(tmp_path, command):
    words = tekken(tmp_path)
    rank = {word: i for i, word in enumerate(words)}
    folder = in_other_file(tmp_path / "base", tekken)
    ids = by_hand("Olga buys 3 boxes.", rank, 32)
    model, tokenizer = load_model(folder, load_in_4bit=False)
    assert tokenizer("Olga buys 3 boxes.", add_special_tokens=False)["input_ids"] == ids
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": ROW[:1] + [{**ROW[1], "content": f"{i}"}]}) + "\n" for i in range(20))
    )
    said = command("check", "--model", folder, "--data", data, "--json")
    assert json.loads(said.out)["summary"]["usable"] == 20, said.err
    assert command("plan", "--model", folder, "--data", data).code == 0
    from gguf import GGUFReader

    fields = GGUFReader(export_gguf(folder, None, tmp_path / "f16.gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == "tekken"
    assert fields["tokenizer.ggml.tokens"].contents()[:4] == ["<unk>", "<s>", "</s>", "[INST]"]
    adapter_folder = adapter(tmp_path / "adapter", base_name=str(folder))
    assert (
        load_model(adapter=adapter_folder, load_in_4bit=False)[1](" the")["input_ids"] == tokenizer(" the")["input_ids"]
    )
    modelfile = modelfile_for(folder, tmp_path / "f16.gguf", tmp_path / "Modelfile", without_template=True)
    assert 'PARAMETER stop """</s>"""' in modelfile.read_text()


SMALL = {  # a kind of tokenizer, the class that its folder names, the text in which that class departs from the file
    "digits one by one": ("smollm", "GPT2Tokenizer", "x  49"),
    "NFC": ("qwen2", "GPT2Tokenizer", "cafe\u0301"),
    "no NFC": ("llama3", "Qwen2Tokenizer", "cafe\u0301"),
    "blanks": ("llama3", "LlamaTokenizerFast", "Olga buys"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_what_a_class_forgets_is_kept(kind, tmp_path, capfd):
    made, name, text = SMALL[kind]
    tokenizer = gguf_models.byte_level(made)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] != wanted
    capfd.readouterr()
    assert load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == wanted
    assert "so the file's own tokenizer is used" in capfd.readouterr().err


def test_no_tokenizer_is_loaded_elsewhere():
    "All go through `load_tokenizer`; Unsloth's is compared by `own_tokenizer`."
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(
                r"(Tokenizer\w*|Processor|FastLanguageModel)\.from_\w+$", ast.unparse(node.func)
            ):
                found.append((path.stem, ast.unparse(node.func)))
    assert sorted(found) == [
        ("loading", "AutoTokenizer.from_pretrained"),
        ("loading", "PreTrainedTokenizerFast.from_pretrained"),  # around a file that has no class
        ("loading", "PreTrainedTokenizerFast.from_pretrained"),  # of a GGUF
        ("loading", "Tokenizer.from_file"),
        ("model", "FastLanguageModel.from_pretrained"),
    ]
    source = (PACKAGE / "model.py").read_text(encoding="utf-8")
    assert (
        source.count("FastLanguageModel.from_pretrained") == source.count("return model, own_tokenizer(tokenizer") == 1
    )


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter(folder, settings=None, change=None, base_name="qlora_nb:embedded", **more):
    "An adapter as peft alone writes it, with numbers in B."
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    config = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **(settings or {})}
    )
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    written = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base_name, **more}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    (folder / "README.md").unlink(missing_ok=True)
    if change:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "file, text, wanted, why",
    [
        (None, None, False, "neither its run nor its files"),
        ("../config.yaml", "format: 3\nload_in_4bit: true\nr: 4\n", True, "config.yaml of its run"),
        ("../config.yaml", "format: 3\nload_in_4bit: false\n", False, "config.yaml of its run"),
        ("../config.yaml", "format: 3\nlearning_rate: 1e-4\n", False, "neither"),
        ("README.md", "The following `bitsandbytes` config was used:\n- load_in_4bit: True\n", True, "README.md"),
        (
            "README.md",
            "- load_in_4bit: False\n- bnb_4bit_quant_type: nf4\n",
            False,
            "README.md says load_in_4bit: false",
        ),
        ("README.md", "- load_in_4bit: False\n", False, "neither"),
        ("README.md", "A fine adapter.\n", False, "neither"),
    ],
)
def test_the_precision_that_an_adapter_was_trained_in(file, text, wanted, why, tmp_path):
    folder = adapter(tmp_path / "run/adapter")
    if file:
        (folder / file).write_text(text)
    found, said = trained_in_4bit(folder)
    assert found is wanted and why in said


def test_a_4_bit_base_by_its_name_or_configuration(tmp_path):
    assert trained_in_4bit(adapter(tmp_path / "a", base_name="unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit"))[0]
    folder = base(
        tmp_path / "base", config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    )
    assert trained_in_4bit(adapter(tmp_path / "b", base_name=str(folder)))[0]
    assert not trained_in_4bit(adapter(tmp_path / "c", base_name="/somewhere/else/llama"))[0]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_our_own_adapters_say_what_they_were_trained_on(load_in_4bit, tmp_path, capfd):
    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=load_in_4bit)
    save_adapter(add_lora(model, r=2), tokenizer, tmp_path / "a")
    assert trained_in_4bit(tmp_path / "a")[0] is load_in_4bit
    capfd.readouterr()
    load_model(adapter=tmp_path / "a", load_in_4bit=load_in_4bit)
    assert capfd.readouterr().err == ""


def dequantized(file):
    from gguf import GGUFReader

    return {t.name: torch.tensor(t.data) for t in GGUFReader(file).tensors}


def test_an_adapter_of_a_16_bit_base_is_merged_into_it(tmp_path, capfd):
    folder = adapter(tmp_path / "a")
    file = export_gguf(folder, None, tmp_path / "x.gguf", "f32")
    assert "is loaded in 16 bits or more: neither its run nor its files" in capfd.readouterr().err
    model, _ = load_model("qlora_nb:embedded", load_in_4bit=False)
    wanted = merge_adapter(load_adapter(model, folder)).model.layers[0].mlp.up_proj.weight
    assert torch.equal(dequantized(file)["blk.0.ffn_up.weight"], wanted)
    asked = export_gguf(folder, None, tmp_path / "y.gguf", "f32", load_in_4bit=True)
    assert "in 4 bits: as requested, although neither" in capfd.readouterr().err
    assert not torch.equal(dequantized(asked)["blk.0.ffn_up.weight"], wanted)
    assert not model_info(load_model(adapter=folder)[0])["load_in_4bit"]
    assert "is loaded in 16 bits or more: neither" in capfd.readouterr().err


def test_another_base_by_name(tmp_path):
    other = base(tmp_path / "other", spoiled(MLP, 3.0))
    folder = adapter(tmp_path / "a", base_name="/not/on/this/machine")
    with pytest.raises(UserError, match="there is no folder /not/on/this/machine"):
        export_gguf(folder, None, tmp_path / "x.gguf")
    file = export_gguf(folder, None, tmp_path / "x.gguf", "f32", base=other)
    assert 3.0 in dequantized(file)["blk.1.ffn_up.weight"]
    with pytest.raises(UserError, match="holds no adapter"):
        export_gguf(other, None, tmp_path / "z.gguf", base=EMBEDDED_MODEL)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_layer(layer, tmp_path):
    "Not trained here; one from elsewhere is merged, and embedding and head are two matrices then."
    model, _ = load_model("qlora_nb:embedded", load_in_4bit=False)
    with pytest.raises(UserError, match=f"{layer} can't have an adapter: embedding and lm_head are one matrix"):
        add_lora(model, target_modules=["q_proj", layer])

    def stir(tensors):  # A of an embedding is zero at first
        tensors.update(
            {name: torch.randn_like(tensor) / 16 for name, tensor in tensors.items() if "embedding_A" in name}
        )

    folder = adapter(tmp_path / "a", {"target_modules": ["q_proj", layer]}, stir)
    tensors = dequantized(export_gguf(folder, None, tmp_path / "x.gguf", "f32"))
    base, changed = (
        model.get_input_embeddings().weight,
        {"lm_head": "output.weight", "embed_tokens": "token_embd.weight"},
    )
    assert {name: torch.equal(tensors[name], base) for name in changed.values()} == {
        name: key != layer for key, name in changed.items()
    }


def test_layers_that_take_no_adapter(tmp_path):
    def head(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    model, _ = load_model(base(tmp_path / "untied", head, {"tie_word_embeddings": False}), load_in_4bit=False)
    for layer, said in [
        ("lm_head", "would never be trained"),
        ("input_layernorm", r"\(LlamaRMSNorm\) is not a linear layer"),
    ]:
        with pytest.raises(UserError, match=f"{layer}.*{said}"):
            add_lora(model, target_modules=["q_proj", layer])
    add_lora(model)  # a refusal has changed nothing


@pytest.mark.parametrize(
    "change, said",
    [
        (
            spoiled("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", NAN),
            "q_proj.lora_A.weight in .* holds NaN",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.zeros(4)}),
            "lora_C.weight: this model has no place for it",
        ),
        (
            lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
            "lacks .*q_proj.lora_A.weight, which",
        ),
        (
            lambda t: [t.pop(name) for name in [*t] if "layers.1." in name],
            "lacks .*layers.1.self_attn.q_proj.lora_A.weight and 3 more",
        ),
        (
            lambda t: t.update({f"base_model.model.score.{i}": torch.zeros(4) for i in range(3)}),
            "and 2 more tensors: this model has no place for them",
        ),
    ],
)
def test_every_tensor_of_an_adapter_is_taken(change, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load_model(adapter=adapter(tmp_path / "a", change=change))


OTHER = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)


@pytest.mark.parametrize("files", ["tokenizer", "chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_is_asked_in_its_own_template(files, tmp_path, capfd):
    folder = adapter(tmp_path / "a", base_name="qlora_nb:embedded")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.chat_template = OTHER
    if files == "tokenizer":
        tokenizer.save_pretrained(folder)
    else:
        (folder / files).write_text(OTHER if files.endswith("jinja") else json.dumps({"chat_template": OTHER}))
    loaded, tokenizer = load_model(adapter=folder, load_in_4bit=False)
    assert tokenizer.chat_template == OTHER and "it differs from the base model's" in capfd.readouterr().err
    assert tokenizer.pad_token != tokenizer.eos_token
    from gguf import GGUFReader

    written = GGUFReader(export_gguf(folder, None, tmp_path / "x.gguf")).fields["tokenizer.chat_template"].contents()
    assert written == OTHER
    assert load_model("qlora_nb:embedded")[1].chat_template != OTHER


def test_a_run_is_asked_and_served_in_its_own_template(tmp_path, command):
    model, tokenizer = load_model("qlora_nb:embedded")
    tokenizer.chat_template = OTHER
    rows = load_sft_dataset(limit=60)
    run = train(add_lora(model, r=2), tokenizer, rows, max_steps=2, eval_rows=0, output=tmp_path / "run")
    asked = render(rows[0]["messages"][:-1], tokenizer, add_generation_prompt=True)
    assert asked.endswith("<|end_header_id|>\n")
    served = open_for_chat(str(run.path), None, None, None)[1]
    assert render(rows[0]["messages"][:-1], served, add_generation_prompt=True) == asked
    run.export("f32")
    certificate = certify(run.path, gguf=run.path / "run-F32.gguf", modelfile=run.path / "Modelfile", rows=10,
                          model_rows=2, max_new_tokens=0)  # fmt: skip
    assert certificate.passed, certificate.failures
    (check,) = [check for check in certificate.checks if check.paths]
    assert len(check.paths) == 3
    with gguf_chat_text(run.path / "run-F32.gguf") as text:
        assert text(rows[0]["messages"][:-1]) == asked.removeprefix(tokenizer.bos_token)  # which the file adds
    held_out = EMBEDDED_DATA / "heldout.parquet"
    done = command("evaluate", run.path, "--data", held_out, "--limit", "2", "--max-new-tokens", "2")
    assert done.code == 0 and "it differs from the base model's" in done.err


@contextlib.contextmanager
def gguf_chat_text(file):
    "What llama.cpp's server renders of messages with a file's own template."
    with chat_server(file, 1024) as ask:
        yield lambda messages: ask("/apply-template", {"messages": messages})["prompt"]


def test_an_adapter_with_more_tokens_than_the_base(tmp_path):
    folder = adapter(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_tokens(["<|one_more|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 769 tokens, and the base's embedding 768 rows"):
        load_model(adapter=folder, load_in_4bit=False)


# --- a run as it was trained ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two steps on a 16-bit base, with a template of its own."
    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=False, max_seq_length=512)
    tokenizer.chat_template = OTHER
    output = tmp_path_factory.mktemp("runs") / "run"
    return train(add_lora(model, r=2), tokenizer, load_sft_dataset(limit=60), max_steps=2, eval_rows=0, output=output)


def greedy_logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(tokenizer("How many apples?", return_tensors="pt")["input_ids"]).logits


@pytest.mark.parametrize("given", ["run", "folder", "adapter"])
def test_a_run_is_opened_as_it_was_trained(given, trained, capfd):
    path = {"run": trained, "folder": str(trained.path), "adapter": trained.path / "adapter"}[given]
    model, tokenizer = open_run(path)
    found = {name: model_info(model)[name] for name in ("model", "load_in_4bit", "dtype", "max_seq_length", "revision")}
    assert found == {"model": "qlora_nb:embedded", "load_in_4bit": False, "dtype": "float32", "max_seq_length": 512,
                     "revision": None}  # fmt: skip
    assert tokenizer.chat_template == OTHER
    assert torch.equal(greedy_logits(model, tokenizer), greedy_logits(trained.model, trained.tokenizer))
    assert "in 16 bits or more: config.yaml of its run says load_in_4bit: false" in capfd.readouterr().err


def test_an_adapter_alone_is_opened_on_its_base(tmp_path, capfd):
    "What no config.yaml says, the adapter's files and its base do: here a context below the usual 2,048."
    folder = base(tmp_path / "base", config={"max_position_embeddings": 300})
    alone = adapter(tmp_path / "a", base_name=str(folder))
    model, tokenizer = open_run(alone)
    assert (model_info(model)["load_in_4bit"], model_info(model)["max_seq_length"]) == (False, 300)
    assert "neither its run nor its files" in capfd.readouterr().err
    assert open_run(alone, load_in_4bit=True)[0].get_base_model().is_loaded_in_4bit
    assert "as requested, although neither" in capfd.readouterr().err
    wanted = load_adapter(load_model(EMBEDDED_MODEL, load_in_4bit=False)[0], alone)
    assert torch.equal(greedy_logits(model, tokenizer), greedy_logits(wanted, tokenizer))


def test_a_run_on_another_base(trained, tmp_path):
    other = base(tmp_path / "other", spoiled(MLP, 3.0))
    model, _ = open_run(trained.path, base=other, max_seq_length=128)
    assert model_info(model)["model"] == str(other) and model_info(model)["max_seq_length"] == 128
    assert 3.0 in model.get_base_model().model.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize(
    "harm, said",
    [
        (shutil.rmtree, "there is no folder"),
        (lambda run: (run / "config.yaml").unlink() or shutil.rmtree(run / "adapter"), "is not a run folder"),
        (lambda run: (run / "summary.json").unlink() or shutil.rmtree(run / "adapter"), "is not finished: resume it"),
        (lambda run: shutil.rmtree(run / "adapter"), "there is no adapter folder"),
        (
            lambda run: (run / "config.yaml").write_text("model: x\nfingerprints: {}\n"),
            "is a run of format 1, and this .* format 3",
        ),
    ],
    ids=["no folder", "no run", "unfinished", "no adapter", "another format"],
)  # fmt: skip
def test_what_is_no_run_is_not_opened(harm, said, trained, tmp_path):
    run = Path(shutil.copytree(trained.path, tmp_path / "run"))
    harm(run)
    with pytest.raises(UserError, match=said):
        open_run(run)


def test_no_call_changes_the_callers_tokenizer(tmp_path):
    "An embedded tokenizer with another padding token and template stays so, whatever is done with it."
    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=False)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, OTHER
    tokenizer.padding_side = "right"
    before = (tokenizer.backend_tokenizer.to_str(), str(tokenizer))
    model = add_lora(model, r=2)
    save_adapter(model, tokenizer, tmp_path / "a")
    save_merged(model, tokenizer, tmp_path / "merged")
    chat(model, tokenizer, "What is 2 + 2?", max_new_tokens=2)
    evaluate(model, tokenizer, load_sft_dataset(split="heldout", limit=2), max_new_tokens=2)
    assert (tokenizer.backend_tokenizer.to_str(), str(tokenizer)) == before
    load_adapter(load_model("qlora_nb:embedded", load_in_4bit=False)[0], tmp_path / "a")
    assert (tokenizer.pad_token, tokenizer.chat_template) == (tokenizer.eos_token, OTHER)


# --- the command line -----------------------------------------------------------------------------------------------


def test_no_command_takes_a_base_that_is_not_whole(tmp_path, command):
    folder = base(tmp_path / "base", without("embed_tokens"))
    adapted = adapter(tmp_path / "a", base_name=str(folder))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?", "response": "2"}\n' * 30)
    for arguments in (
        ["train", "--model", folder, "--data", rows, "--output", "run"],
        ["chat", "--model", folder, "--message", "hi"],
        ["chat", "--adapter", adapted, "--message", "hi"],
        ["export", folder],
        ["export", adapted],
        ["evaluate", "--model", folder],
    ):
        done = command(*arguments)
        assert done.code == 2 and done.out == "", arguments
        assert re.search("^qlora_nb: .*embed_tokens", done.err.splitlines()[-1]), done.err
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.gguf"))


def test_a_base_is_named_on_the_command_line(tmp_path, command):
    folder = adapter(tmp_path / "a", base_name="/not/here")
    asked = ("--message", "What is 2 + 2?", "--temperature", "0", "--max-new-tokens", "5")
    assert "there is no folder /not/here" in command("chat", "--adapter", folder, *asked).err
    done = command("chat", "--adapter", folder, "--base", "qlora_nb:embedded", *asked)
    assert done.code == 0 and "is loaded in 16 bits or more" in done.err
    assert done.out == command("chat", "--adapter", folder, "--model", "qlora_nb:embedded", *asked).out
    done = command("export", folder, "--base", EMBEDDED_MODEL, "--quantization", "f16")
    assert done.code == 0 and Path(done.out.strip()).exists(), done.err
    done = command("chat", "--base", EMBEDDED_MODEL, *asked)
    assert done.code == 2 and "--base is for a run or an --adapter" in done.err


def test_a_second_process_has_nothing_to_do_where_nothing_is_trained(command, monkeypatch):
    "As torchrun starts it; what it remembers of that is put back."
    monkeypatch.setattr("qlora_nb.processes._launched", [])
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    done = command("info")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_the_package_is_a_command_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_nb", "--help"], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0 and "certify" in done.stdout
