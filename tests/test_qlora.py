"""The QLoRA layer: equal to the dense product and to bitsandbytes + peft, nothing large kept, mistakes named."""

import copy
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import NBS, examples
from torch import nn
from torch.nn import functional as F

from qlora_nb.core import UserError
from qlora_nb.nf4 import quantize_nf4
from qlora_nb.qlora import (
    NF4_PARTS,
    QLoRAFunction,
    QLoRALinear,
    count_kept_bytes,
    make_dequantizer,
    qlora_matmul,
    trace_saved_tensors,
)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Relative errors in the Frobenius norm. The largest among 2,500 random layers each, against float64 and against peft:
# fp32 2.9e-7 and 4.3e-7, bf16 5.0e-3 and 9.2e-3, fp16 7.2e-4 and 1.3e-3 (a rounding or two, on very few numbers).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
many = settings(max_examples=examples(300), deadline=None, derandomize=True)
sizes, even = st.integers(1, 40), st.integers(1, 40).map(lambda n: 2 * n)
# Where 16 divides a row and the blocksize doesn't, bitsandbytes' AVX512 kernel takes other blocks' constants (02_nf4).
widths = even.filter(lambda n: n % 16 or n % 64 == 0)


def apart(found, wanted):
    "Relative error in the Frobenius norm; absolute where nothing is wanted."
    difference = (found.double() - wanted.double()).norm().item()
    return difference / max(wanted.double().norm().item(), 1e-30) if difference else 0.0


def quantized(out_features, in_features, dtype=torch.float32, seed=0, **kwargs):
    return quantize_nf4(torch.randn(out_features, in_features, generator=torch.manual_seed(seed)).to(dtype), **kwargs)


def exact(x, dy, W, A, B, s, bias):
    "Output and gradients in float64, by autograd."
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    y = leaves[0] @ W.double().T + s * (leaves[0] @ leaves[1].T) @ leaves[2].T
    y = y if bias is None else y + bias.double()
    y.backward(dy.double())
    return [y.detach(), *(t.grad for t in leaves)]


# --- the product ----------------------------------------------------------------------------------------------------


