"""The engine against plain peft: families, dtypes, switches, checkpointing, packing, and what it refuses."""

import contextlib
import copy
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import processes
import pytest
import torch
from repository import PACKAGE, package_classes, private_overrides

from qlora_nb.core import UserError
from qlora_nb.engine.install import Engine, engine_of, engine_refusal, install_engine, remove_engine
from qlora_nb.engine.line import join_rows, pack_rows
from qlora_nb.engine.replay import release_recordings

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WHOLE = Engine()


def config_of(family, **more):
    from transformers import AutoConfig

    more = {"sliding_window": None, **more} if family == "mistral" else more
    return AutoConfig.for_model(family, **SMALL, **more)


def base_of(family, four_bit=True, dtype=torch.float32, **more):
    "A small random model, its projections in NF4 or dense."
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **more)).to(dtype)
    for name, layer in list(model.named_modules()):
        if four_bit and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            if layer.bias is not None:
                new.bias = torch.nn.Parameter(torch.randn_like(layer.bias) / 10)
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new.to("cpu"))
    return model


def peft_of(family="llama", four_bit=True, dtype=torch.float32, lora=None, **more):
    from peft import LoraConfig, get_peft_model

    model = base_of(family, four_bit, dtype, **more)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **(lora or {})}))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return model.train()


def some_rows(lengths=(9, 30, 1, 17, 2)):
    chance = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, 300, (n,), generator=chance) for n in lengths]
    labels = [t.where(torch.arange(len(t)) >= len(t) // 3, -100) for t in ids]
    return [{"input_ids": t.tolist(), "labels": wanted.tolist()} for t, wanted in zip(ids, labels, strict=True)]


def rectangle(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(r["labels"]) + [0] * (longest - len(r["labels"])) for r in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def gradients(model, batch, **more):
    model.zero_grad()
    loss = model(**batch, use_cache=False, **more).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def apart(ours, theirs):
    assert list(ours) == list(theirs) and len(ours) > 0
    return max(((ours[name] - g).norm() / g.norm()).item() for name, g in theirs.items())


def same(model, engine=WHOLE, batch=None, rows=None, within=1e-5):
    "The model by the engine against the same one without."
    rows = rows or some_rows()
    loss, wanted = gradients(model, rectangle(rows))
    install_engine(model, engine)
    found, ours = gradients(model, batch or (join_rows(rows) if engine.attention else rectangle(rows)))
    assert found == pytest.approx(loss, rel=1e-5)
    assert apart(ours, wanted) < within


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_peft(family, four_bit):
    same(peft_of(family, four_bit))


@pytest.mark.parametrize(
    "lora", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}]
)
def test_scales_are_pefts(lora):
    same(peft_of(lora=lora))


def test_tied_embeddings():
    same(peft_of(tie_word_embeddings=True))


SWITCHES = ("adapters", "mlp", "selective", "attention", "loss", "dense")
PAIRS = [(), *itertools.combinations(SWITCHES, 1), *itertools.combinations(SWITCHES, 2)]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("rest", [False, True])
def test_every_switch_alone_and_together(pair, rest):
    "Each pair of switches stands the other way than all the rest."
    same(peft_of(), Engine(**{**dict.fromkeys(SWITCHES, rest), **dict.fromkeys(pair, not rest)}, kernels=False))


@pytest.mark.parametrize("engine", [Engine(), Engine(selective=True), Engine(loss=False), Engine(adapters=False)])
def test_checkpointed_layers_know_the_bounds(engine):
    "The forward is run a second time inside the backward."
    model = peft_of()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    same(model, engine)


def test_bf16_is_within_the_spread_of_the_plain_path():
    "Both against fp32 of the same (rounded) weights."
    exact, plain, fast = peft_of(four_bit=False), peft_of(four_bit=False), peft_of(four_bit=False)
    for model in (exact, plain, fast):
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float() if model is exact else weight.data.bfloat16()
    rows = some_rows((40, 90, 60, 70))
    wanted = gradients(exact, rectangle(rows))[1]
    usual = apart(gradients(plain, rectangle(rows))[1], wanted)
    install_engine(fast)
    assert apart(gradients(fast, join_rows(rows))[1], wanted) < 1.5 * usual


def test_adapters_stay_fp32_under_16_bit_products():
    model = peft_of(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    install_engine(model)
    gradients(model, join_rows(some_rows()))
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_under_autocast():
    model, rows = peft_of(), some_rows()
    install_engine(model)
    exact = gradients(model, join_rows(rows))[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**join_rows(rows), use_cache=False).loss
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert 1e-5 < apart(found, exact) < 0.1


def test_rows_dont_see_each_other():
    "A change of one row changes no other row's gradient: the second row alone is the second row of two."
    model, (first, second) = peft_of(), some_rows((20, 25))
    install_engine(model)
    silent = {**first, "labels": [-100] * 20}
    other = {**silent, "input_ids": first["input_ids"][::-1]}
    alone = gradients(model, join_rows([second]))
    for neighbour in (silent, other):
        loss, found = gradients(model, join_rows([neighbour, second]))
        assert loss == pytest.approx(alone[0], rel=1e-6) and apart(found, alone[1]) < 1e-5


def test_nothing_learned_is_zero_and_not_nan():
    model = peft_of()
    install_engine(model)
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in some_rows()]
    loss, found = gradients(model, join_rows(rows))
    assert loss == 0 and all(g.abs().max() == 0 for g in found.values())


def test_parts_of_a_step_weigh_by_their_learned_tokens():
    model, rows = peft_of(), some_rows()
    _, wanted = gradients(model, rectangle(rows))
    install_engine(model)
    parts = [join_rows(rows[:1]), join_rows(rows[1:])]
    total = sum((part["labels"] != -100).sum() for part in parts)
    model.zero_grad()
    for part in parts:
        model(**part, use_cache=False, num_items_in_batch=total).loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert apart(found, wanted) < 1e-5


def exact_attention(q, k, v, bounds, longest, scale):
    "Causal, each row alone, written out: (T, heads, d)."
    assert q.ndim == 3 and longest == max(bounds.diff())
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out = []
    for a, b in itertools.pairwise(bounds.tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -math.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b]))
    return torch.cat(out)


def torch_213(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
              enable_gqa=False):  # fmt: skip
    assert window_size == (-1, 0) and cu_seq_k is cu_seq_q and max_k == max_q and enable_gqa
    return exact_attention(query, key, value, cu_seq_q, max_q, scale)


def torch_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
              window_size=(-1, -1)):  # fmt: skip
    assert window_size == (-1, 0) and cu_seq_k is cu_seq_q and max_k == max_q
    return exact_attention(query, key, value, cu_seq_q, max_q, scale)


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *,
                 softmax_scale=None, causal=False, window_size=(None, None)):  # fmt: skip
    assert causal and qv is None and window_size == (None, None) and cu_seqlens_k is cu_seqlens_q
    assert max_seqlen_k == max_seqlen_q
    return exact_attention(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), None


@pytest.mark.parametrize("function", [torch_213, torch_211, flash_attn_4])
def test_the_kernels_get_what_they_expect(function):
    """They run on CUDA alone: a stand-in with the signature of each (torch 2.13, torch 2.11, flash-attn-4 4.0.0b36)
    computes in double what the kernel should, from the layout that it documents."""
    import types

    from qlora_nb.engine.line import _by_flash_attn, _by_torch, _row_by_row

    name, call = ("flash_attn.cute", _by_flash_attn) if function is flash_attn_4 else (
        "torch.nn.attention.varlen", _by_torch)  # fmt: skip
    module = types.ModuleType(name)
    setattr(module, "flash_attn_varlen_func" if function is flash_attn_4 else "varlen_attn", function)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 8).double() for heads in (4, 2, 2))
    bounds = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    with patch.dict(sys.modules, {name: module, name.rpartition(".")[0]: types.ModuleType("parent")}):
        found = call(*(t[0].transpose(0, 1) for t in (query, key, value)), bounds, 18, 0.3)
    torch.testing.assert_close(found, _row_by_row(query, key, value, bounds, 0.3)[0])


