"""A sharded base: each process keeps its part of every layer, as bytes; training is as on a whole one."""

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from repository import real_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from qlora_nb import sharding
from qlora_nb.core import EMBEDDED_MODEL, PROFILES, UserError
from qlora_nb.engine.install import Engine, engine_of, install_engine
from qlora_nb.loop import pad_rows
from qlora_nb.merging import merge_adapter
from qlora_nb.model import add_lora, check_part, load_model
from qlora_nb.parallel import (
    check_sharing,
    count_parts,
    list_weights,
    share_base,
    share_out,
)
from qlora_nb.processes import ProcessEnded
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RunFolder, resolve_settings
from qlora_nb.sharding import ShardedUnit, check_sharded_adapter, find_frozen_tensors, find_sharded, shard_base
from qlora_nb.trainer import trainable_parameters
from qlora_nb.training import train_adapter

heavy = pytest.mark.heavy
quick = pytest.mark.quick
NAN_PATTERNS = torch.tensor(
    [0x7FC00001, 0x7F800001, -0x3FFFFF, -0x400001, 0x7FFFFFFF], dtype=torch.int32
)  # quiet and signalling


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    "A folder with the embedded tokenizer and a small Llama of three layers, whose head is a matrix of its own."
    from qlora_nb.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("untied")
    config = LlamaConfig.from_pretrained(EMBEDDED_MODEL)
    config.tie_word_embeddings, config.num_hidden_layers, config.attention_bias = False, 3, True
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(EMBEDDED_MODEL)).save_pretrained(folder)
    return folder


@pytest.fixture
def one_process():
    "A process group of this process alone: gathers run, and give what was cut."
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# --- bytes ----------------------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_put_together_are_the_bytes_that_were_cut(processes, dtype):
    "NaN of every kind among them, in fp32 and as halves of it in bf16; odd sizes, too."
    torch.manual_seed(processes)
    module = torch.nn.Sequential(
        torch.nn.Linear(37, 11, dtype=dtype), torch.nn.LayerNorm(5, dtype=dtype), torch.nn.Embedding(3, 7)
    )
    module.requires_grad_(False)
    module[0].weight.data.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)[:5] = NAN_PATTERNS.to(
        torch.int32 if dtype == torch.float32 else torch.int16
    )
    module[2].weight.data.view(-1).view(torch.int32)[-5:] = NAN_PATTERNS
    wanted = [raw(tensor).clone() for tensor, _ in find_frozen_tensors(module)]
    units = [ShardedUnit(copy.deepcopy(module), rank, processes) for rank in range(processes)]
    assert len({unit.size for unit in units}) == 1 and len({unit.total for unit in units}) == 1
    assert units[0].total == sum(int(some.long().sum()) for some in wanted)
    again = ShardedUnit(module, 0, processes)
    again.lie_in(torch.cat([unit.part for unit in units]))
    found = [raw(tensor) for tensor, _ in find_frozen_tensors(module)]
    assert all(map(torch.equal, found, wanted)) and len(found) == 5
    assert all(place.start % sharding.UNIT_ALIGNMENT == 0 for place in again.places)


