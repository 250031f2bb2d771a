"""Affine quantization against an exact oracle and against torch's own operators.

The oracle is exact given IEEE 754 float32: the reciprocal and the product are single float32 operations (NumPy
scalars, each correctly rounded); rounding half to even is done on ``fractions.Fraction``, the shift by the zero point
and clamping on Python integers. Real values of int32 are exact products, rounded to float64 and then to float32.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zeropoint.core.errors import SpecError
from zeropoint.numerics.affine import choose_qparams_blockwise, dequantize, dequantize_unchecked, quantize
from zeropoint.numerics.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken, qparams_shape
from zeropoint.numerics.ops import (
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_CHANNEL_GROUP,
    DEQUANTIZE_PER_TENSOR,
    DEQUANTIZE_PER_TOKEN,
    QUANTIZE_PER_CHANNEL,
    QUANTIZE_PER_CHANNEL_GROUP,
    QUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR_TENSOR,
    QUANTIZE_PER_TOKEN,
)

RANGES = (
    (torch.int8, -128, 127),
    (torch.int8, -127, 127),
    (torch.int8, -8, 7),
    (torch.uint8, 0, 255),
    (torch.uint8, 0, 15),
    (torch.int16, -32768, 32767),
    (torch.uint16, 0, 65535),
    (torch.int32, -(2**31), 2**31 - 1),
    (torch.int32, -(2**24), 2**24),
)
EDGES = (0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -128.5, 3.4e38, -3.4e38)
INFINITIES = (float("inf"), float("-inf"))

values = st.one_of(st.sampled_from(EDGES + INFINITIES), st.floats(width=32, allow_nan=False))
scales = st.one_of(
    st.sampled_from([1.0, 0.5, 2.0, 1 / 3, 0.1, 1e-30, 1e30]),
    st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
)


def expected_integer(x, scale, zero_point, quant_min, quant_max, zero_point_added="after_rounding"):
    """The oracle: one value, a float32 scale, Python integers."""
    with np.errstate(all="ignore"):
        steps = np.float32(x) * (np.float32(1) / np.float32(scale))
        if zero_point_added == "before_rounding":
            steps = steps + np.float32(zero_point)
        if np.isinf(steps):
            return quant_max if steps > 0 else quant_min
        rounded = round(Fraction(float(steps)))
        if zero_point_added == "after_rounding":
            rounded += zero_point
    return min(max(rounded, quant_min), quant_max)


def expected_real(q, scale, zero_point):
    """The oracle for float32. Up to 24 bits of ``q - zero_point``, float64 holds the product: it is rounded once."""
    with np.errstate(all="ignore"):
        return float(np.float32(float((q - zero_point) * Fraction(scale))))


def widened(q):
    return q.to(torch.int64)


@given(data=st.data(), integers=st.sampled_from(RANGES))
@settings(max_examples=150, deadline=None)
def test_per_tensor_is_the_oracle(data, integers):
    dtype, low, high = integers
    xs = data.draw(st.lists(values, min_size=1, max_size=12))
    scale, zero_point = data.draw(scales), data.draw(st.integers(low, high))
    scale = float(np.float32(scale))
    q = quantize(torch.tensor(xs), scale, zero_point, dtype, quant_min=low, quant_max=high)
    assert q.dtype == dtype
    assert widened(q).tolist() == [expected_integer(x, scale, zero_point, low, high) for x in xs]


@given(data=st.data(), integers=st.sampled_from(RANGES[:7]))
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("zero_point_added", ["after_rounding", "before_rounding"])
def test_per_group_is_the_oracle(zero_point_added, data, integers):
    dtype, low, high = integers
    xs = data.draw(st.lists(values, min_size=12, max_size=12))
    step = data.draw(st.lists(scales.map(np.float32).map(float), min_size=6, max_size=6))
    zero = data.draw(st.lists(st.integers(low, high), min_size=6, max_size=6))
    shape = qparams_shape(PerGroup(2), (3, 4))
    q = quantize(
        torch.tensor(xs).reshape(3, 4),
        torch.tensor(step).reshape(shape),
        torch.tensor(zero).reshape(shape),
        dtype,
        quant_min=low,
        quant_max=high,
        granularity=PerGroup(2),
        zero_point_added=zero_point_added,
    )
    expected = [expected_integer(x, step[i // 2], zero[i // 2], low, high, zero_point_added) for i, x in enumerate(xs)]
    assert widened(q).flatten().tolist() == expected


@given(data=st.data(), integers=st.sampled_from(RANGES))
@settings(max_examples=80, deadline=None)
def test_dequantize_is_the_oracle(data, integers):
    dtype, low, high = integers
    qs = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=12))
    scale, zero_point = float(np.float32(data.draw(scales))), data.draw(st.integers(low, high))
    q = torch.tensor(qs).to(dtype)
    expected = [expected_real(value, scale, zero_point) for value in qs]
    assert dequantize(q, scale, zero_point).tolist() == expected
    channels = (torch.full(q.shape, scale), torch.full(q.shape, zero_point))
    assert dequantize(q, *channels, granularity=PerAxis(0)).tolist() == expected


@given(data=st.data(), scheme=st.sampled_from(["symmetric", "affine"]), integers=st.sampled_from(RANGES[:7]))
@settings(max_examples=80, deadline=None)
def test_a_measured_range_comes_back_within_half_a_step(data, scheme, integers):
    dtype, low, high = integers
    floats = st.floats(-1e6, 1e6, width=32)
    x = torch.tensor(data.draw(st.lists(floats, min_size=1, max_size=12)))
    middle = 0 if low < 0 else (low + high) // 2
    scale, zero_point = choose_qparams_blockwise(x, low, high, PerTensor(), scheme=scheme, symmetric_zero_point=middle)
    q = quantize(x, scale, zero_point, dtype, quant_min=low, quant_max=high)
    error = (dequantize(q, scale, zero_point) - x).abs().max().item()
    # Symmetric: the largest value is (quant_max - quant_min) / 2 steps, at most one more than there are. float32
    # arithmetic on up to 2**16 steps adds less than 1/64 of a step.
    steps = 1.0 if scheme == "symmetric" else 0.5
    rounding_of_zero_point = 0.5 if scheme == "affine" else 0.0
    assert error <= (steps + rounding_of_zero_point + 1 / 64) * scale.item()


def random_case(dtype, low, high, shape=(4, 6)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 40
    x.view(-1)[:4] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e30])
    x.view(-1)[4:9] = torch.tensor([0.5, 1.5, -2.5, 3.5, 1e-45])
    return x


@pytest.mark.parametrize(("dtype", "low", "high"), [*RANGES[:7], RANGES[8]])
@pytest.mark.parametrize("zero_point_offset", [0, 3])
def test_bits_of_torch_per_tensor(dtype, low, high, zero_point_offset):
    x = random_case(dtype, low, high)
    zero_point = max(low, min(high, zero_point_offset))
    for scale in (1.0, 0.1, 1 / 3, 0.0078125, float(np.float32(0.3))):
        arguments = (zero_point, low, high, dtype)
        theirs = QUANTIZE_PER_TENSOR(x, scale, *arguments)
        mine = quantize(x, scale, zero_point, dtype, quant_min=low, quant_max=high)
        assert torch.equal(widened(mine), widened(theirs))
        step = torch.tensor(scale)
        theirs = QUANTIZE_PER_TENSOR_TENSOR(x, step, torch.tensor(zero_point), low, high, dtype)
        mine = quantize(x, step, zero_point, dtype, quant_min=low, quant_max=high)
        assert torch.equal(widened(mine), widened(theirs))
        for out in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            real = DEQUANTIZE_PER_TENSOR(theirs, scale, *arguments, out_dtype=out)
            exact = torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point)
            assert torch.equal(dequantize_unchecked(theirs, *exact, PerTensor(), out), real), (scale, out)
            if out in (torch.float32, torch.float64):
                near = (widened(theirs) - zero_point).abs() <= 2**24  # torch rounds what is farther to float32 first
                mine = dequantize(theirs, scale, zero_point, dtype=out)
                assert torch.equal(mine[near], real[near]), (scale, out)


@pytest.mark.parametrize(("dtype", "low", "high"), [*RANGES[:7], RANGES[8]])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_of_torch_per_channel(dtype, low, high, axis, scale_dtype):
    x = random_case(dtype, low, high)
    count = x.shape[axis]
    scale = torch.linspace(0.05, 1.3, count).to(scale_dtype)
    zero_point = torch.arange(count).clamp(low, high)
    theirs = QUANTIZE_PER_CHANNEL(x, scale, zero_point, axis, low, high, dtype)
    mine = quantize(x, scale, zero_point, dtype, quant_min=low, quant_max=high, granularity=PerAxis(axis))
    assert torch.equal(widened(mine), widened(theirs))
    if dtype != torch.uint16:  # torch has no subtraction of uint16 and int64
        real = DEQUANTIZE_PER_CHANNEL(theirs, scale, zero_point, axis, low, high, dtype)
        unchecked = dequantize_unchecked(mine, scale, zero_point, PerAxis(axis), torch.float32)
        assert torch.equal(unchecked, real.float())
        near = (widened(mine) - zero_point.reshape((-1, 1) if axis == 0 else (1, -1))).abs() <= 2**24
        assert torch.equal(dequantize(mine, scale, zero_point, granularity=PerAxis(axis))[near], real[near])


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES[:6])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64])
def test_bits_of_torch_per_token_and_per_group(dtype, low, high, scale_dtype):
    x = random_case(dtype, low, high)
    order = {"quant_min": low, "quant_max": high, "zero_point_added": "before_rounding"}
    scale = torch.linspace(0.05, 1.3, 4, dtype=scale_dtype).reshape(4, 1)
    zero_point = torch.tensor([[0], [1], [2], [3]])
    theirs = QUANTIZE_PER_TOKEN(x, scale, zero_point, low, high, dtype)
    assert torch.equal(quantize(x, scale, zero_point, dtype, granularity=PerToken(), **order), theirs)
    real = DEQUANTIZE_PER_TOKEN(theirs, scale, zero_point, low, high, dtype, torch.float32)
    assert torch.equal(dequantize(theirs, scale, zero_point, granularity=PerToken()), real)

    scale = torch.linspace(0.05, 1.3, 8, dtype=scale_dtype).reshape(4, 2)
    zero_point = torch.arange(8).reshape(4, 2).clamp(low, high)
    theirs = QUANTIZE_PER_CHANNEL_GROUP(x, scale, zero_point, low, high, dtype, 3)
    assert torch.equal(quantize(x, scale, zero_point, dtype, granularity=PerGroup(3), **order), theirs)
    real = DEQUANTIZE_PER_CHANNEL_GROUP(theirs, scale, zero_point, low, high, dtype, 3, torch.float32)
    assert torch.equal(dequantize(theirs, scale, zero_point, granularity=PerGroup(3)), real)


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40), st.floats(0.015625, 4.0, width=32))
@example([0.5, 1.5, 2.5], 1.0)
@settings(max_examples=60, deadline=None)
def test_bits_of_torch_on_any_values(xs, scale):
    x = torch.tensor(xs)
    theirs = QUANTIZE_PER_TENSOR(x, scale, 5, -128, 127, torch.int8)
    assert torch.equal(quantize(x, scale, 5, torch.int8), theirs)
    assert torch.equal(dequantize(theirs, scale, 5), DEQUANTIZE_PER_TENSOR(theirs, scale, 5, -128, 127, torch.int8))


def test_granularities_that_mean_the_same_agree():
    x = random_case(torch.int8, -128, 127, (4, 6))
    scale, zero_point = torch.linspace(0.1, 2, 4), torch.tensor([0, 1, -1, 7])
    rows = quantize(x, scale, zero_point, torch.int8, granularity=PerAxis(0))
    for granularity in (PerToken(), PerRow(), PerGroup(6), PerBlock((1, 6)), PerBlock((6,))):
        assert torch.equal(quantize(x, scale, zero_point, torch.int8, granularity=granularity), rows)
        kept = (scale[:, None], zero_point[:, None])
        assert torch.equal(quantize(x, *kept, torch.int8, granularity=granularity), rows)


def test_blocks_of_two_axes():
    x = torch.arange(16.0).reshape(4, 4)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    q = quantize(x, scale, 0, torch.int8, granularity=PerBlock((2, 2)))
    by_hand = torch.round(x / scale.repeat_interleave(2, 0).repeat_interleave(2, 1)).to(torch.int8)
    assert torch.equal(q, by_hand)


def test_int32_saturates_where_torch_overflows():
    x = torch.tensor([1e30, -1e30, float("inf"), float("-inf"), 2147483520.0])
    bounds = [2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2147483520]
    assert quantize(x, 1.0, 0, torch.int32).tolist() == bounds
    assert quantize(x, torch.ones(5), 0, torch.int32, granularity=PerAxis(0)).tolist() == bounds


def test_int32_is_exact_where_float32_is_not():
    x, zero_point = torch.tensor([1.0, 2.0, 3.0]), 2**30 + 1
    expected = [2**30 + 2, 2**30 + 3, 2**30 + 4]
    ones, zeros = torch.ones(3), torch.full((3,), zero_point)
    for order in ("after_rounding", "before_rounding"):
        assert quantize(x, 1.0, zero_point, torch.int32, zero_point_added=order).tolist() == expected
        per_axis = quantize(x, ones, zeros, torch.int32, granularity=PerAxis(0), zero_point_added=order)
        assert per_axis.tolist() == expected
    q = torch.tensor(expected, dtype=torch.int32)
    assert dequantize(q, 1.0, zero_point).tolist() == [1.0, 2.0, 3.0]
    assert dequantize(q, ones, zeros, granularity=PerAxis(0)).tolist() == [1.0, 2.0, 3.0]
    far = dequantize(q, ones, zeros - 2**31, granularity=PerAxis(0), dtype=torch.float64)
    assert far.tolist() == [2.0**31 + 1, 2.0**31 + 2, 2.0**31 + 3]


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_short_results_are_the_float32_value_rounded_once(dtype, out):
    x = torch.linspace(0.01, 1, 50)
    info = torch.iinfo(dtype)
    scale, zero_point = choose_qparams_blockwise(x, info.min, info.max, PerTensor())
    q = quantize(x, scale, zero_point, dtype)
    result = dequantize(q, scale, zero_point, dtype=out)
    assert torch.equal(result, dequantize(q, scale, zero_point).to(out))
    assert torch.allclose(result.float(), x, atol=0.01)


def test_differences_of_integers_do_not_wrap():
    q = torch.tensor([-128, 127], dtype=torch.int8)
    zero_point = torch.tensor([127, -128], dtype=torch.int8)
    assert dequantize(q, torch.ones(2), zero_point, granularity=PerAxis(0)).tolist() == [-255.0, 255.0]
    far = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    zero_point = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    assert dequantize(far, torch.ones(2), zero_point, granularity=PerAxis(0)).tolist() == [2.0**32, -(2.0**32)]


def test_the_order_decides_ties_of_an_odd_zero_point():
    x = torch.tensor([0.5, 1.5])
    assert quantize(x, 1.0, 1, torch.int8).tolist() == [1, 3]
    assert quantize(x, 1.0, 1, torch.int8, zero_point_added="before_rounding").tolist() == [2, 2]


def test_short_floats_are_converted_first():
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 50
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(quantize(x.to(dtype), 0.3, 0, torch.int8), quantize(x.to(dtype).float(), 0.3, 0, torch.int8))


def test_shapes_and_layouts():
    assert quantize(torch.tensor(3.2), 1.0, 0, torch.int8).item() == 3
    assert quantize(torch.empty(0, 3), 1.0, 0, torch.int8).shape == (0, 3)
    assert quantize(torch.empty(0, 3), torch.ones(3), 0, torch.int8, granularity=PerAxis(1)).shape == (0, 3)
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert quantize(x, torch.ones(3), 0, torch.int8, granularity=PerAxis(1)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_numbers_go_with_a_tensor_on_any_device():
    x = torch.empty(2, 3, device="meta")
    q = quantize(x, 0.1, 0, torch.int8)
    assert (q.device.type, q.dtype, q.shape) == ("meta", torch.int8, (2, 3))
    assert dequantize(q, 0.1, 0).device.type == "meta"


def test_float_zero_points_are_those_of_embeddings():
    x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    scale, zero_point = torch.tensor([1.0, 1.0]), torch.tensor([0.25, -4.75])
    q = quantize(x, scale, zero_point, torch.uint8, granularity=PerAxis(0), zero_point_added="before_rounding")
    assert q.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert dequantize(q, scale, zero_point, granularity=PerAxis(0)).tolist() == [
        [-0.25, 0.75, 1.75],
        [4.75, 5.75, 6.75],
    ]
    with pytest.raises(SpecError, match=r"zero_point is torch\.float32"):
        quantize(x, scale, zero_point, torch.uint8, granularity=PerAxis(0))


def test_traced_without_reading_values():
    class Model(torch.nn.Module):
        def forward(self, x, scale, zero_point):
            q = quantize(x, scale, zero_point, torch.int8, granularity=PerAxis(0))
            return dequantize(q, scale, zero_point, granularity=PerAxis(0))

    arguments = (torch.randn(4, 6), torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64))
    exported = torch.export.export(Model(), arguments, dynamic_shapes=({1: torch.export.Dim("n", min=2)}, None, None))
    x = torch.randn(4, 9)
    assert torch.equal(exported.module()(x, *arguments[1:]), Model()(x, *arguments[1:]))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (
            {"scale": torch.ones(3)},
            r"quantize: scale has shape \(3,\); PerAxis\(axis=0\) of a tensor of shape \(4, 6\)",
        ),
        ({"zero_point": torch.zeros(6)}, r"zero_point has shape \(6,\).* needs \(4,\)\. Give zero_point one value"),
        ({"scale": 0.5}, r"scale has shape \(\)"),
        ({"scale": torch.ones(2, 2)}, r"scale has shape \(2, 2\)"),
        ({"zero_point": 128}, r"zero_point=128 lies outside of -128\.\.127"),
        ({"zero_point": torch.tensor([0, 0, -129, 0])}, r"zero_point=-129 lies outside"),
        ({"scale": torch.tensor([1.0, 0.0, 1.0, 1.0])}, r"scale=0\.0 is not usable\. A scale is positive and finite"),
        ({"scale": torch.tensor([1.0, -2.0, 1.0, 1.0])}, r"scale=-2\.0 is not usable"),
        ({"scale": torch.full((4,), float("nan"))}, "scale=nan is not usable"),
        ({"scale": torch.full((4,), float("inf"))}, "scale=inf is not usable"),
        ({"scale": torch.full((4,), 1e-45)}, "is not usable"),
        ({"granularity": PerAxis(2)}, "axis=2 does not exist"),
        ({"granularity": PerGroup(4)}, "6 is no multiple of 4"),
        ({"quant_min": -200}, "quant_min=-200, quant_max=127 is no range within torch.int8"),
        ({"dtype": torch.int64}, "cannot quantize to torch.int64"),
        ({"x": torch.zeros(4, 6, dtype=torch.float64)}, r"x is torch\.float64.*Convert it with x\.float"),
    ],
)
def test_refusals(keywords, words):
    arguments = {
        "x": torch.zeros(4, 6),
        "scale": torch.ones(4),
        "zero_point": 0,
        "dtype": torch.int8,
        "granularity": PerAxis(0),
    }
    with pytest.raises(SpecError, match=words):
        quantize(**(arguments | keywords))


def test_dequantize_refuses():
    with pytest.raises(SpecError, match=r"dequantize: the integers are torch\.float32\. Use one of torch\.int8"):
        dequantize(torch.zeros(2), 1.0, 0)
    with pytest.raises(SpecError, match=r"zero_point=200 lies outside of -128\.\.127"):
        dequantize(torch.zeros(2, dtype=torch.int8), 1.0, 200)
    for wrong in (torch.int8, torch.bool, torch.complex64, "float32"):
        with pytest.raises(SpecError, match=f"dequantize: dtype={wrong} is no type of real values. Use torch.float32"):
            dequantize(torch.zeros(2, dtype=torch.int8), 1.0, 0, dtype=wrong)


def test_choose_qparams_of_each_block():
    x = torch.tensor([[-1.0, 3.0, 0.0, 0.5], [2.0, 4.0, -8.0, -2.0]])
    scale, zero_point = choose_qparams_blockwise(x, -8, 7, PerGroup(2), scheme="symmetric")
    assert torch.equal(scale, torch.tensor([[3.0, 0.5], [4.0, 8.0]]) / 7.5)
    assert torch.equal(zero_point, torch.zeros(2, 2, dtype=torch.int64))
    scale, zero_point = choose_qparams_blockwise(x, -128, 127, PerToken())
    assert torch.equal(scale, torch.tensor([[4.0], [12.0]]) / 255)
    assert zero_point.tolist() == [[-64], [42]]
    single, _ = choose_qparams_blockwise(x[0], -128, 127, PerAxis(0))
    assert single.shape == (4,)
    with pytest.raises(SpecError, match=r"choose_qparams: x of shape \(0, 2\) has no element"):
        choose_qparams_blockwise(torch.empty(0, 2), -8, 7, PerTensor())