def test_the_first_kernel_that_is_right_is_taken(capsys):
    from qlora_nb.engine import line

    def missing(*args):
        raise ImportError("not installed")

    def without_gradient(q, k, v, *more):
        return exact_attention(q, k, v.detach(), *more)

    def other_heads(q, k, v, *more):
        return exact_attention(q, k.flip(1), v, *more)

    kernels, place = {"missing": missing, "wrong": other_heads, "no gradient": without_gradient}, (4, 2, 16, 0.25)
    with patch.object(line, "ATTENTION_KERNELS", kernels):
        assert line._first_right("cpu", torch.bfloat16, *place) == ("one call a row", None)
    said = capsys.readouterr().err
    assert "wrong is not used on cpu: its results are wrong" in said and "missing" not in said
    assert "no gradient is not used on cpu: RuntimeError: The differentiated Tensor at index 2" in said
    with patch.object(line, "ATTENTION_KERNELS", {**kernels, "right": exact_attention, "never tried": None}):
        assert line._first_right("cpu", torch.bfloat16, *place) == ("right", exact_attention)
    assert line._kernel(torch.device("cpu"), torch.bfloat16, *place)[1] is None  # none is tried on a CPU


@pytest.mark.parametrize("kind", ["none", "one after the other", "reentrant"])
def test_the_first_trial_inside_a_checkpoint(kind):
    "The trial runs a backward of its own while a checkpoint records what the layer saves."
    from qlora_nb.engine import line

    model, batch = peft_of(dtype=torch.bfloat16), join_rows(some_rows())
    install_engine(model)
    loss, wanted = gradients(model, batch)
    if kind != "none":
        model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})  # fmt: skip
        model.enable_input_require_grads()
    tried = functools.cache(lambda device, *place: line._first_right(device, *place))
    with patch.object(line, "ATTENTION_KERNELS", {"right": exact_attention}), patch.object(line, "_kernel", tried):
        found, ours = gradients(model, batch)
    assert tried.cache_info().misses == 1 and tried(
        torch.device("cpu"), torch.bfloat16, 4, 2, 16, 0.25)[0] == "right"  # fmt: skip
    assert found == pytest.approx(loss, rel=1e-2) and apart(ours, wanted) < 0.03


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and it compiles")
def test_what_cant_be_compiled_is_said_and_runs_as_it_stands(capsys):
    from qlora_nb.engine.passes import PLAIN_PASSES, choose_passes

    assert choose_passes(torch.device("cuda"), torch.float32) is PLAIN_PASSES
    assert "passes over memory aren't fused on cuda for rank 16: " in capsys.readouterr().err


def test_the_installed_torch_has_the_arguments():
    "What torch itself says of varlen_attn, from 2.11 on."
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


