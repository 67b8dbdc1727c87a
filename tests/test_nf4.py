"""NF4 bit for bit as bitsandbytes 0.50.2 has it on a CPU, and what is refused."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repository import examples

from qlora_nb.core import UserError
from qlora_nb.nf4 import (
    CODE8,
    KNOWN_BLOCKSIZES,
    NF4_CODE,
    NF4_DTYPES,
    _grid8,
    _quantize_constants,
    create_normal_float_code,
    fake_quantize,
    quantize_nf4,
)

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


def their_values(packed, state):
    """bitsandbytes' dequantized weight, as one long row: where rows are no whole number of blocks, its AVX512
    kernel takes constants of other blocks (02_nf4, "Where it differs")."""
    import bitsandbytes.functional as bnb

    row = copy.copy(state)
    row.shape = torch.Size((state.shape.numel(),))
    return bnb.dequantize_4bit(packed, row).view(state.shape)


def flushed(values, exact):
    "With zeros where AVX512-BF16's conversion makes them: for subnormal numbers. Elsewhere the values themselves."
    import bitsandbytes.functional as bnb

    if values.dtype != torch.bfloat16 or not bnb.has_avx512bf16():
        return values
    return values.masked_fill(exact.abs() < torch.finfo(torch.float32).tiny, 0)


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
    exact = ours.dequantize(torch.float32)
    assert torch.equal(flushed(restored, exact), flushed(their_values(packed, state), exact))


shapes = st.one_of(
    st.tuples(st.integers(1, 700)),
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    # bitsandbytes transposes what fits one byte, which it can't do in three dimensions
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(3, 33)),
    st.just((130, 257)),
)


@settings(max_examples=examples(400), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(NF4_DTYPES),
    blocksize=st.sampled_from(KNOWN_BLOCKSIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_bit_for_bit(shape, kind, dtype, blocksize, double_quant, seed):
    weight = numbers(kind, shape, seed)
    if dtype == torch.float16:
        weight = weight.clamp(-65504, 65504)
    assert_same(weight.to(dtype), blocksize, double_quant)


@pytest.mark.parametrize("dtype", NF4_DTYPES, ids=str)
def test_more_than_one_chunk(dtype):
    "Weights are worked through 2^19 at a time: the seams must not show."
    assert_same(torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)).to(dtype), 64, True)


def test_rows_of_whole_blocks_are_the_same_without_detour():
    import bitsandbytes.functional as bnb

    for shape in ((48, 128), (3, 5, 64), (64, 34), (640,)):  # 34 has the slow kernel everywhere
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(quantize_nf4(weight).dequantize(), bnb.dequantize_4bit(packed, state).view(shape))


def test_subnormal_numbers_are_kept():
    weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 1e-38).to(torch.bfloat16)
    assert_same(weight, 64, False)
    found = quantize_nf4(weight, double_quant=False).dequantize().double()
    assert (found - weight.double()).norm() < 0.15 * weight.double().norm()


def test_on_the_boundaries():
    "The midpoints themselves, and the fp32 numbers beside them."
    middle = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    up, down = middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))
    for scale in (1.0, 0.3, 7.7e-5):
        block = torch.cat([middle, up, down, NF4_CODE, torch.ones(3)]) * scale
        assert_same(block.repeat(3)[: 64 * 3], 64, False)


def test_a_last_block_on_the_boundaries():
    "It is divided by its largest, where a full block is multiplied by the inverse: that decides at a boundary."
    middle = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), torch.ones(1)])
    for scale in torch.rand(300, generator=torch.Generator().manual_seed(0)):
        assert_same(near * scale, 64, False)


def test_second_level_on_the_boundaries():
    "Numbers next to where the index of the 8-bit map changes, against bitsandbytes' own quantizer."
    import bitsandbytes.functional as bnb

    grid = _grid8(torch.device("cpu")).int()
    change = grid.diff().nonzero().squeeze(1).double() + 0.5  # between two points of the grid
    at = (change * 2 / 65535 - 1).float()
    values = [at]
    for direction in (2.0, -2.0):
        step = at
        for _ in range(12):
            step = step.nextafter(torch.tensor(direction))
            values.append(step)
    blocks = torch.stack(values)  # one block a row; its largest is 1
    blocks = torch.nn.functional.pad(blocks, (0, 256 - blocks.shape[1]), value=1.0).clamp(-1, 1)
    packed, state = bnb.quantize_blockwise(blocks.flatten(), code=CODE8.clone(), blocksize=256)
    index, absmax2 = _quantize_constants(blocks.flatten())
    assert blocks.shape == (25, 256) and len(index.unique()) > 240
    assert torch.equal(index, packed) and torch.equal(absmax2, state.absmax)


def test_not_contiguous_and_trained():
    weight = torch.randn(64, 96).T.requires_grad_()
    assert_same(weight.detach(), 64, True)
    assert_same(torch.randn(1001)[::2], 64, True)
    assert_same(torch.ones(1).expand(300), 64, True)
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
        (torch.ones(3, device="meta"), {}, "on the meta device"),
        (torch.eye(3).to_sparse(), {}, "stored as torch.sparse_coo"),
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
    for kind in ("nf3", 4, ["nf4"]):
        with pytest.raises(UserError, match="choose one of nf4, fp4, int4, int4_asymmetric"):
            fake_quantize(torch.ones(3), kind)
    for weight, blocksize, message in [
        (torch.ones(3), 0, "blocksize=0"),
        (torch.zeros(0), 64, "weight is empty"),
        (torch.ones(3, dtype=torch.int8), 64, "torch.int8"),
        (torch.tensor([1.0, float("nan")]), 64, r"nan at \(1,\)"),
    ]:
        with pytest.raises(UserError, match=message):
            fake_quantize(weight, "int4", blocksize)
    for ends in (0.5, 1.0, float("nan")):
        with pytest.raises(UserError, match="ends="):
            create_normal_float_code(ends)


def test_fake_quantize_is_quantize():
    weight = torch.randn(77, 31, generator=torch.Generator().manual_seed(0))
    for blocksize in KNOWN_BLOCKSIZES:
        exact = quantize_nf4(weight, blocksize, double_quant=False).dequantize()
        torch.testing.assert_close(fake_quantize(weight, "nf4", blocksize), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_look_up(threads, dtype):
    "One thread takes another path than several: more than a chunk of weights, and a last block that is not full."
    import bitsandbytes.functional as bnb

    before, weight = torch.get_num_threads(), torch.randn(3, 2**18 + 37, generator=torch.Generator().manual_seed(5))
    packed, state = bnb.quantize_4bit(weight.to(dtype).view(-1), quant_type="nf4", compress_statistics=True)
    try:
        torch.set_num_threads(threads)
        found = quantize_nf4(weight.to(dtype)).dequantize()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.view(-1), bnb.dequantize_4bit(packed, state).view(-1))
