"""Adapters of other tools: each merged to what peft itself computes, or refused before anything is written."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_nb.adapter import adapter_bits, adapter_provenance, load_adapter, trained_in_4bit
from qlora_nb.adapter_files import find_adapter
from qlora_nb.cli import open_for_chat
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.gguf_export import export_gguf
from qlora_nb.manifest import write_manifest
from qlora_nb.merging import merge_adapter, save_merged
from qlora_nb.model import load_model, model_info, open_run

IDS = torch.tensor([[1, 3, 40, 200, 401, 77, 510, 5, 12]])
SHAPE = {
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "biases": ("Qwen2", {"tie_word_embeddings": True}),
    "all biases": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def new_model(kind, rows=768):
    family, settings = BASES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | settings | {"vocab_size": rows})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "A folder for each base, with the embedded tokenizer."
    found = {}
    for kind in BASES:
        found[kind] = tmp_path_factory.mktemp("bases") / kind.replace(" ", "-")
        new_model(kind).save_pretrained(found[kind])
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED_MODEL / file, found[kind])
    return found


def stir(model):
    "Give everything that an adapter trains numbers that show."
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "magnitude" in name:
            p.data.mul_(torch.empty_like(p).uniform_(0.8, 1.3))
        elif name.endswith("norm.weight") or ".norm." in name:
            p.data.add_(torch.randn_like(p) * 0.1)
        else:
            p.data.add_(torch.randn_like(p) * 0.05)
    return model


def make(bases, folder, base="tied", rows=None, **settings):
    "Train an adapter, so to say, with peft alone. Return (its folder, peft's own logits)."
    model = transformers.AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float32)
    if rows:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    model = stir(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)))
    model.save_pretrained(folder)
    return folder, logits(model)


def change_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_config(**values):
    return lambda folder: change_config(folder, **values)


def rename(folder, how):
    file = folder / "adapter_model.safetensors"
    save_file({how(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def whole(key):
    "As in the state dict of the whole model: with the adapter's name."
    for part in ("lora_A", "lora_B"):
        key = key.replace(f"{part}.weight", f"{part}.default.weight").replace(f"{part}.bias", f"{part}.default.bias")
    return key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FSDP = "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
MERGED = {  # name: (base, peft's settings, what is done to the folder)
    "plain": ("tied", {}, None),
    "untied": ("untied", {"target_modules": EVERY}, None),
    "dora": ("tied", {"use_dora": True, "target_modules": EVERY}, None),
    "rslora": ("tied", {"use_rslora": True}, None),
    "patterns": (
        "tied",
        {
            "target_modules": EVERY,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6},
            "alpha_pattern": {"up_proj": 40},
        },
        None,
    ),
    "regex": ("tied", {"target_modules": r".*layers\.1\..*\.(q|k)_proj"}, None),
    "all-linear": ("tied", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, None),
    "all-linear, untied": ("untied", {"target_modules": "all-linear"}, None),
    "one layer": ("tied", {"layers_to_transform": [1], "layers_pattern": "layers"}, None),
    "bias all": ("all biases", {"bias": "all", "target_modules": EVERY}, None),
    "bias lora_only": ("biases", {"bias": "lora_only"}, None),
    "bias all without biases": ("tied", {"bias": "all"}, None),
    "lora_bias": ("biases", {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}, None),
    "lm_head tied": ("tied", {"target_modules": ["q_proj", "lm_head"]}, None),
    "lm_head untied": ("untied", {"target_modules": ["q_proj", "lm_head"]}, None),
    "embedding tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, None),
    "embedding untied": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}, None),
    "embedding dora": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, None),
    "both tied": ("tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, None),
    "both tied, apart": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, None),
    "whole embedding tied": ("tied", {"modules_to_save": ["embed_tokens"]}, None),
    "whole head tied": ("tied", {"modules_to_save": ["lm_head"]}, None),
    "whole head and embedding": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "whole, kept tied": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, None),
    "whole norms": ("untied", {"modules_to_save": ["input_layernorm", "norm"]}, None),
    "whole mlp": ("untied", {"modules_to_save": ["mlp"], "target_modules": "all-linear"}, None),
    "single tokens tied": ("tied", {"trainable_token_indices": [3, 40, 510]}, None),
    "single tokens untied": (
        "untied",
        {"trainable_token_indices": {"embed_tokens": [3, 40], "lm_head": [5, 7, 9]}},
        None,
    ),
    "resized, tied": ("tied", {"rows": 784, "modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "resized, untied": ("untied", {"rows": 770, "modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "resized, saved by peft": ("untied", {"rows": 770}, None),
    "resized, one tied": ("tied", {"rows": 772}, None),
    "resized, single tokens": ("tied", {"rows": 770, "trainable_token_indices": [768, 769, 5]}, None),
    "resized, lora": ("tied", {"rows": 770, "target_modules": ["q_proj", "embed_tokens"]}, None),
    "smaller": ("untied", {"rows": 600, "modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "keys with the adapter's name": ("tied", {"use_dora": True}, lambda a: rename(a, whole)),
    "keys of a compiled model": ("tied", {}, lambda a: rename(a, lambda k: f"_orig_mod.{k}")),
    "keys of FSDP": (
        "tied",
        {},
        lambda a: rename(a, lambda k: k.replace("layers.1.", FSDP)),
    ),
    "keys without a prefix": ("tied", {}, lambda a: rename(a, lambda k: k.removeprefix("base_model.model."))),
    "old keys of biases": (
        "all biases",
        {"bias": "all"},
        lambda a: rename(a, lambda k: k.replace(".base_layer.bias", ".bias")),
    ),
    "old keys of a whole head": (
        "untied",
        {"modules_to_save": ["lm_head"]},
        lambda a: rename(a, lambda k: k.replace("lm_head.", "lm_head.modules_to_save.default.")),
    ),
    "notes of other tools": (
        "tied",
        {},
        with_config(unsloth_version="2026.10.9", auto_mapping={"unsloth_fixed": True}, use_tunnel=False),
    ),
    "gaussian": ("tied", {"init_lora_weights": "gaussian"}, None),
    "eva": ("tied", {}, with_config(init_lora_weights="eva", eva_config={"rho": 2.0})),
    "another path": ("tied", {}, with_config(base_model_name_or_path="/home/someone/models/llama")),
}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_as_peft_computes_it(kind, bases, tmp_path):
    base, settings, change = MERGED[kind]
    folder, wanted = make(bases, tmp_path / "a", base, **settings)
    if change:
        change(folder)
    model, _ = load_model(bases[base], adapter=folder, load_in_4bit=False, dtype="float32", max_seq_length=64)
    scale = float(wanted.abs().max())
    assert (
        (wanted - logits(new_model(base))[..., : wanted.shape[-1]]).abs().max() > 1e-3 * scale
        if wanted.shape[-1] <= 768
        else True
    )
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5 * scale)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5 * scale)
    save_merged(model, transformers.AutoTokenizer.from_pretrained(bases[base]), tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-5 * scale)
    separate = kind in (
        "lm_head tied",
        "embedding tied",
        "both tied, apart",
        "whole embedding tied",
        "whole head tied",
        "whole head and embedding",
        "resized, tied",
        "resized, lora",
    )
    assert again.config.tie_word_embeddings == (BASES[base][1]["tie_word_embeddings"] and not separate)


def test_an_adapter_of_pissa_once_it_was_converted(bases, tmp_path):
    "PiSSA takes what the adapter begins with from the base; converted, it is a LoRA of twice the rank on the base."
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["untied"], dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa"
    )
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    wanted = logits(stir(model))
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded, _ = load_model(
        bases["untied"], adapter=tmp_path / "a", load_in_4bit=False, dtype="float32", max_seq_length=64
    )
    torch.testing.assert_close(logits(merge_adapter(loaded)), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    with pytest.raises(UserError, match="convert it where it was trained"):
        load_adapter(new_model("untied"), tmp_path / "raw")


def pickle_only(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {  # name: (base, peft's settings, what is done to the folder, what is said)
    "a pickle": ({}, pickle_only, "a pickle can run code when it is read.*save_pretrained"),
    "pissa": (
        {},
        with_config(init_lora_weights="pissa_niter_4"),
        "changed the base before the training.*path_initial_model_for_weight_conversion",
    ),
    "olora": ({}, with_config(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "corda": ({}, with_config(init_lora_weights="corda"), "init_lora_weights='corda'"),
    "loftq": ({}, with_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights='loftq'"),
    "bare parameters": (
        {},
        with_config(target_parameters=["experts.up"]),
        "an adapter on bare parameters.*merge_and_unload",
    ),
    "layers repeated": ({}, with_config(layer_replication=[[0, 2], [1, 2]]), "a base with repeated layers"),
    "activated": ({}, with_config(alora_invocation_tokens=[1, 2]), "starts at certain tokens"),
    "qalora": ({}, with_config(use_qalora=True), "QALoRA"),
    "megatron": ({}, with_config(megatron_config={"x": 1}), "Megatron's parallel layers"),
    "kasa": ({}, with_config(kasa_config={"beta": 1}), "KaSA, which changes the base"),
    "ia3": ({}, with_config(peft_type="IA3"), "is of type IA3: only LORA.*merge_and_unload"),
    "a classifier": ({}, with_config(task_type="SEQ_CLS"), "was trained for SEQ_CLS"),
    "an unknown setting": (
        {},
        with_config(use_tunnel=True, peft_version="9.9"),
        r"sets use_tunnel to 'True', which this version of peft doesn't know.*\(peft_version 9.9\)",
    ),
    "a bias without place": ({"lora_bias": True}, None, "self_attn.q_proj has no bias that could hold"),
    "gathered too late": (
        {},
        lambda a: change_tensors(a, lambda t: t.update({Q: torch.zeros(0)})),
        r"has the shape \(0,\) \(DeepSpeed's ZeRO-3 leaves empty ones\)",
    ),
    "another rank": (
        {},
        lambda a: change_tensors(a, lambda t: t.update({Q: torch.zeros(3, 64)})),
        r"q_proj.lora_A.weight has the shape \(3, 64\) in its file, and \(4, 64\)",
    ),
    "no such layers": (
        {},
        with_config(target_modules=["c_attn"]),
        "doesn't fit this model: Target modules .*c_attn.* not found in the base model",
    ),
    "twice": ({}, lambda a: change_tensors(a, lambda t: t.update({whole(Q): t[Q] + 1})), "holds one tensor twice"),
    "new rows left out": (
        {"rows": 770, "target_modules": ["q_proj", "embed_tokens"]},
        lambda a: change_tensors(
            a, lambda t: [t.pop(k) for k in [*t] if "embed_tokens.base_layer" in k or "lm_head" in k]
        ),
        "trained with 770 tokens and its base has 768 here.*--base",
    ),
    "new tokens left out": (
        {"rows": 775, "trainable_token_indices": [774]},
        lambda a: change_tensors(a, lambda t: [t.pop(k) for k in [*t] if "base_layer" in k]),
        "trained with 775 tokens and its base has 768 here",
    ),
    "two vocabularies": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda a: change_tensors(a, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(9, 64)})),
        "9 and 768 rows",
    ),
    "a base in GPTQ": (
        {},
        with_config(base_model_name_or_path="someone/Llama-3-8B-GPTQ"),
        "stored in gptq.*name its 16-bit original",
    ),
    "settings in a list": (
        {},
        lambda a: (a / "adapter_config.json").write_text("[1]"),
        "adapter_config.json holds a list, not the settings of an adapter: copy",
    ),
    "no kind": (
        {},
        with_config(peft_type=None),
        'adapter_config.json names no peft_type: add "peft_type": "LORA"',
    ),
    "a base of another machine": (
        {},
        with_config(base_model_name_or_path="/home/x/llama"),
        "there is no folder /home/x/llama on this machine.*--base.*model=",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_anything_is_written(kind, bases, tmp_path):
    settings, change, said = REFUSED[kind]
    folder, _ = make(bases, tmp_path / "a", **settings)
    if change:
        change(folder)
    base = None if kind.startswith("a base") else bases["tied"]
    with pytest.raises(UserError, match=said) as caught:
        export_gguf(folder, None, tmp_path / "out", base=base)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_base_stays_as_it_was_where_its_adapter_is_refused(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "a")
    rename(folder, lambda key: key.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"))
    model = new_model("tied")
    before = logits(model)
    with pytest.raises(UserError, match="lacks model.layers.1.self_attn.q_proj.lora_A.weight and 1 more"):
        load_adapter(model, folder)
    assert torch.equal(logits(model), before) and not any(hasattr(layer, "lora_A") for layer in model.modules())


def test_a_trained_bias_is_not_put_on_a_base_without_one(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "a", "all biases", bias="all")
    with pytest.raises(
        UserError,
        match=r"holds model.layers.0.mlp.down_proj.bias and \d+ more tensors: this model has no place for them",
    ):
        load_adapter(new_model("untied"), folder)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["c_attn", "c_proj", "lm_head", "wte"]}],
    ids=["plain", "dora", "ends"],
)
def test_matrices_the_other_way_round(settings):
    "GPT-2: Conv1D, (in, out), tied, and biases everywhere."
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=768, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    settings = {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True, "bias": "all", **settings}
    model = stir(
        peft.get_peft_model(
            transformers.GPT2LMHeadModel(config).eval(), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        )
    )
    wanted, merged = logits(model), merge_adapter(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_every_kind_at_once_on_a_4_bit_base():
    "The embedded model in NF4, with DoRA on matrices and head: merged into the dequantized base, and untied."
    model, _ = load_model("qlora_nb:embedded", backend="transformers")
    settings = {
        "target_modules": ["q_proj", "up_proj", "down_proj", "lm_head"],
        "use_dora": True,
        "rank_pattern": {"lm_head": 2},
    }
    model = stir(
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["norm"], **settings))
    )
    wanted, merged = logits(model), merge_adapter(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert not merged.config.tie_word_embeddings and {layer.name for layer in merged.qlora_nb.merge_report} >= {
        "lm_head",
        "model.layers.3.mlp.up_proj",
    }


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lm_head tied", "embedding tied", "resized, tied", "single tokens tied"])
def test_llama_cpp_computes_what_peft_does(kind, bases, tmp_path):
    "An untied head is in the file, as output.weight; the base and its precision are in its header."
    gguf = pytest.importorskip("gguf")
    from qlora_nb.llama import LlamaFile

    base, settings, _ = MERGED[kind]
    folder, wanted = make(bases, tmp_path / "a", base, **settings)
    file = export_gguf(folder, None, tmp_path / "x.gguf", "f32", base=bases[base])
    reader = gguf.GGUFReader(file)
    assert ("output.weight" in {tensor.name for tensor in reader.tensors}) == (kind != "single tokens tied")
    said = {
        key.removeprefix("qlora_nb.merge."): reader.fields[key].contents()
        for key in reader.fields
        if key.startswith("qlora_nb.merge.")
    }
    assert said == {
        "base": bases[base].name,
        "load_in_4bit": False,
        "evidence": "neither its run nor its files say that the base was in 4 bits",
    }
    pytest.importorskip("llama_cpp")
    with LlamaFile(file, 64) as served:
        found = torch.as_tensor(served.logits(IDS[0].tolist())).float()
    torch.testing.assert_close(found[:, : wanted.shape[-1]], wanted[0], rtol=0, atol=2e-3 * float(wanted.abs().max()))


# --- precision and place --------------------------------------------------------------------------------------------

NAMES = [
    "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit",
    "unsloth/mistral-7b-v0.3-bnb-4bit",
    "me/tiny",
    "me/tiny-GPTQ",
    "me/qwen-AWQ",
]
SAID = {  # name: (file, text, 4 bits or not, a part of the evidence)
    "axolotl": (
        "README.md",
        "---\nbase_model: me/tiny\n---\n```yaml\nadapter: qlora\nload_in_8bit: false\nload_in_4bit: true\n```\n",
        True,
        "load_in_4bit: true",
    ),
    "axolotl lora": (
        "README.md",
        "```yaml\nadapter: lora\nload_in_8bit: false\nload_in_4bit: false\n```\n",
        False,
        "load_in_4bit: false",
    ),
    "llama-factory": (
        "training_args.yaml",
        "finetuning_type: lora\nquantization_bit: 4\nquantization_method: bnb\n",
        True,
        "training_args.yaml says quantization_bit: 4",
    ),
    "llama-factory, 16": (
        "llamaboard_config.yaml",
        "top.finetuning_type: lora\ntop.quantization_bit: none\n",
        False,
        "neither",
    ),
    "peft": (
        "README.md",
        "The following `bitsandbytes` config was used:\n- load_in_8bit: False\n- load_in_4bit: True\n",
        True,
        "README.md",
    ),
    "eight": (
        "README.md",
        "- load_in_8bit: True\n- load_in_4bit: False\n- bnb_4bit_quant_type: nf4\n",
        False,
        "load_in_8bit: true",
    ),
    "a mention": ("README.md", "You can set load_in_4bit: True to save memory; we did not.\n", False, "neither"),
    "code that uses it": (
        "README.md",
        "- load_in_4bit: False\n\n```python\nload_model(\n    load_in_4bit=True,\n)\n```\n",
        False,
        "load_in_4bit: false",
    ),
    "ms-swift": ("args.json", '{\n  "quant_bits": 4,\n  "quant_method": "bnb"\n}', True, "args.json"),
}


@pytest.mark.parametrize("kind", SAID)
def test_the_precision_by_what_the_tools_leave(kind, tmp_path):
    file, text, wanted, why = SAID[kind]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "me/tiny"}')
    (tmp_path / file).write_text(text)
    found, said = trained_in_4bit(tmp_path)
    assert found is wanted and why in said
    assert adapter_provenance(tmp_path) == {
        "base": "me/tiny",
        "load_in_4bit": wanted,
        "evidence": said,
        "method": "bitsandbytes" if wanted or kind == "eight" else "",
    }


def test_the_adapters_own_base_counts_where_another_is_named(tmp_path, capsys):
    "A 4-bit base that isn't at hand is replaced by its 16-bit original, loaded in 4 bits."
    for name in NAMES:
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": name})
        )
        assert adapter_bits(tmp_path, "me/the-original") == ("bnb-4bit" in name)
        said = capsys.readouterr().err
        assert ("from which this one differs a little" in said) == name.endswith(("GPTQ", "AWQ"))


@pytest.mark.parametrize(
    "bits, said", [(True, True), (False, False), (True, None), (False, None), (None, True), (None, None)]
)
def test_every_door_loads_what_was_trained(bits, said, bases, tmp_path, capfd):
    "As asked (`bits`), else as the adapter says, else in 16 bits; stderr says where that was chosen or contradicted."
    folder, _ = make(bases, tmp_path / "a")
    (folder / "README.md").write_text("# a\n" if said is None else f"- load_in_4bit: {said}\n")
    asked = {} if bits is None else {"load_in_4bit": bits}
    wanted = bits if bits is not None else bool(said)
    doors = {
        "load_model": lambda: load_model(bases["tied"], adapter=folder, max_seq_length=64, **asked),
        "open_run": lambda: open_run(folder, base=bases["tied"], **asked),
    }
    for name, door in doors.items():
        model, _ = door()
        in_4bit = bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False))
        assert model_info(model)["load_in_4bit"] is in_4bit is wanted
        err = capfd.readouterr().err
        expected = True if bits is None else bits
        assert ("precision: the base of" in err) == (name == "open_run" or bool(said) is not expected)
        assert ("as requested, although" in err) == (bits is not None and bits != bool(said))


@pytest.mark.parametrize(
    "inside", ["checkpoint-20", "default", "adapter", "adapter/default", "checkpoints/checkpoint-20", "outputs"]
)
def test_a_nested_adapter_is_found_from_every_door(inside, bases, tmp_path, capfd):
    folder, wanted = make(bases, tmp_path / "out" / inside)
    if inside.endswith("checkpoint-20"):
        shutil.copytree(folder, folder.parent / "checkpoint-5")
        (folder.parent / "checkpoint-5" / "adapter_config.json").write_text("{}")
    out = tmp_path / "out"
    for model in (
        load_model(bases["tied"], adapter=out, max_seq_length=64)[0],
        load_adapter(new_model("tied"), out),
        open_run(out, base=bases["tied"])[0],
    ):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    err = capfd.readouterr().err
    assert inside == "adapter" or f"{inside} is used" in err
    assert ("of the 2 checkpoints" in err) == inside.endswith("checkpoint-20")
    assert export_gguf(out, None, tmp_path / "x.gguf", base=bases["tied"]).exists()
    if inside == "outputs":  # the command line's door
        model, _, config = open_for_chat(str(out), None, None, None, base=str(bases["tied"]))
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
        assert config == {}
        with pytest.raises(UserError, match="is a model's folder, not a run's: name it with --model"):
            open_for_chat(str(bases["tied"]), None, None, None)


def test_checkpoints_of_a_run_know_their_run(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "run/checkpoints/checkpoint-20")
    (tmp_path / "run/config.yaml").write_text("format: 3\nload_in_4bit: true\n")
    assert trained_in_4bit(tmp_path / "run/checkpoints") == (True, "config.yaml of its run says load_in_4bit: true")
    assert find_adapter(tmp_path / "run") is None
    write_manifest(folder)
    with pytest.raises(UserError, match="is not finished: resume it .*or name its newest checkpoint, .*checkpoint-20"):
        open_run(tmp_path / "run")


def test_the_bases_revision_is_the_adapters(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "a")
    change_config(folder, revision="abc123")
    assert model_info(load_model(adapter=folder, max_seq_length=64)[0])["revision"] == "abc123"
    assert model_info(open_run(folder)[0])["revision"] == "abc123"
    assert model_info(open_run(folder, base=bases["tied"])[0])["revision"] is None


def test_several_adapters_in_one_folder_are_not_chosen_between(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "out/one")
    shutil.copytree(folder, tmp_path / "out/two")
    with pytest.raises(UserError, match=r"holds 2 adapters \(one, two\): name the folder of one"):
        load_adapter(new_model("tied"), Path(tmp_path / "out"))


def test_a_merged_folder_says_what_was_merged_into_what(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "a")
    (folder / "README.md").write_text("- load_in_4bit: True\n")
    model, tokenizer = load_model(bases["tied"], adapter=folder, max_seq_length=64)
    save_merged(model, tokenizer, tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert "base_model: tied\n" in card and "merged_load_in_4bit: true" in card
    assert "merged into the base's dequantized 4-bit weights: its README.md says load_in_4bit: true" in card


def test_an_adapter_on_the_head_is_not_trained_further(bases, tmp_path):
    folder, _ = make(bases, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="is on the head, too, which can't be trained further here"):
        load_adapter(copy.deepcopy(new_model("tied")), folder, trainable=True)