def test_chunks_of_a_gpu_are_rounded(monkeypatch):
    "Positions that fill up the last chunk count for nothing."
    from qlora_nb.engine import loss as engine_loss

    torch.manual_seed(0)
    hidden, head = torch.randn(2, 150, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(0, 50, (2, 150)).where(torch.rand(2, 150) < 0.7, -100)
    losses, shapes = [], []
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(engine_loss, "FUSED_DEVICES", devices)
        for chunk in (None, 128, 7):
            seen = []

            def own(logits, wanted, seen=seen):
                seen.append(len(logits))
                return engine_loss.cross_entropy_(logits, wanted)

            loss = engine_loss.labelled_loss(hidden, head, labels, chunk=chunk, cross_entropy_=own)
            losses.append((loss.item(), torch.autograd.grad(loss, hidden)[0]))
            shapes.append(seen)
    count = int((labels[:, 1:] != -100).sum())
    assert shapes[0] == [count] and shapes[3] == [256] and shapes[4] == [128, 128] and 128 < count < 256
    for loss, gradient in losses[1:]:
        assert loss == pytest.approx(losses[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, losses[0][1], rtol=1e-5, atol=1e-8)
    assert engine_loss.labelled_loss(hidden, head, torch.full((2, 9), -100)) == 0


@pytest.mark.parametrize("words, labelled, rows", [
    (128_256, 16_360, 1024), (128_256, 100, 128), (32_000, 2048, 2048), (128_256, 131_072, 2048), (10**6, 5000, 256),
])  # fmt: skip
def test_the_estimate_counts_the_chunks_of_the_loss(words, labelled, rows):
    "At least 256 MiB of fp32 logits, four times as much at most, in between a sixteenth of the positions."
    from types import SimpleNamespace

    from qlora_nb.activations import count_engine_loss_bytes

    assert count_engine_loss_bytes(SimpleNamespace(hidden=8, vocabulary=words), 10, labelled) == 640 + 2 * words * rows


def test_a_long_line_has_sixteen_chunks(monkeypatch):
    from qlora_nb.engine import loss as engine_loss

    seen = []

    def own(logits, wanted):
        seen.append(len(logits))
        return engine_loss.cross_entropy_(logits, wanted)

    monkeypatch.setattr(engine_loss, "LOSS_CHUNK_BYTES", 4 * 50 * 128)
    hidden, head = torch.randn(2, 3000, 8), torch.randn(50, 8)
    engine_loss.labelled_loss(hidden, head, torch.ones(2, 3000, dtype=torch.long), cross_entropy_=own)
    assert len(seen) == 16 and sum(seen) == 5998 and set(seen[:-1]) == {384}
    assert engine_loss.labelled_loss(hidden, head, torch.full((2, 3000), -100), cross_entropy_=own) == 0


# --- layers of the same input ---------------------------------------------------------------------------------------


def calls_of(model, batch):
    "How often each of the three functions runs in a step."
    from qlora_nb.engine import layers, passes

    found = {}

    def counted(room, name):
        real = getattr(room, name)

        class Counted:
            @staticmethod
            def apply(*args):
                found[name] = found.get(name, 0) + 1
                return real.apply(*args)

        return patch.object(room, name, Counted)

    names = ("QLoRAFunction", "GroupedQLoRAFunction", "MLPFunction")
    with counted(layers, names[0]), counted(layers, names[1]), counted(passes, names[2]):
        gradients(model, batch)
    return tuple(found.get(name, 0) for name in names)


def test_layers_of_one_input_are_one_call(monkeypatch):
    "Two layers with seven projections: q, k, v in one, o, and the MLP in one; or gate and up in one, down; or alone."
    from qlora_nb.engine import install

    model, batch = peft_of(), join_rows(some_rows())
    install_engine(model)
    assert calls_of(model, batch) == (0, 4, 2)
    install_engine(model, Engine(mlp=False))
    assert calls_of(model, batch) == (0, 8, 0)
    _, together = gradients(model, batch)
    monkeypatch.setattr(install, "find_groups", lambda base: ())
    install_engine(model, Engine(mlp=False))
    assert calls_of(model, batch) == (0, 14, 0)
    assert apart(gradients(model, batch)[1], together) < 1e-5
    on = install_engine(model, Engine(adapters=False, selective=True, dense=True))
    assert not (on.mlp or on.selective or on.dense) and calls_of(model, batch) == (0, 0, 0)


@pytest.mark.parametrize("targets, calls", [
    (["q_proj", "v_proj", "gate_proj", "up_proj"], (0, 6, 0)), (["k_proj", "down_proj"], (0, 4, 0)),
])  # fmt: skip
def test_a_group_needs_all_its_layers(targets, calls):
    model, rows = peft_of(lora={"target_modules": targets}), some_rows()
    same(model, rows=rows)
    assert calls_of(model, join_rows(rows)) == calls


def test_nothing_is_held_after_a_step():
    "Neither inputs nor outputs of a group stay alive; nor after a call that stopped half way."
    from qlora_nb.engine.layers import LayerGroup

    model, batch = peft_of(), join_rows(some_rows())
    install_engine(model, Engine(mlp=False))
    groups = {id(g): g for g in (m.qlora_nb.group for m in model.modules() if hasattr(m, "qlora_nb")) if g is not None}
    assert len(groups) == 8 and all(isinstance(g, LayerGroup) for g in groups.values())
    gradients(model, batch)
    assert all(g.x is None and not g.waiting for g in groups.values())
    attention = model.get_base_model().model.layers[0].self_attn
    x, y = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    attention.q_proj(x)  # and nobody asks for k and v
    assert not copy.deepcopy(attention.q_proj).qlora_nb.group.waiting
    torch.testing.assert_close(attention.v_proj(y), attention.v_proj(y.clone()))
    attention.q_proj(y)
    assert attention.k_proj(x).shape == (1, 3, 32)
    gradients(model, batch)
    assert all(g.x is None and not g.waiting for g in groups.values())


def test_rows_of_a_batch_may_take_different_adapters():
    "peft's `adapter_names` comes by hooks on the layers; other people's hooks are called, too."
    model, ids, seen = peft_of(), torch.arange(1, 21).view(2, 10), []
    model.eval()
    install_engine(model)
    mixed = {"adapter_names": ["__base__", "default"]}
    with torch.no_grad():
        wanted = model(ids, **mixed).logits
    torch.testing.assert_close(model(ids, **mixed).logits, wanted, rtol=1e-4, atol=1e-5)
    mlp = model.get_base_model().model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn):
        layer.register_forward_hook(lambda layer, args, out: seen.append(layer))
    model(ids)
    assert len(seen) == 4


def test_weights_that_a_merge_put_in_place_are_used():
    from qlora_nb.model import add_lora, load_model

    model, ids = add_lora(load_model(dtype="float32", backend="transformers")[0]), torch.arange(1, 21).view(2, 10)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    install_engine(model, Engine(dense=True))
    before = model(ids).logits
    model.merge_adapter()
    model.unmerge_adapter()  # quantized twice by now
    assert not torch.allclose(model(ids).logits, before, rtol=1e-3)
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_after_a_merge():
    from peft import LoraConfig, get_peft_model

    model, ids = peft_of(four_bit=False), torch.arange(1, 21).view(2, 10)
    install_engine(model)
    base = model.merge_and_unload()
    again = get_peft_model(base, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]))
    again(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)
    install_engine(again)
    again(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("engine", [Engine(), Engine(mlp=False)])
def test_whatever_else_is_trained_gets_its_gradient(engine):
    "Biases and base weights that somebody unfreezes, and an adapter with biases that came later."
    from peft import LoraConfig

    model, ids = peft_of("qwen2", four_bit=False), torch.arange(1, 21).view(2, 10)
    install_engine(model, engine)
    for name, weight in model.named_parameters():
        if name.endswith("k_proj.base_layer.bias") or name.endswith("up_proj.base_layer.weight"):
            weight.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model = peft_of()
    install_engine(model, engine)
    model.add_adapter("other", LoraConfig(r=2, lora_bias=True, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    model(ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_mlps_that_are_somebody_elses():
    "Another forward stays, and a class without `act_fn` is left alone."
    model, ids, called = peft_of(), torch.arange(1, 21).view(2, 10), []
    first, second = (layer.mlp for layer in model.get_base_model().model.layers)
    own = first.forward
    first.forward = lambda x: called.append(1) or own(x)
    act = second.act_fn
    del second.act_fn
    second.forward = lambda x: second.down_proj(act(second.gate_proj(x)) * second.up_proj(x))
    install_engine(model)
    assert calls_of(model, {"input_ids": ids, "labels": ids})[2] == 0 and called


@pytest.mark.parametrize("more, mlps", [({"hidden_act": "gelu"}, 0), ({"mlp_bias": True}, 2)])
def test_mlps_of_other_kinds(more, mlps):
    "One with another activation is left as it is; one with biases is done."
    model, rows = peft_of(**more), some_rows()
    same(model, rows=rows)
    assert calls_of(model, join_rows(rows))[2] == mlps
    install_engine(model, Engine(selective=True))
    same(model, Engine(selective=True), rows=rows)


def test_selective_keeps_less_and_gives_the_same_to_the_bit():
    from qlora_nb.qlora import count_kept_bytes, trace_saved_tensors

    model, batch = peft_of(), join_rows(some_rows((60, 60)))
    install_engine(model)
    loss, wanted = gradients(model, batch)
    own = [*model.parameters(), *model.buffers()]

    def kept():
        return count_kept_bytes(trace_saved_tensors(lambda: model(**batch, use_cache=False).loss, own=own)[1])

    usual = kept()
    install_engine(model, Engine(selective=True))
    found, ours = gradients(model, batch)
    assert found == loss and all(torch.equal(ours[name], g) for name, g in wanted.items())
    assert usual - kept() == 2 * 2 * 120 * 128 * 4  # two layers, gate and up


def test_one_frozen_adapter_of_a_group():
    model, batch = peft_of(), join_rows(some_rows())
    frozen = [p for name, p in model.named_parameters() if "k_proj.lora_A" in name]
    for weight in frozen:
        weight.requires_grad_(False)
    install_engine(model)
    assert calls_of(model, batch) == (2, 6, 2)
    assert all(weight.grad is None for weight in frozen)


def test_dense_weights_give_the_same_to_the_bit():
    model, batch = peft_of(), join_rows(some_rows())
    install_engine(model)
    loss, wanted = gradients(model, batch)
    before = places(model)
    assert install_engine(model, Engine(dense=True)).dense
    assert places(model) == before  # the same attributes, other values
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    kept = layer.qlora_nb.dense[1]
    assert layer.qlora_nb.dense[0] is layer.base_layer.weight
    assert kept.shape == (128, 64) and kept.dtype == torch.float32
    found, ours = gradients(model, batch)
    assert found == loss and all(torch.equal(ours[name], g) for name, g in wanted.items())
    install_engine(model)
    assert model.get_base_model().model.layers[0].mlp.up_proj.qlora_nb.dense is None


# --- an ordinary model all the while --------------------------------------------------------------------------------


def places(model):
    "What each part of a model has of its own: its attributes' names, and the attention that it takes."
    return {name: (sorted(vars(m)), getattr(getattr(m, "config", None), "_attn_implementation", None))
            for name, m in model.named_modules()}  # fmt: skip


def test_it_goes_in_and_out():
    model = peft_of()
    before = places(model)
    engine = install_engine(model)
    # for CUDA, or a model that runs its layers again:
    off = dict.fromkeys(("kernels", "compiled", "checkpoint", "offload"), False)
    assert engine_of(model) == engine == Engine(**off)
    install_engine(model, Engine(loss=False))  # another one takes its place
    assert engine_of(model) == Engine(loss=False, **off)
    remove_engine(model)
    remove_engine(model)
    assert engine_of(model) is None and places(model) == before


def test_one_attribute_is_added_to_the_modules_of_other_libraries(on_a_cpu):
    "A model by load_model and add_lora, with every part of the engine that a CPU can have, beside a plain peft model."
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.model import add_lora, load_model, nf4_config

    model = add_lora(load_model("qlora_nb:embedded", engine=True)[0], use_gradient_checkpointing=True)
    on = engine_of(model)
    assert on.mlp and on.attention and on.loss and on.checkpoint and on.replayed
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, quantization_config=nf4_config(torch.float32))
    plain.gradient_checkpointing_enable()
    plain = get_peft_model(plain, model.peft_config["default"])
    own = {name: set(vars(module)) for name, module in plain.named_modules()}
    added = {name: set(vars(module)) - own[name] for name, module in model.named_modules()}
    assert set(added) == set(own) and set().union(*added.values()) == {"qlora_nb", "forward"}
    noted = {name for name, names in added.items() if "qlora_nb" in names}
    assert {name for name, names in added.items() if "forward" in names} <= noted


def test_what_was_there_before_is_put_back():
    "Somebody else's forward and attention: called while the engine is in, and there when it is out."
    model, called = peft_of(), []
    base = model.get_base_model()
    own = base.forward

    def mine(*args, **kwargs):
        called.append(1)
        return own(*args, **kwargs)

    base.forward, base.config._attn_implementation = mine, "eager"
    install_engine(model)
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert called == [1]
    remove_engine(model)
    assert base.forward is mine and base.config._attn_implementation == "eager"


def test_generating_makes_the_logits_it_needs():
    "transformers reads what a forward takes from its signature: masks from padding, and the last position's logits."
    model, seen = peft_of(pad_token_id=0), []
    plain = [inspect.signature(m.forward) for m in (model.get_base_model(), model.get_base_model().model)]
    ids = torch.arange(1, 21).view(2, 10)
    ids[0, :4] = 0  # padded on the left, and no mask given
    wanted = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    install_engine(model)
    assert [inspect.signature(m.forward) for m in (model.get_base_model(), model.get_base_model().model)] == plain
    model.get_output_embeddings().register_forward_hook(lambda layer, args, out: seen.append(out.shape[1]))
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), wanted)
    assert set(seen) == {1}


def test_other_ways_to_call_it():
    model, ids = peft_of(), torch.arange(1, 21).view(2, 10)
    base = model.get_base_model()
    mask = torch.ones_like(ids)
    wanted = base(ids, labels=ids)
    install_engine(model)
    assert base(ids, mask, labels=ids).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    torch.testing.assert_close(base(ids, mask).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert base(input_ids=ids, labels=ids, return_dict=False)[0].item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert base(ids, labels=ids).logits is None  # as documented
    with torch.no_grad():
        assert base(ids, labels=ids).logits is not None


def test_a_copy_is_a_copy():
    model, ids = peft_of(four_bit=False), torch.arange(1, 21).view(2, 10)
    install_engine(model)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data.zero_()
    with torch.no_grad():
        assert other(ids).logits.abs().max() == 0 < model(ids).logits.abs().max()
    assert other(ids, labels=ids).loss.item() == pytest.approx(math.log(300), rel=1e-5)
    remove_engine(other)
    assert engine_of(model) is not None and engine_of(other) is None
    assert "forward" in vars(model.get_base_model()) and "forward" not in vars(other.get_base_model())


def test_a_merged_model_can_be_trained_in_full():
    model, ids = peft_of(four_bit=False), torch.arange(1, 21).view(2, 10)
    install_engine(model)
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    merged(ids, labels=ids).loss.backward()
    assert merged.lm_head.weight.grad.abs().max() > 0
    remove_engine(merged)
    assert engine_of(merged) is None and merged(ids, labels=ids).logits is not None


def test_layers_with_a_configuration_of_their_own():
    "peft copies layers, and their configuration with them: the rows are kept apart there, too."
    rows = some_rows((20, 25))
    model = peft_of(lora={"layer_replication": [[0, 2], [0, 2]]})
    install_engine(model)
    alone = gradients(model, join_rows(rows[1:]))
    silent = {**rows[0], "labels": [-100] * 20}
    loss, found = gradients(model, join_rows([silent, rows[1]]))
    assert loss == pytest.approx(alone[0], rel=1e-6) and apart(found, alone[1]) < 1e-5


def test_an_adapter_that_came_later_is_pefts():
    "One with dropout, put on after the engine: it drops out."
    from peft import LoraConfig

    model, ids = peft_of(), torch.arange(1, 21).view(2, 10)
    install_engine(model)
    model.add_adapter("other", LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    losses_ = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses_.append(model(ids, labels=ids).loss.item())
    assert losses_[0] != losses_[1]


def test_ligers_kernels_stay_in_their_model():
    """Liger needs a GPU: a stand-in that patches as Liger 0.8.5 does (classes and a function of the modelling code,
    methods of this model's modules) shows that others keep their own, and that all of it comes out again."""
    import sys as system
    import types

    from transformers.models.llama import modeling_llama as code

    from qlora_nb.engine import install

    def rotary(*args, **kwargs):
        return old_rotary(*args, **kwargs)

    class Norm(torch.nn.Module):
        def forward(self, x):
            called.append(1)
            return code.LlamaRMSNorm.forward(self, x)

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        assert not fused_linear_cross_entropy and not cross_entropy
        code.apply_rotary_pos_emb, code.LlamaRMSNorm = rotary, Norm
        for module in model.modules():
            if isinstance(module, old_norm):
                module.forward = types.MethodType(Norm.forward, module)

    old_rotary, old_norm, called = code.apply_rotary_pos_emb, code.LlamaRMSNorm, []
    fakes = {name: types.ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    patches = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply})
    fakes["liger_kernel.transformers.monkey_patch"] = patches
    model = peft_of()
    before = places(model)
    with patch.dict(system.modules, fakes), patch.object(install, "has_liger", lambda base: True):
        assert install_engine(model).kernels
        assert code.apply_rotary_pos_emb is rotary and code.LlamaRMSNorm is old_norm
        gradients(model, join_rows(some_rows()))
        assert called
        install_engine(model, Engine(kernels=False))
        called.clear()
        gradients(model, join_rows(some_rows()))
        assert not called and code.apply_rotary_pos_emb is old_rotary
        install_engine(model)
        remove_engine(model)
    assert places(model) == before and code.apply_rotary_pos_emb is old_rotary


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made_for_a_line(family, monkeypatch):
    "Nor is the device asked whether there are rows in it, which Python would have to wait for."
    from transformers import masking_utils

    def asked(*args, **kwargs):
        raise AssertionError("a mask is being made")

    model, rows = peft_of(family), some_rows()
    install_engine(model)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked)
    monkeypatch.setattr(masking_utils, "sdpa_mask", asked)
    line = join_rows(rows)
    gradients(model, line)
    model.get_base_model().get_decoder()(line["input_ids"], None, cu_seq_lens_q=line["cu_seq_lens_q"])
    with pytest.raises(AssertionError, match="a mask is being made"):
        gradients(model, {"input_ids": torch.arange(9)[None], "labels": torch.arange(9)[None]})


def test_another_attention_that_came_later_gets_its_mask():
    model, batch = peft_of(), join_rows(some_rows())
    install_engine(model)
    loss, wanted = gradients(model, batch)
    model.get_base_model().set_attn_implementation("sdpa")
    found, ours = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-5) and apart(ours, wanted) < 1e-5


