"""Saving and loading adapters: the same bytes, whole or not at all, and never onto another model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from qlora_nb.adapter import load_adapter, save_adapter
from qlora_nb.core import EMBEDDED_MODEL, UserError, file_sha256
from qlora_nb.merging import base_weight, merge_adapter, save_merged
from qlora_nb.weights import TensorFolder, read_header

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


def load(name="qlora_nb:embedded", **settings):
    from qlora_nb.model import load_model

    return load_model(name, backend="transformers", **settings)


def with_adapter(model, **settings):
    from qlora_nb.model import add_lora

    model = add_lora(model, **settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = load()
    return with_adapter(model), tokenizer


@pytest.fixture(scope="module")
def saved(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(*adapted, folder)
    return folder


@pytest.fixture(scope="module")
def plain():
    "A base in 16 bits that no test changes."
    return load(load_in_4bit=False, dtype="float32")


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def shas(folder):
    return {file.name: file_sha256(file) for file in Path(folder).iterdir()}


# --- saving ---------------------------------------------------------------------------------------------------------


def test_what_is_in_the_folder(adapted, saved):
    assert {file.name for file in saved.iterdir()} == FILES
    header = read_header(saved / "adapter_model.safetensors")
    size = (saved / "adapter_model.safetensors").stat().st_size
    assert 0 < size - sum(p.numel() * 4 for p in adapted[0].parameters() if p.requires_grad) < 20_000
    assert len(header) == 4 * 7 * 2 and {entry["dtype"] for entry in header.values()} == {"F32"}


def test_the_embedded_base_has_a_name_and_no_path(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "qlora_nb:embedded"
    places = [str(EMBEDDED_MODEL), str(EMBEDDED_MODEL.parents[1]), str(Path.home()) + "/"]
    for file in saved.iterdir():
        assert not any(place.encode() in file.read_bytes() for place in places), file.name


def test_a_base_of_ones_own_keeps_the_name_that_was_given(tmp_path, monkeypatch):
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("models/mine", load_in_4bit=False)
    save_adapter(with_adapter(model, r=2), tokenizer, "out")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/mine"
    assert str(tmp_path) not in Path("out/README.md").read_text()


def test_twice_the_same_bytes(adapted, saved, tmp_path):
    sha = save_adapter(*adapted, tmp_path / "b")
    assert sha == file_sha256(saved / "adapter_model.safetensors")
    assert shas(tmp_path / "b") == shas(saved)


SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_merging import load, save_adapter, with_adapter
model, tokenizer = load(load_in_4bit=False)
save_adapter(with_adapter(model, r=4), tokenizer, sys.argv[2])
"""


def test_the_same_bytes_from_another_process(tmp_path):
    "Sets have another order in each process."
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", SAVE, str(Path(__file__).parent), str(tmp_path / "there")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(load_in_4bit=False)
    save_adapter(with_adapter(model, r=4), tokenizer, tmp_path / "here")
    assert shas(tmp_path / "here") == shas(tmp_path / "there")


def test_saving_changes_nothing_in_the_model(adapted, tmp_path):
    before = {k: v.clone() for k, v in adapted[0].state_dict().items()}
    name = adapted[0].peft_config["default"].base_model_name_or_path
    save_adapter(*adapted, tmp_path / "a")
    after = adapted[0].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert adapted[0].peft_config["default"].base_model_name_or_path == name