@pytest.mark.parametrize("bits, dtype", [(4, "float32"), (4, "bfloat16"), (16, "bfloat16")])
@pytest.mark.parametrize("kind", ["embedded", "untied"])
def test_a_base_read_in_parts_is_that_of_from_pretrained(kind, bits, dtype, untied):
    "Byte by byte, in all units; what isn't sharded, and the numbers that aren't read from files, too."
    name, how = str(untied) if kind == "untied" else "qlora_nb:embedded", {"load_in_4bit": bits == 4, "dtype": dtype}
    whole = load_model(name, backend="transformers", **how)[0].requires_grad_(False)
    parts = [load_model(name, backend="transformers", shard=(rank, 3), **how)[0] for rank in range(3)]
    modules = [*whole.get_decoder().layers, *sharding.find_tables(whole)]
    assert len(modules) == {"embedded": 4, "untied": 5}[kind]
    for number, module in enumerate(modules):
        units = [find_sharded(part).units[number] for part in parts]
        wanted = ShardedUnit(copy.deepcopy(module), 0, 1)
        found = torch.cat([unit.part for unit in units])
        assert torch.equal(found[: len(wanted.part)], wanted.part) and not found[len(wanted.part) :].any()
        assert {unit.total for unit in units} == {wanted.total}
    sharded, one = find_sharded(parts[0]), parts[0]
    for (key, found), (other, wanted) in zip(one.named_parameters(), whole.named_parameters(), strict=True):
        assert (key, type(found), found.dtype, found.shape) == (other, type(wanted), wanted.dtype, wanted.shape)
        assert id(found) in sharded.weights or torch.equal(raw(found), raw(wanted))
    for (_, found), (_, wanted) in zip(one.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(found, wanted)
    assert one.generation_config.to_dict() == whole.generation_config.to_dict()


@heavy
def test_a_real_model_in_parts(one_process):
    "SmolLM2: 30 layers, byte by byte, and what they compute."
    name = str(real_file("smollm2/config.json").parent)
    whole, part, other = (
        load_model(name, backend="transformers", **how)[0] for how in ({}, {"shard": 2}, {"shard": (1, 2)})
    )
    layers = whole.requires_grad_(False).get_decoder().layers
    for number, layer in enumerate(layers):
        found = torch.cat([find_sharded(model).units[number].part for model in (part, other)])
        wanted = ShardedUnit(copy.deepcopy(layer), 0, 1).part
        assert torch.equal(found[: len(wanted)], wanted)
    again = load_model(name, backend="transformers")[0]
    shard_base(again, 0, 1)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=torch.arange(40)[None]).logits for model in (whole, again)))
    assert len(layers) == 30 == find_sharded(again).gathered


def test_a_base_that_is_stored_in_4_bits(tmp_path):
    "Its scales are read, not made anew."
    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole, part = (load_model(str(tmp_path), backend="transformers", **how)[0] for how in ({}, {"shard": (0, 2)}))
    assert part.is_loaded_in_4bit and part.generation_config.to_dict() == whole.generation_config.to_dict()
    compute = [model.get_decoder().layers[0].mlp.up_proj.compute_dtype for model in (whole, part)]
    assert compute[0] == compute[1] and part.config.to_dict() == whole.config.to_dict()
    for layer, unit in zip(whole.requires_grad_(False).get_decoder().layers, find_sharded(part).units, strict=True):
        assert ShardedUnit(layer, 0, 2).total == unit.total and torch.equal(ShardedUnit(layer, 0, 2).part, unit.part)


def test_a_broken_number_is_found_while_it_is_read(untied, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in untied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight in .*model.safetensors is NaN or infinite"):
        load_model(str(tmp_path), backend="transformers", shard=2)


# --- gathering ------------------------------------------------------------------------------------------------------


def passed(model, batches):
    "Losses and gradients."
    model.zero_grad()
    losses = []
    for batch in batches:
        losses.append(model(**batch, use_cache=False).loss)
        losses[-1].backward()
    return torch.stack(losses), [p.grad.clone() for p in trainable_parameters(model).values()]


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("kind", ["embedded", "untied"])
def test_gradients_are_those_of_a_whole_base(kind, engine, again, untied, one_process):
    "To the last bit; with the engine, whose layers run again in full here, to rounding."
    name = str(untied) if kind == "untied" else "qlora_nb:embedded"
    made = []
    for how in ({}, {"shard": (0, 1)}):
        if how:  # one process of one: what `load_model` refuses, as nothing would be gained
            base = load_model(name, backend="transformers", engine=engine)[0]
            shard_base(base, 0, 1)
        else:
            base = load_model(name, backend="transformers", engine=engine)[0]
        model = add_lora(base, r=4, use_gradient_checkpointing=again)
        for number, weight in enumerate(trainable_parameters(model).values()):
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.02
        if engine:
            install_engine(model, Engine(attention=False))
        elif again:
            model.enable_input_require_grads()
        made.append(model.train())
    whole, sharded = made
    assert bool(engine_of(sharded)) == engine
    batches = [
        pad_rows([{"input_ids": torch.arange(3, n), "labels": torch.arange(3, n)} for n in (9, 20)], 0),
        pad_rows([{"input_ids": torch.arange(5, 30), "labels": torch.arange(5, 30)}], 0),
    ]
    (losses, grads), (wanted_losses, wanted) = passed(sharded, batches), passed(whole, batches)
    assert torch.equal(losses, wanted_losses)
    for found, grad in zip(grads, wanted, strict=True):
        assert torch.equal(found, grad) if not (engine and again) else torch.allclose(found, grad, rtol=1e-5, atol=1e-8)
    tables, layers = (2, 3) if kind == "untied" else (0, 4)
    held = find_sharded(sharded)
    assert held.gathered == layers + 3 * (layers - 2) + 2 * tables, (
        "a layer twice a pass but for two that are still there; embedding and head once"
    )
    sharded.eval(), whole.eval()
    with torch.no_grad():
        ids = torch.arange(4, 12)[None]
        assert torch.equal(sharded(input_ids=ids).logits, whole(input_ids=ids).logits)
        assert torch.equal(*(m.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for m in (sharded, whole)))


def test_one_layer_is_enough(tmp_path, one_process):
    from qlora_nb.loading import load_tokenizer

    config = LlamaConfig.from_pretrained(EMBEDDED_MODEL, num_hidden_layers=1, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(str(EMBEDDED_MODEL)).save_pretrained(tmp_path)
    whole, sharded = (load_model(str(tmp_path), backend="transformers")[0] for _ in range(2))
    shard_base(sharded, 0, 1)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=torch.arange(5)[None]).logits for model in (whole, sharded)))