def test_switched_off_merged_and_without_gradients_it_is_peft(tmp_path):
    from peft import PeftModel

    model, ids = peft_of(), torch.arange(20)[None]
    mask = torch.tensor([[0] * 5 + [1] * 15])
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with model.disable_adapter():
            bare = model(ids).logits
    install_engine(model)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, bare)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, wanted)
        dense = peft_of(four_bit=False)
        install_engine(dense)
        wanted = dense(ids).logits
        torch.testing.assert_close(dense.merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: peft_of(lora={"lora_dropout": 0.1}), "lora_dropout=0.1"),
        (lambda: peft_of(four_bit=False, lora={"use_dora": True}), "use_dora=True"),
        (lambda: peft_of("qwen2", lora={"bias": "all"}), "bias=all"),
        (lambda: peft_of(lora={"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (lambda: peft_of(lora={"alora_invocation_tokens": [5, 6]}), "alora_invocation_tokens"),
        (lambda: peft_of(four_bit=False, lora={"target_modules": ["q_proj", "embed_tokens"]}), "embed_tokens"),
        (lambda: peft_of(four_bit=False, lora={"target_modules": ["q_proj", "lm_head"]}), "head"),
        (lambda: peft_of("gemma2"), "architecture is gemma2"),
        (lambda: peft_of("mistral", sliding_window=8), "window of 8"),
        (lambda: peft_of(attention_dropout=0.2), "has dropout 0.2"),
    ],
)
def test_what_it_refuses(make, words):
    model = make()
    assert words in engine_refusal(model)
    with pytest.raises(UserError, match="engine can't train"):
        install_engine(model)
    assert engine_of(model) is None


def test_two_adapters_are_refused():
    from peft import LoraConfig

    model = peft_of()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert "2 adapters" in engine_refusal(model)


def test_packs_hold_every_row_once():
    import datasets

    rows = datasets.Dataset.from_list(some_rows((9, 30, 1, 17, 2, 13, 40)))
    lines = pack_rows(rows, 40)
    assert max(map(len, lines["input_ids"])) <= 40 and len(lines) == 3
    batch = join_rows([lines[i] for i in range(len(lines))])
    bounds = batch["cu_seq_lens_q"].tolist()
    found = [tuple(batch["input_ids"][0, a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    assert sorted(found) == sorted(map(tuple, rows["input_ids"]))
    assert all(batch["labels"][0, a] == -100 and batch["position_ids"][0, a] == 0 for a in bounds[:-1])
    with pytest.raises(UserError, match="a row has 40 tokens"):
        pack_rows(rows, 39)
    with pytest.raises(UserError, match="no rows to pack"):
        pack_rows(rows.select([]), 39)


def test_what_the_model_is_said_to_be(tmp_path, capsys):
    "`model_info` follows the engine, and an adapter that is loaded to be trained gets it."
    from qlora_nb.adapter import load_adapter, model_info
    from qlora_nb.model import add_lora, load_model

    model = add_lora(load_model(backend="transformers")[0])
    assert not model_info(model)["engine"]
    install_engine(model)
    assert model_info(model)["engine"]
    remove_engine(model)
    assert not model_info(model)["engine"]
    model.save_pretrained(tmp_path)
    base, _ = load_model(engine=True)
    assert "engine:" not in capsys.readouterr().err
    again = load_adapter(base, tmp_path, trainable=True)
    assert engine_of(again) is not None and "engine: base and adapter" in capsys.readouterr().err


def test_selective_is_asked_for_where_the_others_are(capsys):
    from qlora_nb.model import add_lora, load_model

    model = add_lora(load_model(engine=True)[0], use_gradient_checkpointing="selective")
    assert engine_of(model).selective and "its wide tensors recomputed" in capsys.readouterr().err
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    plain = load_model(backend="transformers")[0]
    for wanted, words in (("selective", "load the model with engine=True"), ("half", "'half': choose")):
        with pytest.raises(UserError, match=words):
            add_lora(plain, use_gradient_checkpointing=wanted)
    assert engine_of(add_lora(plain)) is None  # nothing was changed by the refusals


# --- whole runs -----------------------------------------------------------------------------------------------------


def cli(*arguments, cwd, code=0):
    done = processes.qlora_nb(*arguments, cwd=cwd)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def losses(folder):
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    common = ("--max-steps", 6, "--eval-rows", 2, "--max-new-tokens", 8, "--limit", 200)
    said = {
        "plain": cli("train", "--backend", "transformers", *common, "--output", "plain", cwd=place),
        "engine": cli("train", "--engine", *common, "--output", "engine", cwd=place),
        "packed": cli(
            "train", "--engine", "--packing", "--max-seq-length", 256, *common, "--output", "packed", cwd=place
        ),
    }
    return place, said


def test_a_run_learns_the_same(runs):
    place, said = runs
    plain, ours = losses(place / "plain"), losses(place / "engine")
    assert ours == pytest.approx(plain, rel=1e-3) and sum(ours) == pytest.approx(sum(plain), rel=1e-3)
    on = ("engine: base and adapter in one function, the MLP in one function, "
          "rows end to end, adapters in one tensor, logits of learned tokens; "
          "attention by one call a row\n")  # fmt: skip
    assert on in said["engine"].stderr and "engine:" not in said["plain"].stderr


def test_a_run_says_what_it_was(runs):
    import yaml

    place, _ = runs
    configs = [yaml.safe_load((place / name / "config.yaml").read_text()) for name in ("plain", "engine", "packed")]
    assert [c["engine"] for c in configs] == [False, True, True]
    assert {c["backend"] for c in configs} == {"transformers"}
    summary = json.loads((place / "engine" / "summary.json").read_text())
    assert summary["data"]["padding"] == 0 and summary["after"]["stops"] is not None


def test_a_packed_run_has_fuller_lines(runs):
    place, _ = runs
    whole = {name: json.loads((place / name / "summary.json").read_text())["data"] for name in ("engine", "packed")}
    assert whole["packed"]["epochs"] > 1.7 * whole["engine"]["epochs"]  # twice the rows in as many steps
    assert losses(place / "packed")[-1] < losses(place / "packed")[0]


def test_a_run_goes_on_with_its_engine(runs):
    place, _ = runs
    cli("train", "--config", "engine/config.yaml", "--save-steps", 3, "--output", "again", cwd=place)
    assert losses(place / "again") == losses(place / "engine")
    (place / "again" / "summary.json").unlink()
    newest = max((place / "again" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-")[-1]))
    wanted = (place / "again" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(newest)
    cli("train", "--resume", "again", cwd=place)
    assert (place / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == wanted


def test_what_the_command_line_refuses(tmp_path):
    said = cli("train", "--engine", "--backend", "unsloth", cwd=tmp_path, code=2).stderr
    assert "--engine and --backend unsloth are both given" in said
    said = cli("train", "--engine", "--lora-dropout", "0.1", cwd=tmp_path, code=2).stderr
    assert "--lora-dropout 0.1, and the engine supports only --lora-dropout 0;" in said and "--no-engine" in said
    said = cli("train", "--use-gradient-checkpointing", "selective", cwd=tmp_path, code=2).stderr
    assert "needs the engine: load the model with --engine" in said
    said = cli("train", "--packing", "--backend", "transformers", cwd=tmp_path, code=2).stderr
    assert "packing needs --engine" in said


def test_the_benchmark_measures_it(tmp_path):
    "benchmarks/gpu_training.py on a tiny shape: what it counts is what was trained."
    setting = {"size": "tiny", "rows": "short", "batch": 1, "masked": 0.25, "steps": 3, "skip": 1, "off": ["loss"]}
    done = processes.run_script(ROOT / "benchmarks/gpu_training.py", "--one", json.dumps([setting]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.split("RESULT ", 1)[1])
    assert found["engine"].startswith("base and adapter in one function, the MLP") and found["packing"]
    assert 0.7 < found["labelled_per_second"] / found["tokens_per_second"] < 0.76
    assert found["tokens_per_second"] * found["seconds_per_step"] > 0.9 * 2048  # lines are full


# --- between two steps, and layers that run again -------------------------------------------------------------------


@pytest.mark.parametrize("engine, reentrant", [
    (Engine(), False), (Engine(mlp=False), False), (Engine(selective=True), False),
    (Engine(checkpoint=False), False), (Engine(checkpoint=False), True),
])  # fmt: skip
def test_layers_that_run_again(engine, reentrant):
    "By the engine's own function and by torch's: the gradients of a model without checkpointing."
    plain, rows = peft_of(), some_rows()
    _, wanted = gradients(plain, rectangle(rows))
    model = peft_of()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert install_engine(model, engine).checkpoint == engine.checkpoint
    assert apart(gradients(model.train(), join_rows(rows))[1], wanted) < 1e-5
    remove_engine(model)
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before


def test_a_layer_that_runs_again_keeps_its_input_alone():
    from qlora_nb.engine.checkpointing import run_checkpointed

    kept, wide = [], torch.nn.Linear(4, 400)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = run_checkpointed(lambda t: torch.tanh(wide(t)).sum(-1), x)
    assert kept == [12]
    y.sum().backward()
    found, wide.weight.grad, x.grad = (x.grad, wide.weight.grad), None, None
    torch.tanh(wide(x)).sum().backward()
    assert all(map(torch.allclose, found, (x.grad, wide.weight.grad)))


def test_training_goes_through_the_engine_where_a_layer_runs_again():
    "The first time, without gradients, too: what is made again must be what was there."
    model, seen = peft_of(), []
    model.get_base_model().gradient_checkpointing_enable()
    install_engine(model)
    from qlora_nb.engine.passes import MLPFunction

    with patch.object(MLPFunction, "apply", lambda *a, old=MLPFunction.apply: seen.append(1) or old(*a)):
        gradients(model.train(), join_rows(some_rows()))
    assert len(seen) == 2 * model.config.num_hidden_layers


# --- layers that are replayed -----------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch):
    "Recordings on a CPU are the functions themselves: all but the graph is tried."
    from qlora_nb.engine import install

    monkeypatch.setattr(install, "REPLAY_DEVICES", ("cpu",))


def replayed(engine=WHOLE):
    model = peft_of()
    model.get_base_model().gradient_checkpointing_enable()
    assert install_engine(model, engine).replayed
    return model.train(), model.get_base_model().get_decoder().layers[0].qlora_nb.replay


@pytest.mark.parametrize("engine", [Engine(), Engine(mlp=False), Engine(selective=True), Engine(loss=False)])
def test_replayed_layers(on_a_cpu, engine):
    "One batch after the other, longer and shorter, gradients added up: as without checkpointing."
    plain, (model, replay) = peft_of(), replayed(engine)
    for rows in (some_rows()[:2], some_rows(), some_rows()[1:]):
        for one, batch in ((plain, rectangle(rows)), (model, join_rows(rows))):
            one(**batch, use_cache=False).loss.backward()
    wanted, found = ({n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (plain, model))
    assert apart(found, wanted) < 1e-5
    assert not replay.broken and {name for name, _ in replay.copied.made} == {"run", "run_back"}
    assert replay.copied.length == max(key[0] for _, key in replay.copied.made)
    remove_engine(model)
    assert not any("qlora_nb" in name for m in model.modules() for name in vars(m))


def test_a_layer_that_changed_runs_as_before(on_a_cpu):
    "A hook, somebody who waits for a gradient, another scaling: each is heard, and gradients are right."
    (model, replay), plain, rows = replayed(), peft_of(), some_rows()
    gradients(model, join_rows(rows))
    (first, second), outputs, heard = model.get_base_model().get_decoder().layers, [], []
    first.mlp.register_forward_hook(lambda m, a, out: outputs.append(out.abs().sum().item()))
    next(p for p in second.parameters() if p.requires_grad).register_hook(heard.append)
    assert apart(gradients(model, join_rows(rows))[1], gradients(plain, rectangle(rows))[1]) < 1e-5
    assert len(heard) == 1 and len(outputs) == 2
    assert abs(outputs[0] - outputs[1]) < 1e-3 * outputs[0]  # the second run is a whole one
    (model, replay), made = replayed(), []
    gradients(model, join_rows(rows))
    for one in (model, plain):
        one.get_base_model().get_decoder().layers[1].self_attn.q_proj.scaling["default"] *= 3
    with patch.dict(replay.copied.made, {key: lambda: made.append(1) for key in replay.copied.made}):
        gradients(model, join_rows(rows))
    assert len(made) == 2  # of the first layer alone
    assert apart(gradients(model, join_rows(rows))[1], gradients(plain, rectangle(rows))[1]) < 1e-5


def test_a_hook_stays_with_its_layer(on_a_cpu):
    "One that was there before anything was recorded, and changes what its layer gives."
    (model, replay), plain, rows, heard = replayed(), peft_of(), some_rows(), []

    def halve(module, args, output):
        heard.append(module)
        return output * 0.5

    handles = [one.get_base_model().get_decoder().layers[0].register_forward_hook(halve) for one in (model, plain)]
    assert apart(gradients(model, join_rows(rows))[1], gradients(plain, rectangle(rows))[1]) < 1e-5
    assert len(heard) == 3 and replay.copied  # twice here, once in the plain one; the other layer is replayed
    [handle.remove() for handle in handles]
    assert apart(gradients(model, join_rows(rows))[1], gradients(plain, rectangle(rows))[1]) < 1e-5


def test_frozen_weights_may_change_between_steps(on_a_cpu):
    (model, replay), plain, rows = replayed(), peft_of(), some_rows()
    gradients(model, join_rows(rows))
    for one in (model, plain):
        layer = one.get_base_model().get_decoder().layers[1]
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 3
        weight = layer.mlp.up_proj.get_base_layer().weight
        weight.quant_state.absmax = weight.quant_state.absmax * 2
    assert apart(gradients(model, join_rows(rows))[1], gradients(plain, rectangle(rows))[1]) < 1e-5
    assert replay.copied and not replay.broken
    model.double()
    assert gradients(model, join_rows(rows))[1] and not replay.broken  # another kind of weights: as before


@pytest.mark.parametrize("what", ["eps", "scaling", "quant_type"])
def test_constants_of_a_layer_are_not_anothers(on_a_cpu, what):
    model = peft_of()
    model.get_base_model().gradient_checkpointing_enable()
    layer = model.get_base_model().get_decoder().layers[1]
    if what == "eps":
        layer.input_layernorm.variance_epsilon = 1.0
    elif what == "scaling":
        layer.self_attn.scaling = 1.0
    else:
        layer.mlp.up_proj.get_base_layer().weight.quant_state.quant_type = "fp4"
    assert not install_engine(model).replayed


def test_hidden_states_are_not_filled_up(on_a_cpu):
    (model, _), rows = replayed(), some_rows()
    line = {name: value for name, value in join_rows(rows).items() if name not in ("labels", "learned")}
    found = model(**line, use_cache=False, output_hidden_states=True)
    assert {t.shape[1] for t in (*found.hidden_states, found.logits)} == {59}


def test_a_gradient_of_the_input_alone_is_refused():
    "It would add the weights' gradients in silence."
    from qlora_nb.engine.checkpointing import run_checkpointed

    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="need backward.. without inputs=, and not autograd.grad"):
        torch.autograd.grad(run_checkpointed(torch.nn.Linear(4, 4), x).sum(), x)


def test_parts_that_were_switched_off_stay_off(on_a_cpu):
    from qlora_nb.adapter import set_model_info
    from qlora_nb.preparation import set_checkpointing

    model, _ = replayed()
    set_model_info(model, backend="transformers", engine=True)
    install_engine(model, Engine(loss=False, offload=False))
    set_checkpointing(model, False)
    assert not engine_of(model).checkpoint and engine_of(model, wanted=True).checkpoint
    set_checkpointing(model, True)
    assert engine_of(model).checkpoint and engine_of(model).replayed and not engine_of(model).loss


def test_what_cannot_be_recorded_runs_as_before(on_a_cpu, capsys, monkeypatch):
    from qlora_nb.engine import replay as room

    (model, replay), rows = replayed(), some_rows()
    monkeypatch.setattr(room, "_recorded", lambda *a: 1 / 0)
    found = gradients(model, join_rows(rows))[1]
    assert "layers can't be replayed, they run as before: ZeroDivisionError" in capsys.readouterr().err
    assert replay.broken and replay.copied is None
    assert apart(found, gradients(peft_of().train(), rectangle(rows))[1]) < 1e-5


def test_layers_unlike_each_other_are_not_replayed(on_a_cpu):
    model = peft_of(lora={"layers_to_transform": [0]})
    model.get_base_model().gradient_checkpointing_enable()
    engine = install_engine(model)
    assert engine.checkpoint and not engine.replayed
    other, _ = replayed()
    assert not install_engine(other, Engine(dense=True)).replayed  # its copies would be copied
    assert not install_engine(other, Engine(attention=False)).replayed


def test_a_copy_of_a_replayed_model(on_a_cpu):
    (model, replay), rows = replayed(), some_rows()
    _, wanted = gradients(model, join_rows(rows))
    other = copy.deepcopy(model)
    assert apart(gradients(other, join_rows(rows))[1], wanted) < 1e-6
    release_recordings(model)
    assert replay.copied is None and not replay.weights  # nothing is held when training is over
    assert apart(gradients(model, join_rows(rows))[1], wanted) < 1e-6


def test_pieces_of_an_mlp():
    "Gradients of a quarter of the rows at a time are those of all rows at once."
    from qlora_nb.engine.layers import LayerTerm, thin_products
    from qlora_nb.engine.passes import PLAIN_PASSES, _mlp_back, _mlp_back_in_pieces

    chance = torch.Generator().manual_seed(0)
    some = functools.partial(torch.randn, generator=chance)
    gate, up, down = some(24, 8), some(24, 8), some(8, 24)
    weights = (gate, up, down)
    terms = [LayerTerm(lambda dtype, w=w: w, None, some(2, w.shape[1]), some(w.shape[0], 2), 0.5) for w in weights]
    rows, dy = some(23, 8), some(23, 8)
    whole = _mlp_back(rows, thin_products(rows, terms[:2]), terms, dy, PLAIN_PASSES, torch.float32, True)
    for least, want_x in ((1, True), (5, True), (9, False), (100, True)):
        parts = _mlp_back_in_pieces(
            rows, thin_products(rows, terms[:2]), terms, dy, PLAIN_PASSES, torch.float32, want_x, least
        )
        assert len(parts) == len(whole) == 16
        for place, (ours, theirs) in enumerate(zip(parts, whole)):
            missing = theirs is None or (place == 0 and not want_x)
            assert ours is None if missing else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def some_weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (256,), (40, 41), (1,))]


def test_a_flat_tensor_holds_the_weights():
    from qlora_nb.engine.layers import FlatAdapters

    weights, before = some_weights(), some_weights()
    adapters = FlatAdapters(weights)
    assert adapters.starts == [0, 256, 512, 2304, 2560] and adapters.flat.numel() == 2560
    assert all(map(torch.equal, weights, before)) and all(isinstance(w, torch.nn.Parameter) for w in weights)
    with torch.no_grad():
        adapters.flat += 1
    assert all(torch.equal(w, b + 1) for w, b in zip(weights, before))  # they are one memory
    for place, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, place + 1.0)
    adapters.gather()
    assert adapters.flat.grad.sum() == 15 * 1 + 256 * 2 + 1640 * 3 + 4
    adapters.drop()
    assert adapters.flat.grad is None
    weights[2].grad = None  # an optimizer would leave it alone
    with pytest.raises(UserError, match=r"shape \(40, 41\) got no gradient"):
        adapters.gather()


def test_weights_of_two_kinds_are_not_made_one():
    from qlora_nb.engine.layers import FlatAdapters

    weights = some_weights()
    weights[1].data = weights[1].data.bfloat16()
    with pytest.raises(UserError, match="differ in dtype or device .*bfloat16"):
        FlatAdapters(weights)


def test_a_weight_put_elsewhere_is_not_trained_in_silence():
    from qlora_nb.engine.layers import FlatAdapters

    weights = some_weights()
    adapters = FlatAdapters(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[1].data = weights[1].data.clone()
    with pytest.raises(UserError, match=r"a trained weight of shape \(256,\) was moved in the middle of a run"):
        adapters.gather()


def test_weights_are_cast_together():
    "One copy of all adapters in 16 bits gives what a copy of each gives, to the bit; gradients are as the weights are."
    from qlora_nb.engine.layers import _CASTS, FlatAdapters, _cast

    model, batch = peft_of(dtype=torch.bfloat16), join_rows(some_rows())
    install_engine(model)
    weights = trained_of(model)
    assert {w.dtype for w in weights} == {torch.float32}
    loss, wanted = gradients(model, batch)
    assert {w.grad.dtype for w in weights} == {torch.float32} and not _CASTS
    adapters = FlatAdapters(weights)
    for change in (0.0, 1.0):
        adapters.flat.data += change
        with adapters.cast_together(torch.bfloat16):
            copies = [_cast(w, torch.bfloat16) for w in weights]
            assert len({c.untyped_storage().data_ptr() for c in copies}) == 1
            assert all(torch.equal(c, w.detach().bfloat16()) for c, w in zip(copies, weights))
            assert _cast(weights[0], torch.float16).dtype == torch.float16
            found, ours = gradients(model, batch)
        assert not _CASTS
        if not change:
            assert found == loss and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert found != loss


def test_looked_up_once():
    from qlora_nb.engine.layers import cache_parameters

    model = peft_of()
    model.get_base_model().eval()  # a peft model says that it trains, whatever its base does
    assert model.training and not model.get_base_model().training
    wanted = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ZeroDivisionError), cache_parameters(model) as trained:
        assert all(m.training for m in model.modules())
        assert [id(p) for p in model.parameters()] == [id(p) for p in wanted] == [id(p) for p in trained]
        assert model.eval() is model and not any(m.training for m in model.modules())
        assert model.train() is model and all(m.training for m in model.modules())
        model.get_base_model().eval()  # as a callback may
        assert model.train() is model and all(m.training for m in model.modules())
        raise ZeroDivisionError
    assert not {"parameters", "train"} & set(vars(model)) and len(list(model.parameters())) > len(wanted)


def small_run(folder, engine, optim="adamw_torch", steps=3, prepare=None, resume=None):
    "A loop that has trained the embedded model on a few rows."
    from datasets import Dataset

    from qlora_nb.core import PROFILES
    from qlora_nb.loop import make_loop
    from qlora_nb.model import add_lora, load_model
    from qlora_nb.run import resolve_settings

    model, tokenizer = load_model(backend="transformers")
    model = add_lora(model)
    install_engine(model, engine)
    (prepare or (lambda model: None))(model)
    settings = {"max_steps": 4, "max_seq_length": 128, "save_steps": 2, "optim": optim, "weight_decay": 0.5}
    rows = Dataset.from_list(some_rows((9, 30, 64, 17) * 8))
    loop = make_loop(model, tokenizer, rows, resolve_settings(settings, profile=PROFILES["tiny"]), folder, [])
    loop.args.max_steps = steps
    loop.train(resume_from_checkpoint=resume)
    return loop, [p.detach() for p in trained_of(model)]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor"])
def test_a_run_with_its_adapters_in_one_tensor(tmp_path, optim):
    "The same weights to the bit; an optimizer that looks at a weight as a matrix gets matrices."
    (one, ours), (many, theirs) = (small_run(tmp_path / f"{flat}", Engine(flat=flat), optim) for flat in (True, False))
    few, all_ = (len(trainer.optimizer.param_groups[0]["params"]) for trainer in (one, many))
    assert few < all_ if optim != "adafactor" else few == all_
    assert all(map(torch.equal, ours, theirs))


def test_nobody_waits_for_bitsandbytes(tmp_path, monkeypatch):
    "While adapters are trained in one tensor, its optimizer asks us whether to wait; then, and elsewhere, itself."
    from bitsandbytes.optim import optimizer

    from qlora_nb.engine import forwards

    before, asked = optimizer.sync_gpu, []

    def note_call(tensor):
        asked.append((id(tensor), forwards._here.unpaged))

    monkeypatch.setattr(forwards, "wait_unless_queued", note_call)
    trainer, _ = small_run(tmp_path / "run", Engine(), "adamw_8bit")
    tensors = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(asked) == 3 * len(tensors) and set(asked) == {(id(p), True) for p in tensors}
    with pytest.raises(ZeroDivisionError), forwards.without_waiting():
        assert optimizer.sync_gpu is forwards.wait_unless_queued
        raise ZeroDivisionError
    assert optimizer.sync_gpu is before and not forwards._here.unpaged
    monkeypatch.delattr(optimizer, "sync_gpu")  # as in a version that doesn't wait
    with forwards.without_waiting():
        assert not hasattr(optimizer, "sync_gpu")
    monkeypatch.setattr(optimizer, "sync_gpu", before, raising=False)
    asked.clear()
    small_run(tmp_path / "other", Engine(flat=False), "adamw_8bit")
    assert not asked


@pytest.mark.parametrize("stream, here, waits", [
    ("default", True, False), ("another", True, True), ("default", False, True),
])  # fmt: skip
def test_work_in_another_stream_or_thread_is_waited_for(monkeypatch, stream, here, waits):
    from types import SimpleNamespace

    from bitsandbytes import utils

    from qlora_nb.engine import forwards

    asked = []
    monkeypatch.setattr(utils, "sync_gpu", asked.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    with forwards.without_waiting() if here else contextlib.nullcontext():
        forwards.wait_unless_queued(SimpleNamespace(is_cuda=True, device="cuda:0"))
        forwards.wait_unless_queued(torch.zeros(1))  # of another kind of device: as bitsandbytes does
    assert len(asked) == 1 + waits


def test_the_loop_casts_adapters_together(tmp_path, monkeypatch):
    "Once a batch; what the functions find there is what they compute with."
    from qlora_nb.engine import layers

    real, seen = layers.FlatAdapters.cast_together, []

    def counted(self, dtype):
        seen.append(dtype)
        return real(self, dtype)

    monkeypatch.setattr(layers.FlatAdapters, "cast_together", counted)
    small_run(tmp_path / "run", Engine())
    assert seen == [torch.float32] * len(seen) and len(seen) >= 3
    model, batch = peft_of(dtype=torch.bfloat16), join_rows(some_rows())
    install_engine(model)
    loss, _ = gradients(model, batch)
    adapters = layers.FlatAdapters(trained_of(model))
    with real(adapters, torch.bfloat16):
        for cast in layers._CASTS.values():
            cast.add_(1)
        assert abs(gradients(model, batch)[0] - loss) > 0.01  # without the casts: the same loss to the bit


@pytest.mark.parametrize("before", [True, False])
def test_a_stopped_run_goes_on_as_it_began(tmp_path, before):
    "In one tensor or each by itself: to the same weights, to the bit, as without a stop."
    _, whole = small_run(tmp_path / "whole", Engine(), steps=4)
    small_run(tmp_path / "stopped", Engine(flat=before), steps=2)
    trainer, ours = small_run(tmp_path / "stopped", Engine(), steps=4, resume=str(tmp_path / "stopped/checkpoint-2"))
    assert (trainer.flat is not None) is before and all(map(torch.equal, ours, whole))


def test_what_does_not_decay_alone_does_not_decay_in_one_tensor(tmp_path):
    def with_norms(model):
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad or "layernorm" in name)

    (one, ours), (_, theirs) = (
        small_run(tmp_path / f"{flat}", Engine(flat=flat), prepare=with_norms) for flat in (True, False))  # fmt: skip
    assert [group["weight_decay"] for group in one.optimizer.param_groups] == [0.5, 0.0]
    assert all(map(torch.equal, ours, theirs))


def test_layers_that_run_again_under_autocast():
    "What runs again must be what ran."
    rows, found = join_rows(some_rows()), []
    for checkpoint in (True, False):
        model = peft_of()
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert install_engine(model, Engine(checkpoint=checkpoint)).checkpoint == checkpoint
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**rows, use_cache=False).loss
        loss.backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    assert apart(*found) < 1e-5


def trained_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_a_line_of_arrays_is_a_line_of_lists():
    import numpy

    rows = some_rows()
    rows.append({"input_ids": [], "labels": [], "seq_lengths": None})
    arrays = [{name: value if value is None else numpy.array(value) for name, value in row.items()} for row in rows]
    for one, other in zip(join_rows(rows).values(), join_rows(arrays).values()):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_one_process_of_several(tmp_path):
    "torch's DistributedDataParallel sees each weight once, as the trainer sets it up."
    program = """
import torch
from qlora_nb.core import PROFILES
from qlora_nb.engine.install import engine_of
from qlora_nb.model import add_lora, load_model
from qlora_nb.run import resolve_settings
from qlora_nb.trainer import trainer_arguments
model = load_model(engine=True)[0]
model = add_lora(model, use_gradient_checkpointing=True)
assert engine_of(model).checkpoint
settings = resolve_settings({}, profile=PROFILES["tiny"])
arguments = trainer_arguments(settings, "/tmp", torch.float32, False, engine_of(model))
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
unused = arguments.ddp_find_unused_parameters
wrapped = torch.nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=unused)
ids = torch.arange(20)[None]
wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""
    done = processes.run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# --- private names of other libraries -------------------------------------------------------------------------------

# Outside of engine/forwards.py no private name of another library is changed but this.
EXCEPTIONS = {
    ("preparation.py", "_unsloth_gradient_checkpointing"): "Unsloth's own trainer asks for it, and has no other place",
}


def test_private_names_of_other_libraries_are_replaced_in_one_file():
    classes, found = package_classes(), {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[path.relative_to(PACKAGE).as_posix()] = private_overrides(path.read_text(encoding="utf-8"), classes)
    in_forwards = {name for _, name in found.pop("engine/forwards.py")}
    assert in_forwards == {name for name in LOOKED_UP if name.startswith("_")}
    assert {(file, name) for file, lines in found.items() for _, name in lines} == set(EXCEPTIONS), (
        "move what changes a private name to nbs/60_forwards.ipynb, tell it there, and look it up below"
    )


@pytest.mark.parametrize("name, source", [
    ("_a", "model._a = 1"), ("_a", "del model.config._a"), ("_a", "model._a += 1"), ("_a", "for model._a in x: pass"),
    ("_a", "with open(x) as model._a: pass"), ("_a", "import torch\ntorch.nn._a = 1"), ("__a", "model.__a = 1"),
    ("_a", "setattr(model, '_a', 1)"), ("_a", "delattr(model, '_a')"), ("_a", "object.__setattr__(model, '_a', 1)"),
    ("_a", "stack.callback(setattr, model, '_a', 1)"), ("_a", "def f(x):\n name = '_a'\n setattr(x, name, 1)"),
    ("_a", "for name in ('b', '_a'):\n setattr(model, name, 1)"), ("_a", "vars(model)['_a'] = 1"),
    ("_a", "def f(x):\n name = '_a'\n del vars(x)[name]"), ("_a", "model.__dict__['_a'] = 1"),
    ("_a", "vars(model).pop('_a', None)"), ("_a", "vars(model).update(_a=1)"), ("_a", "vars(model).update({'_a': 1})"),
    ("_a", "with temporary_attributes(model, b=2, _a=1): pass"), ("_a", "temporary_attributes(model, **{'_a': 1})"),
    ("_a", "restore_attributes([(model, '_a', None)])"), ("_a", "with patch.object(model, '_a', 1): pass"),
    ("_a", "plan.load_state_dict({**plan.state_dict(), '_a': 1})"), ("_a", "model._a['weight'] = 1"),
    ("_a", "model._a.clear()"), ("_a", "from torch import nn\nclass A(nn.Module):\n def _a(self): pass"),
    ("_a", "def f():\n import trl as t\n class A(t.SFTTrainer):\n  def _a(self): pass"),
    ("_a", "from torch.nn import Module\nclass A(Module):\n _a = 1"),
    ("_a", "class A(found()):\n async def _a(self): pass"),
    ("_a", "import torch\nclass A(torch.nn.Module): pass\nclass B(A):\n def _a(self): pass"),
    ("_a", "def f(Base):\n class A(Base):\n  def _a(self): pass"),
    ("_a", "import torch\nclass A(torch.nn.Module):\n def f(self): self._a = 1"),
    ("_a", "import torch\nclass A(torch.nn.Module): pass\nA._a = 1"),
    ("_a", "import peft\nclass A(peft.PeftModel):\n def f(self): setattr(self, '_a', 1)"),
    ("_a", "import torch\nA = type('A', (torch.nn.Module,), {'_a': f})"),
])  # fmt: skip
def test_a_change_of_a_private_name_is_seen(name, source):
    assert [found for _, found in private_overrides(source)] == [name]


@pytest.mark.parametrize("source", [
    "model.a = 1", "x = model._a", "f(model._a(1))", "getattr(model, '_a')", "vars(model).get('_a')",
    "rows._replace(a=1)", "model.__dict__ = {}", "setattr(model, 'a', '_a b')", "_a = 1",
    "vars(model)['a'] = model._a", "_here.a = 1",
    "class A:\n def f(self): self._a = 1", "class A:\n _a = 1\nA._a = 2", "class A:\n def _a(self): pass",
    "import io\nclass A(io.RawIOBase):\n def _a(self): pass", "class A(dict):\n def _a(self): self._a.clear()",
    "import torch\nclass A(torch.nn.Module):\n def __init__(self): self.a = 1",
    "import jinja2\nclass A(jinja2.ext.Extension):\n def _a(self): pass",
    "def f():\n name = '_a'\ndef g(x, name): setattr(x, name, 1)",
])  # fmt: skip
def test_what_changes_no_private_name_is_not(source):
    assert private_overrides(source) == []


# A name that engine/forwards.py replaces → its library, the versions in which it was looked up, and what was looked at.
LOOKED_UP = {
    "_attn_implementation": ("transformers", ["5.17.0"], "the forward of an attention, and masking_utils"),
    "_gradient_checkpointing_func": ("transformers", ["5.17.0"], "modeling_layers.GradientCheckpointingLayer"),
    "_is_accelerate_prepared": ("accelerate", ["1.15.0"], "Accelerator.prepare_model"),
    "sync_gpu": ("bitsandbytes", ["0.50.2"], "the steps of optim.optimizer, and utils.sync_gpu"),
}


def lines_with(name, *functions):
    "The lines of these functions' code that hold a name, without what surrounds it."
    found = [line.strip() for function in functions for line in inspect.getsource(function).splitlines()]
    return [line for line in found if name in line]


def code_that_reads(name):
    "Where the library asks for it, as nbs/60_forwards.ipynb says: (functions that must all do so, how)."
    import accelerate
    import transformers
    from bitsandbytes.optim import optimizer
    from transformers import masking_utils, modeling_layers

    modules = [importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in FAMILIES]
    attentions = [getattr(module, f"{f.title()}Attention") for module, f in zip(modules, FAMILIES, strict=True)]
    return {
        "_attn_implementation": [
            (f"self.config.{name}", *(attention.forward for attention in attentions)),
            (f"config.{name}", masking_utils.create_causal_mask),
            ("inspect.getsource", transformers.PreTrainedModel._can_set_attn_implementation),  # why not the public one
        ],
        "_gradient_checkpointing_func": [
            (f"return self.{name}(", modeling_layers.GradientCheckpointingLayer.__call__),
            (f'setattr(module, "{name}"', transformers.PreTrainedModel._set_gradient_checkpointing),
        ],
        "_is_accelerate_prepared": [(f'getattr(model, "{name}", False)', accelerate.Accelerator.prepare_model)],
        "sync_gpu": [(f"{name}(p)", optimizer.Optimizer8bit.step)],
    }[name]


@pytest.mark.parametrize("name", LOOKED_UP)
def test_private_names_are_where_they_were_looked_up(name):
    library, versions, places = LOOKED_UP[name]
    version = importlib.metadata.version(library)
    for words, *functions in code_that_reads(name):
        for function in functions:
            assert lines_with(words, function), f"{function.__qualname__} of {library} {version} has no `{words}`"
    assert version in versions, (
        f"{name} was looked up in {library} {', '.join(versions)}, and this is {version}: look at {places}, whether it "
        "is still read there as nbs/60_forwards.ipynb says, and add the version here"
    )


def test_names_that_are_replaced_have_the_values_that_the_libraries_put_there():
    "A model of each family, as transformers and peft leave it."
    from bitsandbytes import utils
    from bitsandbytes.optim import optimizer

    for family in FAMILIES:
        base = peft_of(family).get_base_model()
        base.gradient_checkpointing_enable()
        layers = base.get_decoder().layers
        assert base.config._attn_implementation == layers[0].self_attn.config._attn_implementation == "sdpa"
        assert all(callable(layer._gradient_checkpointing_func) for layer in layers)
    assert optimizer.sync_gpu is utils.sync_gpu
