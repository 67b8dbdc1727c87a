"""The engine with its kernels on a CPU, interpreted: test_kernels.py runs this file in a process of its own.

Triton reads TRITON_INTERPRET=1 when it is imported.
"""

from unittest.mock import patch

import pytest
import torch
from test_engine import FAMILIES, gradients, peft_of, rectangle, same, some_rows

from qlora_nb import kernels
from qlora_nb.engine import install, loss, passes
from qlora_nb.engine.install import Engine, engine_of, install_engine, remove_engine
from qlora_nb.engine.line import join_rows


@pytest.fixture
def interpreted(monkeypatch):
    "An engine that takes the kernels on a CPU."
    for room in (passes, loss):
        monkeypatch.setattr(room, "FUSED_DEVICES", ("cpu",))
    passes.choose_passes.cache_clear()
    yield kernels
    passes.choose_passes.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_peft(interpreted, family):
    model = peft_of(family)
    same(model, within=2e-5)
    assert engine_of(model).compiled


@pytest.mark.parametrize(
    "on",
    [Engine(selective=True), Engine(mlp=False), Engine(loss=False), Engine(mlp=False, loss=False),
     Engine(compiled=False), Engine(adapters=False), Engine(attention=False)],
)  # fmt: skip
def test_parts_with_and_without_them(interpreted, on):
    same(peft_of(), on, within=2e-5)


def test_ranks_that_differ_and_one_that_is_too_large(interpreted):
    same(peft_of(lora={"rank_pattern": {"gate_proj": 3, "up_proj": 20}}), within=2e-5)
    with patch.object(passes, "MLPFunction", wraps=passes.MLPFunction) as function:
        same(peft_of(lora={"rank_pattern": {"up_proj": 65}}), within=2e-5)
        assert function.apply.called
        assert all(call.args[2] is not passes.PLAIN_PASSES for call in function.apply.call_args_list)
        function.apply.reset_mock()
        same(peft_of(lora={"rank_pattern": {"up_proj": passes.LARGEST_RANK + 1}}), within=2e-5)
    assert all(call.args[2] is passes.PLAIN_PASSES for call in function.apply.call_args_list) and function.apply.called


def test_layers_that_run_again(interpreted, monkeypatch):
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(install, "REPLAY_DEVICES", devices)
        model = peft_of()
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        same(model, within=2e-5)
        on = engine_of(model)
        assert on.checkpoint and on.compiled and on.replayed == bool(devices)


def test_in_16_bits_and_under_autocast(interpreted):
    _, wanted = gradients(peft_of(), rectangle(some_rows()))

    def apart(found):
        return max(((found[name] - g).norm() / g.norm()).item() for name, g in wanted.items())

    errors = []
    for parts in ({}, {"compiled": False}):
        model = peft_of(dtype=torch.bfloat16)
        install_engine(model, Engine(**parts))
        errors.append(apart(gradients(model, join_rows(some_rows()))[1]))
        model = peft_of()
        install_engine(model, Engine(**parts))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**join_rows(some_rows()), use_cache=False).loss
        loss.backward()
        errors.append(apart({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert all(0 < with_kernels < 1.5 * without for with_kernels, without in zip(errors[:2], errors[2:]))


def test_norms_that_somebody_needs_run_as_they_stand(interpreted):
    "A hook on one, and one that is trained: both get what they would get."
    model, heard = peft_of(), []
    first = model.get_base_model().model.layers[0]
    first.input_layernorm.register_forward_hook(lambda *args: heard.append(1))
    same(model, within=2e-5)
    assert heard and "forward" in vars(first)
    remove_engine(model)
    assert "forward" not in vars(first)
    model = peft_of()
    weight = model.get_base_model().model.layers[1].post_attention_layernorm.weight.requires_grad_()
    same(model, within=2e-5)
    assert weight.grad is not None


def test_no_gradients_no_kernels(interpreted):
    "Generating and evaluating is the model's own."
    model = peft_of()
    rows = rectangle(some_rows())
    with torch.no_grad():
        before = model(input_ids=rows["input_ids"]).logits
        install_engine(model)
        with patch.object(kernels, "_add_norm", None), patch.object(kernels, "_swiglu", None):
            assert torch.equal(model(input_ids=rows["input_ids"]).logits, before)


def test_wrong_kernels_are_not_taken(interpreted, capsys, monkeypatch):
    monkeypatch.setattr(interpreted, "fused_swiglu", lambda gate, *rest: gate)
    model = peft_of()
    same(model)
    assert not engine_of(model).compiled
    assert "passes over memory aren't fused on cpu for rank 16: their results are wrong" in capsys.readouterr().err