def test_a_model_that_computes_when_the_others_are_gone(untied):
    model = add_lora(load_model(str(untied), backend="transformers", shard=2)[0], r=4)
    with pytest.raises(UserError, match="shared out among 2 processes.*open_run"):
        model(input_ids=torch.arange(4)[None])
    with pytest.raises(UserError, match="can't be merged or exported.*open_run"):
        merge_adapter(model)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, words",
    [
        ({"shard": 1}, "shard is 1: give a whole number of at least 2"),
        ({"shard": True}, "shard is True"),
    ],
)
def test_a_number_of_parts_that_cant_be(how, words):
    with pytest.raises(UserError, match="with the backend transformers, not with unsloth"):
        check_part(2, "unsloth")
    with pytest.raises(UserError, match=words):
        load_model("qlora_nb:embedded", **{"backend": "transformers", **how})


@pytest.mark.parametrize(
    "made, words",
    [
        ({}, None), ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, "use_dora=True"), ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"trainable_token_indices": [3]}, "trainable_token_indices="),
        ({"target_modules": ["embed_tokens"]}, "an adapter on embed_tokens"),
        ({"target_modules": ["lm_head"]}, "an adapter on lm_head"), ("dense", "dense=True"),
    ],
)  # fmt: skip
def test_what_reads_the_bases_numbers_elsewhere(made, words, untied):
    "They aren't there: an adapter that starts from them would start from anything."
    from peft import LoraConfig, get_peft_model

    base = load_model(str(untied), backend="transformers", shard=2, load_in_4bit=False)[0]
    how = {} if made == "dense" else {**made, "init_lora_weights": True}
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **how}))
    config = model.peft_config["default"]
    if made != "dense":
        config.init_lora_weights = made.get("init_lora_weights", True)
    said = pytest.raises(UserError, match=f"{words}.* needs all of the base at once") if words else None
    with said or contextlib.nullcontext():
        check_sharded_adapter(model, config, dense=made == "dense")


def test_an_adapter_with_a_larger_vocabulary(untied):
    from qlora_nb.adapter import _resize_vocabulary

    with pytest.raises(UserError, match="larger vocabulary.*sharded"):
        _resize_vocabulary(load_model(str(untied), backend="transformers", shard=2)[0], 800, untied)


