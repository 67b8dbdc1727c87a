"""NF4 bit for bit as bitsandbytes 0.50.2 has it on a CPU, and what is refused."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_nb.core import UserError
from qlora_nb.nf4 import BLOCKSIZES, CODE8, DTYPES, NF4_CODE, fake_quantize, quantize_nf4

pytestmark = pytest.mark.quick

KINDS = ("normal", "uniform", "constant", "zeros", "sparse", "heavy", "huge", "tiny", "mixed")


@pytest.fixture(autouse=True, scope="module")
def no_compiler():
    "bitsandbytes compiles its way around odd shapes: the same values, a second a shape."
    before, torch._dynamo.config.disable = torch._dynamo.config.disable, True
    yield
    torch._dynamo.config.disable = before


def numbers(kind, shape, seed):
    "A weight of the given kind in fp32."
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    return {
        "normal": normal * 0.02,
        "uniform": 2 * uniform - 1,
        "constant": torch.full(shape, 0.5 - seed % 2),
        "zeros": torch.zeros(shape),
        "sparse": torch.where(uniform < 0.9, 0.0, normal),
        "heavy": normal / (uniform + 1e-3),
        "huge": normal.clamp(-4, 4) * 1e4,
        "tiny": normal * 1e-42,
        "mixed": normal * 10 ** (uniform * 50 - 45),
    }[kind]


def assert_same(weight, blocksize, double_quant):
    "Bytes, constants of both levels and dequantized values are those of bitsandbytes."
    import bitsandbytes.functional as bnb

    ours = quantize_nf4(weight, blocksize, double_quant)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
    assert ours.packed.shape == ((weight.numel() + 1) // 2, 1) and torch.equal(ours.packed, packed)
    assert ours.absmax.dtype == state.absmax.dtype and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.code, state.code)
    if double_quant:
        assert torch.equal(ours.offset, state.offset) and torch.equal(ours.absmax2, state.state2.absmax)
        assert torch.equal(ours.code2, state.state2.code)
    else:
        assert ours.offset is None and ours.absmax2 is None and ours.code2 is None
    restored = ours.dequantize()
    assert restored.shape == weight.shape and restored.dtype == weight.dtype
    assert torch.equal(restored, bnb.dequantize_4bit(packed, state).view(weight.shape))


shapes = st.one_of(
    st.tuples(st.integers(1, 700)),
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    # bitsandbytes transposes what fits one byte, which it can't do in three dimensions
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(3, 33)),
    st.just((130, 257)),
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_bit_for_bit(shape, kind, dtype, blocksize, double_quant, seed):
    weight = numbers(kind, shape, seed)
    if dtype == torch.float16:
        weight = weight.clamp(-65504, 65504)
    assert_same(weight.to(dtype), blocksize, double_quant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_chunk(dtype):
    "Weights are worked through 2^19 at a time: the seams must not show."
    assert_same(torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)).to(dtype), 64, True)


def test_on_the_boundaries():
    "The midpoints themselves, and the fp32 numbers beside them."
    middle = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    up, down = middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))
    for scale in (1.0, 0.3, 7.7e-5):
        block = torch.cat([middle, up, down, NF4_CODE, torch.ones(3)]) * scale
        assert_same(block.repeat(3)[: 64 * 3], 64, False)


def test_not_contiguous_and_trained():
    weight = torch.randn(64, 96).T.requires_grad_()
    assert_same(weight.detach(), 64, True)
    assert not quantize_nf4(weight).dequantize().requires_grad


def test_the_codes_are_bitsandbytes():
    import bitsandbytes.functional as bnb

    assert torch.equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(CODE8, bnb.create_dynamic_map())


def test_bits_counted():
    weight = torch.randn(1024, 1024)
    assert quantize_nf4(weight, double_quant=False).bits_per_param == 4.5
    assert quantize_nf4(weight).bits_per_param == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_an_overflowing_mean_is_said():
    with pytest.warns(UserWarning, match="overflows"):
        found = quantize_nf4(torch.full((64 * 5,), 3e38))
    assert found.offset.isinf()


@pytest.mark.parametrize(
    "weight, arguments, message",
    [
        ([1.0, 2.0], {}, "weight is a list"),
        (torch.zeros(0), {}, "weight is empty"),
        (torch.zeros(3, 0), {}, r"\(3, 0\)"),
        (torch.ones(3, dtype=torch.int8), {}, "torch.int8"),
        (torch.ones(3, dtype=torch.float64), {}, "torch.float64"),
        (torch.tensor([[0.0, float("nan")]]), {}, r"nan at \(0, 1\)"),
        (torch.cat([torch.ones(100), torch.tensor([float("inf")])]), {}, r"inf at \(100,\)"),
        (torch.ones(3), {"blocksize": 48}, "blocksize=48"),
        (torch.ones(3), {"blocksize": 0}, "blocksize=0"),
        (torch.ones(3), {"blocksize": 64.0}, "blocksize=64.0"),
        (torch.ones(3), {"blocksize": True}, "blocksize=True"),
    ],
)
def test_refused(weight, arguments, message):
    with pytest.raises(UserError, match=message):
        quantize_nf4(weight, **arguments)


@pytest.mark.parametrize("place", [0, 70, 600_000, 1_100_000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_found_in_any_block(value, place):
    weight = torch.ones(1_100_001)
    weight[place] = value
    with pytest.raises(UserError, match=rf"{value} at \({place},\), and 1 such"):
        quantize_nf4(weight)


def test_other_refusals():
    with pytest.raises(UserError, match="torch.int8"):
        quantize_nf4(torch.ones(3)).dequantize(torch.int8)
    with pytest.raises(UserError, match="kind='nf3'"):
        fake_quantize(torch.ones(3), "nf3")