def test_an_adapter_is_replaced_and_nothing_else(adapted, tmp_path):
    save_adapter(*adapted, tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("old")
    save_adapter(*adapted, tmp_path / "a")
    assert "qlora_nb" in (tmp_path / "a" / "README.md").read_text()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = shas(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
        save_adapter(*adapted, tmp_path / "a")
    assert shas(tmp_path / "a") == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_in_the_way(adapted, tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        save_adapter(*adapted, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "a file"


def test_a_model_without_adapter(plain, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(*plain, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_the_old_adapter(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    save_adapter(model, tokenizer, tmp_path / "a")
    before = shas(tmp_path / "a")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tokenizer, tmp_path / "a")
    assert shas(tmp_path / "a") == before and os.listdir(tmp_path) == ["a"]


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_merging import load, save_adapter, with_adapter
from qlora_nb.core import UserError
model, tokenizer = load(load_in_4bit=False)
model = with_adapter(model, r=16)
for folder, limit in (word.split("=") for word in sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        save_adapter(model, tokenizer, folder)
        print("saved")
    except UserError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_no_space_left(saved, tmp_path):
    "Files may grow to so many bytes: too few for the numbers, the tokenizer, anything; then enough."
    old, new = Path(shutil.copytree(saved, tmp_path / "old")), tmp_path / "new"
    before = shas(old)
    limits = [f"{old}=100000", f"{old}=500", f"{old}=0", f"{new}=20000", f"{new}=1000000000"]
    done = processes.run(FULL, Path(__file__).parent, *limits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused = "refused: no space left while writing {}: nothing there was changed; free some space and repeat"
    assert done.stdout.splitlines() == [refused.format(old)] * 3 + [refused.format(new), "saved"]
    assert shas(old) == before and sorted(os.listdir(tmp_path)) == ["new", "old"]


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 256 kB; skipped where mounting is not allowed."
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(adapted, small_disk):
    with pytest.raises(UserError, match="no space left"):
        save_adapter(*adapted, small_disk / "a")
    assert os.listdir(small_disk) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_place_that_cant_be_written(adapted, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written"):
        save_adapter(*adapted, tmp_path / "locked" / "a")


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": False, "dtype": "bfloat16"}], ids=["4-bit", "16-bit"])
def test_round_trip(settings, tmp_path):
    model, tokenizer = load(**settings)
    model = with_adapter(model, r=4, use_rslora=True).eval()
    sha = save_adapter(model, tokenizer, tmp_path / "a")
    again = load_adapter(load(**settings)[0], tmp_path / "a").eval()
    ids = tokenizer("How many apples?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert save_adapter(again, tokenizer, tmp_path / "b") == sha
    assert shas(tmp_path / "a") == shas(tmp_path / "b")
    assert not any(p.requires_grad for p in again.parameters())


def test_trainable(saved):
    again = load_adapter(load()[0], saved, trainable=True)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert len(trained) == 56 and all("lora_" in name for name in trained)


def test_other_adapter_names_are_saved_flat(adapted, saved, tmp_path):
    import peft

    model, tokenizer = load(load_in_4bit=False)
    model = peft.PeftModel.from_pretrained(model, saved, adapter_name="mine")
    save_adapter(model, tokenizer, tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == FILES
    keys = [read_header(folder / "adapter_model.safetensors").keys() for folder in (saved, tmp_path / "a")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda a: shutil.rmtree(a), "there is no adapter folder"),
        (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a list"),
        (lambda a: (a / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of type IA3"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "no adapter_model.safetensors"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b""), "damaged"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "damaged"),
        (lambda a: os.truncate(a / "adapter_model.safetensors", 100_000), "damaged"),
    ],
    ids=["no folder", "no config", "broken config", "list", "other kind", "pickle", "empty", "garbage", "cut"],
)
def test_folders_that_are_no_adapter(plain, copied, harm, said):
    harm(copied)
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(plain[0], copied)
    assert "\n" not in str(caught.value)
    assert not any(hasattr(layer, "lora_A") for layer in plain[0].modules())


def rewrite(folder, change):
    import safetensors.torch

    file = folder / "adapter_model.safetensors"
    tensors = dict(change(key, value) for key, value in safetensors.torch.load_file(file).items())
    safetensors.torch.save_file(tensors, file)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda k, v: (k, torch.zeros(16, 64) if "k_proj.lora_A" in k else v), "k_proj has in_features=64"),
        (lambda k, v: (k, torch.zeros(99, 16) if "up_proj.lora_B" in k else v), "up_proj has out_features=99"),
        (lambda k, v: (k.replace("layers.3", "layers.30"), v), "no layer model.layers.30"),
        (lambda k, v: (k, torch.zeros(3, 256) if "q_proj.lora_A" in k else v), "doesn't fit this model"),
    ],
    ids=["in", "out", "layer", "rank"],
)
def test_adapters_of_other_models(plain, copied, change, said):
    rewrite(copied, change)
    base = load(load_in_4bit=False)[0] if "fit" in said else plain[0]
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(base, copied)
    assert "\n" not in str(caught.value)


def test_an_adapter_on_an_adapter(adapted, saved):
    with pytest.raises(UserError, match="has an adapter already"):
        load_adapter(adapted[0], saved)


def test_load_model_takes_the_adapter(adapted, saved):
    from qlora_nb.model import load_model

    model, tokenizer = load_model(adapter=saved, backend="transformers")
    ids = tokenizer("How many apples?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, adapted[0].eval()(ids).logits)


# --- merging --------------------------------------------------------------------------------------------------------


IDS = torch.tensor([[757, 3, 40, 200, 401, 77, 766, 5]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


SETTINGS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 40}},
    "some layers": {"target_modules": ["q_proj", "v_proj"]},
    "embedding in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
}  # fmt: skip


def with_peft(model, **settings):
    import peft

    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "magnitude" in name:
            parameter.data.mul_(1.1)
    return model


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_merged_model_is_the_adapted_one(kind, bits):
    model = load(load_in_4bit=bits == 4)[0]
    plain = logits(model)
    model = with_peft(model, **SETTINGS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = logits(model)
    merged = merge_adapter(model)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(model), wanted)
    assert not hasattr(merged, "peft_config") and type(merged).__name__ == "LlamaForCausalLM"
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    names = {layer.name for layer in merged.qlora_nb.merge_report}
    assert len(names) == len(merged.qlora_nb.merge_report) == (8 if kind == "some layers" else 28)
    assert all(layer.error == 0 < layer.update for layer in merged.qlora_nb.merge_report)


def test_as_peft_merges_in_16_bits():
    "Another implementation of the same sum, in fp32."
    model = with_peft(load(load_in_4bit=False, dtype="float32")[0], use_rslora=True)
    merged = merge_adapter(model)
    theirs = model.merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_report_is_the_difference_to_what_was_trained(load_in_4bit):
    "In fp32 nothing is lost: on a base in 4 bits the dequantized one is merged into, else the original."
    model = with_adapter(load(load_in_4bit=load_in_4bit)[0])
    merged = merge_adapter(model)
    original = TensorFolder(EMBEDDED_MODEL)
    for note in merged.qlora_nb.merge_report:
        layer, now = model.get_base_model().get_submodule(note.name), base_weight(merged.get_submodule(note.name))
        base = base_weight(layer.base_layer)
        update = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        norms = [float(torch.linalg.norm(x)) for x in (base, update)]
        assert [note.base, note.update] == pytest.approx(norms, rel=1e-4, abs=1e-5) and note.error == note.lost == 0
        torch.testing.assert_close(now, base + update)
        if not load_in_4bit:
            torch.testing.assert_close(now, original.read(f"{note.name}.weight").float() + update)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_folder(dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load()
    model = with_adapter(model)
    report = save_merged(model, tokenizer, tmp_path / "a", dtype=dtype, shard_size=700_000)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3 and {e["dtype"] for f in files for e in read_header(f).values()} == {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.dtype == getattr(torch, dtype) and again.lm_head.weight is again.model.embed_tokens.weight
    built = merge_adapter(model, dtype=dtype)
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert [layer.error for layer in report] == [layer.error for layer in built.qlora_nb.merge_report]
    assert max(layer.lost for layer in report) < {"float32": 1e-9, "bfloat16": 0.1, "float16": 0.01}[dtype]


def test_rope_is_spelt_both_ways(tmp_path):
    import transformers

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(
        vocab_size=768, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rope_parameters=rope, tie_word_embeddings=False,
    )  # fmt: skip
    model = with_peft(transformers.LlamaForCausalLM(config))
    save_merged(model, load(load_in_4bit=False)[1], tmp_path / "a")
    found = json.loads((tmp_path / "a" / "config.json").read_text())
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 5e5
    assert found["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config.rope_parameters == model.get_base_model().config.rope_parameters
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    model, tokenizer = load(load_in_4bit=False)
    model = with_adapter(model, r=2)
    save_merged(model, tokenizer, tmp_path / "a", shard_size=700_000)
    save_merged(model, tokenizer, tmp_path / "a")  # in one file now: the shards go
    assert [file.name for file in (tmp_path / "a").glob("model*")] == ["model.safetensors"]
    (tmp_path / "a" / "thesis.txt").write_text("years")
    before = shas(tmp_path / "a")
    with pytest.raises(UserError, match="holds other files .thesis.txt"):
        save_merged(model, tokenizer, tmp_path / "a")
    assert shas(tmp_path / "a") == before and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_while_merging(small_disk):
    model, tokenizer = load(load_in_4bit=False)
    with pytest.raises(UserError, match="no space left"):
        save_merged(with_adapter(model, r=2), tokenizer, small_disk / "a")
    assert os.listdir(small_disk) == []


def spoil(kind):
    import peft

    model = load(load_in_4bit=False, dtype="float32")[0]
    if kind == "lora_bias":
        return with_peft(model, lora_bias=True)
    model = with_peft(model)
    if kind == "merged":
        model.merge_adapter()
    if kind == "two":
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "other"])
    if kind == "large":
        model.get_base_model().model.layers[2].mlp.up_proj.lora_B["default"].weight.data[3, 3] = 1e7
    return model


@pytest.mark.parametrize(
    "kind, said",
    [
        ("lora_bias", "q_proj has no bias that could hold"),
        ("merged", "is merged already"), ("two", "2 adapters are active"),
        ("large", "layers.2.mlp.up_proj.weight holds numbers that float16 can't hold"),
    ],
)  # fmt: skip
def test_what_cant_be_merged_rightly(kind, said):
    with pytest.raises(UserError, match=said) as caught:
        merge_adapter(spoil(kind), dtype="float16")
    assert "\n" not in str(caught.value)


def test_a_head_that_was_untied_by_hand_stays_apart():
    "The config still says tied: the merged model does what this one does."
    model = with_peft(load(load_in_4bit=False, dtype="float32")[0])
    model.get_base_model().lm_head.weight = torch.nn.Parameter(torch.randn(768, 256) / 16)
    merged = merge_adapter(model)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)


def test_a_model_without_adapter_and_a_damaged_folder_are_refused(plain, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        merge_adapter(plain[0])
    with pytest.raises(UserError, match="holds no .safetensors weights"):
        TensorFolder(tmp_path)
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "cut")
    with pytest.raises(UserError, match="holds no tensor x: it belongs to another model"):
        TensorFolder(tmp_path / "cut").read("x")
    os.truncate(tmp_path / "cut" / "model.safetensors", 500_000)
    with pytest.raises(UserError, match="damaged or incomplete"):
        TensorFolder(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(UserError, match="lacks model-2.safetensors, which its index names"):
        TensorFolder(tmp_path / "cut")


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_while_a_tensor_is_read(call, monkeypatch):
    "In torch's own code, which makes a ValueError of it in the second of its two calls."
    item, calls = torch.UntypedStorage.__getitem__, []

    def interrupted(storage, where):
        calls.append(where)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return item(storage, where)

    folder = TensorFolder(EMBEDDED_MODEL)
    name = next(name for name, entry in folder.entries.items() if entry.shape)
    monkeypatch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.read(name)
    assert len(calls) == call