@pytest.mark.parametrize(
    "family, words",
    [("gpt2", "other parts than Llama's"), ("opt", "other parts than Llama's"), ("qwen3_moe", "files don't hold")],
)
def test_another_kind_of_model(family, words, tmp_path):
    "Said to be what it is, and not damaged."
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_nb.loading import load_tokenizer

    own = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
        "opt": {**own, "ffn_dim": 64, "word_embed_proj_dim": 64},
        "qwen3_moe": {**own, "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4},
    }[family]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=768, **sizes)).save_pretrained(tmp_path)
    load_tokenizer(str(EMBEDDED_MODEL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"can't be sharded: .*{words}"):
        load_model(str(tmp_path), backend="transformers", shard=2)


@quick
def test_parts_and_processes_are_as_many():
    def settings(**given):
        return resolve_settings(given, profile=PROFILES["tiny"])

    info = {"backend": "transformers", "shard": 2}
    with pytest.raises(UserError, match="shard=2, for 2 processes, and 1 will train: give gpus=2"):
        check_sharing(settings(), info)
    with pytest.raises(UserError, match="shard=2, for 2 processes, and 4 will train.*shard=4"):
        check_sharing(settings(gpus=4), info)
    check_sharing(settings(gpus=2), info)
    with pytest.raises(UserError, match="one process trains: give gpus=2"):
        count_parts(settings(shard=True))
    assert count_parts(settings(shard=True, gpus=4)) == 4 and count_parts(settings(gpus=4)) is None


@quick
def test_each_process_makes_as_many_passes():
    "A step's last micro-batches may not be enough for all: those without pass the first again, for nothing."
    for batches in range(1, 9):
        shares = share_out([f"batch {n}" for n in range(batches)], 4, 100, seed=1, as_many=True)
        assert {len(share.batches) + len(share.idle) for share in shares} == {-(-batches // 4)}
        assert sorted(batch for share in shares for batch in share.batches) == [f"batch {n}" for n in range(batches)]
        assert not shares[0].idle


# --- trained --------------------------------------------------------------------------------------------------------

EXACT = {
    "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch",
    "learning_rate": 2e-4, "save_steps": 2, "eval_rows": 4, "max_new_tokens": 12,
}  # fmt: skip


def trained(output, processes=None, engine=False, name="qlora_nb:embedded", shard=False, **more):
    "A whole run: evaluated before, trained with a look at the held-out rows on the way, evaluated after."
    how = {"shard": processes} if shard else {}
    model, tokenizer = load_model(name, backend="transformers", engine=engine, **how)
    folder, *_ = train_adapter(
        add_lora(model, r=4), tokenizer, load_sft_dataset(limit=18),
        {**EXACT, "gpus": processes, "eval_steps": 2, "sample_prompts": 1, **more}, output=output, check=False,
    )  # fmt: skip
    return folder


def assert_same(found, wanted):
    "The same figures and the same bytes."
    (now, then), names = ([run.summary for run in (found, wanted)]), ("before", "after", "adapter_sha256")
    assert {name: now[name] for name in names} == {name: then[name] for name in names}
    rows = [[(row["step"], row["loss"], row.get("eval_loss")) for row in run.metrics] for run in (found, wanted)]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    assert (found.path / "evaluation.jsonl").read_text() == (wanted.path / "evaluation.jsonl").read_text(), "replies"


@pytest.mark.parametrize(
    "processes, engine", [(2, False), pytest.param(2, True, marks=heavy), pytest.param(4, True, marks=heavy)]
)
def test_a_sharded_run_is_the_unsharded_one(processes, engine, tmp_path, untied):
    "Evaluations before, after and on the way, a sampled reply, and a last step whose rows aren't enough for all."
    sharded, whole = (
        trained(tmp_path / f"{shard}", processes, engine, name=str(untied), shard=shard, gradient_accumulation_steps=4)
        for shard in (True, False)
    )
    assert_same(sharded, whole)
    assert sharded.config["shard"] is True and "shard" not in whole.config


def cli(*given, cwd):
    return subprocess.run(
        [sys.executable, "-m", "qlora_nb", *given], cwd=cwd, capture_output=True, text=True, timeout=500,
        env={**os.environ, "QLORA_NB_PROFILE": "tiny"},
    )  # fmt: skip


class RunsTheModel(TrainerCallback):
    "Runs the model where it may not be run; before that, where it may."

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(input_ids=torch.arange(5)[None])

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.on_step_begin(args, state, control, model)


def test_a_model_is_trained_again_after_a_training_that_broke_off(untied, tmp_path):
    "By a callback that would have hung all. With an adapter in bf16, and other processes, which begin anew."
    model, tokenizer = load_model(str(untied), backend="transformers", shard=2, dtype="float32")
    model, rows = add_lora(model, r=4), load_sft_dataset(limit=18)
    for weight in trainable_parameters(model).values():
        weight.data = weight.data.bfloat16()
    first = {name: weight.detach().float().clone() for name, weight in trainable_parameters(model).items()}
    how = {**EXACT, "gpus": 2, "eval_rows": 0, "max_steps": 3}
    with pytest.raises(UserError, match="on_optimizer_step.*run it in on_step_end"):
        train_adapter(model, tokenizer, rows, how, output=tmp_path / "broken", check=False, callbacks=[RunsTheModel()])
    for name, weight in trainable_parameters(model).items():
        weight.data.copy_(first[name])
    again = train_adapter(model, tokenizer, rows, how, output=tmp_path / "again", check=False)[0]
    whole = add_lora(load_model(str(untied), backend="transformers", dtype="float32")[0], r=4)
    for name, weight in trainable_parameters(whole).items():
        weight.data.copy_(first[name])
    alone = train_adapter(whole, tokenizer, rows, how, output=tmp_path / "alone", check=False)[0]
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in alone.metrics]
    assert again.summary["adapter_sha256"] == alone.summary["adapter_sha256"]
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None, "nothing holds a model of a training that broke off"


@heavy
def test_from_the_command_line_to_the_certificate(tmp_path):
    done = cli(
        "train",
        "--gpus",
        "2",
        "--shard",
        "--max-steps",
        "4",
        "--eval-rows",
        "8",
        "--export",
        "q8_0",
        "--output",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    certificate = json.loads((tmp_path / "run/certificate.json").read_text())
    assert certificate["passed"]
    assert cli("chat", "run", "--message", "2 + 2?", "--temperature", "0", cwd=tmp_path).returncode == 0


@heavy
@pytest.mark.parametrize("processes, shard", [(4, True), (2, False), (1, False)])
def test_a_run_whose_process_died_goes_on_in_any_parts(processes, shard, tmp_path, rows_of_kill):
    "With another number of parts, or the base whole: the same adapter."
    whole, broken = rows_of_kill
    import shutil

    shutil.copytree(broken, tmp_path / "run")
    more = ["--gpus", str(processes), "--shard" if shard else "--no-shard"]
    done = cli("train", "--resume", "run", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    found, wanted = (load_file(path / "adapter/adapter_model.safetensors") for path in (tmp_path / "run", whole))
    for name, weight in wanted.items():
        assert (found[name] - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.fixture(scope="module")
def rows_of_kill(tmp_path_factory):
    "A whole run, and one of which a process was killed in its fourth step."
    place = tmp_path_factory.mktemp("killed")
    flags = [
        "--max-steps",
        "6",
        "--save-steps",
        "2",
        "--optim",
        "adamw_torch",
        "--learning-rate",
        "2e-4",
        "--eval-rows",
        "4",
        "--limit",
        "40",
        "--gpus",
        "2",
    ]
    assert cli("train", *flags, "--output", "whole", cwd=place).returncode == 0
    code = (
        "import os, signal, sys\n"
        "from qlora_nb import parallel\n"
        "usual, count = parallel.Workers.share, [0]\n"
        "def share(self, *given):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4:\n"
        "        os.kill(self.children[0].pid, signal.SIGKILL)\n"
        "    return usual(self, *given)\n"
        "parallel.Workers.share = share\n"
        "from qlora_nb.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *flags, "--shard", "--output", "run"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "process 1 of 2 (counted from 0) ended by SIGKILL" in done.stderr, done.stderr[
        -2000:
    ]
    assert [path.name for path in RunFolder(place / "run").sealed_checkpoints] == ["checkpoint-2"]
    return place / "whole", place / "run"


def test_another_base_in_another_process(untied, tmp_path, monkeypatch):
    "A byte in a layer of which this process has no part is noticed by the other one."
    model, tokenizer = load_model(str(untied), backend="transformers", shard=2)
    model = add_lora(model, r=4)
    find_sharded(model).units[1].total += 1
    assert ((find_sharded(model).units[1].size,), "bytes", find_sharded(model).units[1].total) in list_weights(
        model
    ).values()
    with pytest.raises(ProcessEnded, match="layer or table 1 of the base has other numbers"):
        with share_base(model, 2):
            for _ in range(100):
                model(input_ids=torch.arange(4)[None])