@many
@given(data=st.data())
def test_product_and_gradients_equal_the_dense_ones(data):
    draw = data.draw
    out, width, r = draw(sizes), draw(sizes), draw(st.integers(1, 12))
    lead = draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    adapter = draw(st.sampled_from([dtype, torch.float32]))
    s, with_bias = draw(st.sampled_from([0.25, 1.0, 2.0, 0.7])), draw(st.booleans())
    how = {"blocksize": draw(st.sampled_from([32, 64])), "double_quant": draw(st.booleans())}
    weight = quantized(out, width, dtype, draw(st.integers(0, 99)), **how)
    x, dy = torch.randn(*lead, width).to(dtype), torch.randn(*lead, out).to(dtype)
    A, B = torch.randn(r, width).to(adapter) / width**0.5, torch.randn(out, r).to(adapter) / r**0.5
    bias = torch.randn(out).to(dtype) if with_bias else None
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = qlora_matmul(leaves[0], weight, bias, leaves[1], leaves[2], s)
    y.backward(dy)
    assert y.shape == dy.shape and y.dtype == dtype
    assert [t.grad.dtype for t in leaves] == [dtype, adapter, adapter]
    wanted = exact(x, dy, weight.dequantize(), A, B, s, bias)
    # Sums that cancel are small, their rounding is not: measured by the size of what is added.
    scale = [width**0.5, out**0.5, max(1, dy.numel() // out) ** 0.5 * out**0.5, max(1, dy.numel() // out) ** 0.5]
    for found, true, size in zip([y.detach(), *(t.grad for t in leaves)], wanted, scale):
        floor = size * true.numel() ** 0.5
        error = (found.double() - true).norm().item() / max(true.norm().item(), floor)
        assert error < TOLERANCE[dtype], (dtype, adapter, error)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
def test_gradcheck_in_float64(lead, adapter, bias):
    weight = quantized(6, 10)
    shapes = [(*lead, 10), (6,), (3, 10), (6, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x, b, A, B):
        return qlora_matmul(x, weight, b if bias else None, *((A, B) if adapter else (None, None)), 0.3)

    used = [inputs[0]] + ([inputs[1]] if bias else []) + (inputs[2:] if adapter else [])
    assert torch.autograd.gradcheck(lambda *_: run(*inputs), used)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_that_are_wanted(wanted):
    flags = [bool(wanted >> i & 1) for i in range(4)]  # x, bias, A, B
    calls = []
    W = torch.randn(6, 10)
    tensors = [torch.randn(s, requires_grad=f) for s, f in zip(((4, 10), (6,), (3, 10), (6, 3)), flags)]
    x, bias, A, B = tensors

    def dequantize(dtype):
        calls.append(dtype)
        return W.to(dtype)

    y, kept = trace_saved_tensors(lambda: qlora_matmul(x, dequantize, bias, A, B, 2.0), [A, B])
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == flags
    assert len(calls) == 1 + flags[0], "the weight is made again only for the gradient of x"
    assert count_kept_bytes(kept) == 4 * (4 * 10 * flags[2] + 4 * 3 * flags[3])


def test_inputs_of_any_layout():
    weight, A, B = quantized(6, 10), torch.randn(3, 10), torch.randn(6, 3)
    x = torch.randn(10, 4, 5).permute(2, 1, 0)  # not contiguous
    dense = weight.dequantize() + 2.0 * B @ A
    torch.testing.assert_close(qlora_matmul(x, weight, None, A, B, 2.0), x @ dense.T)
    empty = torch.randn(0, 10, requires_grad=True)
    y = qlora_matmul(empty, weight, None, A, B, 2.0)
    y.sum().backward()
    assert y.shape == (0, 6) and empty.grad.shape == (0, 10)
    x = torch.randn(4, 10, requires_grad=True)
    y = qlora_matmul(x, weight, None, A, B, 2.0)
    y.sum().backward()  # its gradient is expanded, not contiguous
    torch.testing.assert_close(x.grad, dense.sum(0).expand(4, -1))


def test_no_second_derivatives():
    x = torch.randn(4, 10, requires_grad=True)
    y = qlora_matmul(x, quantized(6, 10), None, torch.randn(3, 10), torch.randn(6, 3))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_autocast_multiplies_in_16_bits_and_gives_gradients_in_32():
    weight, x = quantized(16, 32), torch.randn(4, 32, requires_grad=True)
    A, B = torch.randn(4, 32, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qlora_matmul(x, weight, torch.randn(16), A, B, 1.0)
        y.float().sum().backward()  # a backward inside the context must not cast again
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, A, B)} == {torch.float32}


def test_checkpointed_gradients_are_the_same():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer, x = QLoRALinear(nn.Linear(16, 8), r=2), torch.randn(3, 16, requires_grad=True)
    nn.init.normal_(layer.lora_B)
    found = []
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=False)):
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
        run(x).square().sum().backward()
        found.append([t.clone() for t in (x.grad, layer.lora_A.grad, layer.lora_B.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_weight_of_any_kind():
    import bitsandbytes as bnb

    dense = torch.randn(32, 64).to(torch.bfloat16)
    ours, theirs = quantize_nf4(dense), bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4").to("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(make_dequantizer(ours)(dtype), make_dequantizer(theirs)(dtype))
        assert make_dequantizer(ours)(dtype).dtype == dtype
    assert torch.equal(make_dequantizer(dense)(torch.float32), dense.float())
    assert make_dequantizer(len) is len
    theirs.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="repacked by bitsandbytes"):
        make_dequantizer(theirs)
    for wrong in ("weight", None, nn.Linear(2, 2), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(UserError, match="give an NF4Weight"):
            make_dequantizer(wrong)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_and_its_narrow_product_are_all_that_is_kept(dtype):
    n, width, out, r = 7, 128, 256, 4
    layer = QLoRALinear(nn.Linear(width, out).to(dtype), r=r).to(dtype)
    x = torch.randn(n, width, dtype=dtype, requires_grad=True)
    y, kept = trace_saved_tensors(lambda: layer(x), [*layer.parameters(), *layer.buffers()])
    assert count_kept_bytes(kept) == dtype.itemsize * n * (width + r)
    assert max(t.numel() for t in kept) < width * out
    node = y.grad_fn if isinstance(y.grad_fn, QLoRAFunction._backward_cls) else y.grad_fn.next_functions[0][0]
    held = [value for value in vars(node).values() if torch.is_tensor(value)]
    assert held == [], "a tensor is hidden in the context"


def test_kept_blocks_are_counted_once():
    x = torch.randn(8, 8, requires_grad=True)
    _, kept = trace_saved_tensors(lambda: (x * x).sum() + (x[0] * x[1]).sum())
    assert count_kept_bytes(kept) == 8 * 8 * 4
    _, kept = trace_saved_tensors(lambda: (x * x).sum(), own=[x])
    assert kept == []


# --- the module -----------------------------------------------------------------------------------------------------


def peft_layer(dense, r, alpha, dtype, dropout=0.0, rslora=False):
    "The same weight as bitsandbytes' Linear4bit with peft's adapter."
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    out, width = dense.weight.shape
    base = bnb.nn.Linear4bit(width, out, bias=dense.bias is not None, compute_dtype=dtype, quant_type="nf4")
    weight = dense.weight.data.clone()
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base).to("cpu")
    base.bias = copy.deepcopy(dense.bias)
    base.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    return Linear4bit(base.requires_grad_(False), "default", config, r=r, lora_alpha=alpha).train()


@many
@given(data=st.data())
def test_equal_to_bitsandbytes_and_peft(data):
    draw = data.draw
    out, width = draw(even), draw(widths)  # an odd width is compiled by bitsandbytes, a second a shape
    r, alpha = draw(st.integers(1, min(out, width))), draw(st.sampled_from([1, 8, 16, 64]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    adapter = draw(st.sampled_from([dtype, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 999)))
    dense = nn.Linear(width, out, bias=draw(st.booleans())).to(dtype)
    rslora = draw(st.booleans())
    theirs = peft_layer(dense, r, alpha, dtype, rslora=rslora)
    ours = QLoRALinear(dense, r=r, lora_alpha=alpha, use_rslora=rslora, compute_dtype=dtype)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    nn.init.normal_(B, std=0.1)
    theirs.lora_A.to(adapter), theirs.lora_B.to(adapter)
    with torch.no_grad():
        ours.lora_A.data, ours.lora_B.data = A.detach().clone(), B.detach().clone()
    assert ours.scaling == theirs.scaling["default"]
    assert torch.equal(ours.packed, theirs.base_layer.weight.data)
    x, dy = torch.randn(2, 3, width).to(dtype), torch.randn(2, 3, out).to(dtype)
    found = []
    for layer, parameters in ((ours, (ours.lora_A, ours.lora_B)), (theirs, (A, B))):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append([y.detach(), leaf.grad, *(p.grad for p in parameters)])
    for name, mine, other in zip(("y", "x", "A", "B"), *found):
        assert mine.dtype == other.dtype
        assert apart(mine, other) < TOLERANCE[dtype], (name, dtype, adapter, apart(mine, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_takes_over_a_layer_of_bitsandbytes(dtype, nested):
    import bitsandbytes as bnb

    def quantized_layer(kind):
        layer = bnb.nn.Linear4bit(64, 96, bias=True, quant_type=kind)
        weight, kwargs = torch.randn(96, 64).to(dtype), {"quant_type": kind, "compress_statistics": nested}
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **kwargs).to("cpu")
        return layer

    theirs = quantized_layer("nf4")
    ours = QLoRALinear(theirs, r=4)
    assert torch.equal(ours.weight.dequantize(), make_dequantizer(theirs.weight)(dtype))
    assert ours.weight.dequantize().dtype == dtype and torch.equal(ours.bias, theirs.bias)
    with pytest.raises(UserError, match="weight is in fp4"):
        QLoRALinear(quantized_layer("fp4"), r=4)
    theirs.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="weight is repacked"):
        QLoRALinear(theirs, r=4)


def test_starts_like_peft_and_like_its_quantized_base():
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    dense, x = nn.Linear(64, 32), torch.randn(3, 64)
    base = peft_layer(dense, 1, 1, torch.float32).base_layer
    torch.manual_seed(5)
    theirs = Linear4bit(base, "default", LoraConfig(r=4), r=4, lora_alpha=8)
    torch.manual_seed(5)
    ours = QLoRALinear(dense, r=4, lora_alpha=8)
    assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(ours(x), F.linear(x, ours.weight.dequantize(), dense.bias))
    assert ours.lora_B.abs().max() == 0


def test_dropout_acts_on_the_adapter_alone():
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    ours, theirs = QLoRALinear(dense, r=4, lora_dropout=0.4), peft_layer(dense, 4, 16, torch.float32, dropout=0.4)
    nn.init.normal_(ours.lora_B)
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = ours.lora_A.data, ours.lora_B.data
    found = []
    x = torch.randn(5, 64)
    for layer in (ours, theirs):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    without = QLoRALinear(dense, r=4)
    without.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), without(x))  # in evaluation one product, nothing dropped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_the_scales(dtype):
    layer = QLoRALinear(nn.Linear(64, 32), r=4)
    before, weight = {part: getattr(layer, part) for part in NF4_PARTS}, layer.weight.dequantize()
    layer = nn.Sequential(layer).to(dtype)[0]
    for part, old in before.items():
        assert torch.equal(getattr(layer, part), old) and getattr(layer, part).dtype == old.dtype
    assert torch.equal(layer.weight.dequantize(), weight)
    assert layer.lora_A.dtype == layer.bias.dtype == dtype
    assert layer.to("meta").packed.is_meta


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_copy_and_save(double_quant, tmp_path):
    layer, x = QLoRALinear(nn.Linear(64, 32), r=4, double_quant=double_quant), torch.randn(3, 64)
    nn.init.normal_(layer.lora_B)
    fresh = QLoRALinear(nn.Linear(64, 32), r=4, double_quant=double_quant)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert {"lora_A", "lora_B", "packed", "absmax", "code", "bias"} <= set(layer.state_dict())
    assert ("absmax2" in layer.state_dict()) == double_quant
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]


def test_only_the_adapter_learns():
    torch.manual_seed(0)
    layer, x = QLoRALinear(nn.Linear(32, 16), r=4), torch.randn(64, 32)
    target = x @ (layer.weight.dequantize() + torch.randn(16, 2) @ torch.randn(2, 32) / 4).T + layer.bias
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.03), []
    for _ in range(150):
        losses.append(F.mse_loss(layer(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.02 * losses[0]
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_a_bias_of_another_dtype_is_cast():
    dense, x = nn.Linear(64, 32).to(torch.bfloat16), torch.randn(3, 64)
    layer = QLoRALinear(dense, r=4, lora_dropout=0.2)  # trained with dropout, and called with fp32
    wanted = F.linear(x, layer.weight.dequantize().float(), dense.bias.float())
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.eval()(x), wanted)


def test_compute_dtype_is_that_of_the_base_product():
    layer, x = QLoRALinear(nn.Linear(64, 32), r=4, compute_dtype=torch.bfloat16), torch.randn(3, 64)
    seen, dense = [], layer.weight.dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_nb.qlora.make_dequantizer", lambda _: lambda dtype: seen.append(dtype) or dense.to(dtype))
        y = layer(x)
    assert (seen, y.dtype) == ([torch.bfloat16], torch.float32)


# --- mistakes -------------------------------------------------------------------------------------------------------

broken = nn.Linear(64, 32)
broken.weight.data[1, 2] = float("inf")


def empty_linear():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Linear(64, 0)


@pytest.mark.parametrize(
    "base, kwargs, message",
    [
        (nn.Linear(64, 32), {"r": 0}, "r is 0: .* at least 1"),
        (nn.Linear(64, 32), {"r": 33}, "r is 33, .* 32 rows or columns"),
        (nn.Linear(64, 32), {"r": 4.0}, "r is 4.0"),
        (nn.Linear(64, 32), {"r": True}, "r is True"),
        (nn.Linear(64, 32), {"r": 4, "lora_alpha": 0}, "lora_alpha is 0"),
        (nn.Linear(64, 32), {"r": 4, "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        (nn.Linear(64, 32), {"r": 4, "blocksize": 100}, "blocksize=100: choose one of 32, 64"),
        (nn.Linear(64, 32), {"r": 4, "compute_dtype": torch.int8}, "compute_dtype is torch.int8"),
        (nn.Linear(64, 32), {"r": 4, "compute_dtype": "bfloat16"}, "compute_dtype is 'bfloat16'"),
        (nn.Linear(64, 32), {"r": 4, "bias": torch.zeros(32)}, "bias was given with a layer"),
        (nn.Linear(64, 32, dtype=torch.float64), {"r": 4}, "torch.float64"),
        (nn.Embedding(64, 32), {"r": 4}, "base is a Embedding: give an nn.Linear"),
        (torch.randn(64, 32), {"r": 4}, "base is a Tensor"),
        (empty_linear(), {"r": 4}, "empty weight"),
        (broken, {"r": 4}, "NaN or infinite"),
        (QLoRALinear(nn.Linear(64, 32), r=4), {"r": 4}, "has an adapter already"),
        (quantize_nf4(torch.randn(64)), {"r": 4}, r"NF4Weight of shape \(64,\)"),
        (quantize_nf4(torch.randn(32, 64)), {"r": 4, "bias": torch.zeros(64)}, r"bias is \(64,\), but .* 32 rows"),
    ],
)
def test_mistakes_in_a_layer(base, kwargs, message):
    with pytest.raises(UserError, match=message):
        QLoRALinear(base, **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 63)}, "x is .2, 63., but the layer takes 64"),
        ({"x": torch.zeros(2, 64, dtype=torch.long)}, "x is torch.int64"),
        ({"x": [1.0]}, "x is list"),
        ({"lora_B": None}, "only one of lora_A and lora_B"),
        ({"lora_B": torch.randn(32, 5)}, "must be .r, in. and .out, r."),
        ({"weight": "nf4"}, "weight is a str"),
        ({"x": torch.randn(2, 63), "lora_A": None, "lora_B": None}, "takes 64 inputs"),
        ({"lora_B": torch.randn(30, 4)}, "lora_B .30, 4., but the weight is .32, 64."),
        ({"x": torch.randn(2, 60), "lora_A": torch.randn(4, 60)}, "lora_A is .4, 60. .* but the weight is .32, 64."),
        ({"lora_A": torch.randn(64)}, "must be .r, in. and .out, r."),
        ({"bias": torch.zeros(64)}, "bias is .64,., but the weight has 32 rows"),
        ({"weight": torch.randn(32)}, "weight is of shape .32,.: a layer needs a matrix"),
    ],
)
def test_mistakes_in_a_product(change, message):
    right = {
        "x": torch.randn(2, 64),
        "weight": quantized(32, 64),
        "lora_A": torch.randn(4, 64),
        "lora_B": torch.randn(32, 4),
    }
    qlora_matmul(**right)
    with pytest.raises(UserError, match=message):
        qlora_matmul(**{**right, **change})


# --- what was measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpointing", "paged", "qlora_layer"])
def test_result_files_come_from_a_gpu(name):
    found = json.loads(Path(NBS, "results", f"{name}.json").read_text(encoding="utf-8"))
    assert set(found) >= {"gpu", "versions", "date", "command", "runs"} and found["runs"]
    assert not found.get("dry_run"), f"{name}.json was made up to build the page: replace it by a measurement"
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(found["versions"])
