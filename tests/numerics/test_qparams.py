"""Scale and zero point: what must hold of them, and torch's own choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.numerics.affine import dequantize, quantize
from zeropoint.numerics.ops import CHOOSE_QPARAMS, CHOOSE_QPARAMS_SYMMETRIC
from zeropoint.numerics.qparams import (
    FLOAT32_EPS,
    choose_float_qparams,
    choose_qparams,
    choose_qparams_in_numbers,
    symmetric_zero_point,
)

bounds = st.floats(-(2.0**100), 2.0**100, width=32)


@given(bounds, bounds, st.sampled_from([(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int16, -32768, 32767)]))
@settings(max_examples=80, deadline=None)
def test_bits_of_torch(first, second, integers):
    dtype, low, high = integers
    x = torch.tensor([first, second])
    smallest, largest = x.aminmax()
    for op, symmetric in ((CHOOSE_QPARAMS, False), (CHOOSE_QPARAMS_SYMMETRIC, True)):
        middle = symmetric_zero_point(dtype, low, high, custom_range=False)
        scale, zero_point = choose_qparams(
            smallest, largest, low, high, symmetric=symmetric, symmetric_zero_point=middle
        )
        their_scale, their_zero_point = op(x, low, high, FLOAT32_EPS, dtype)
        assert scale.dtype == torch.float32
        assert scale.item() == their_scale.item()
        assert zero_point.item() == their_zero_point.item()


@given(bounds, bounds, st.sampled_from([(-128, 127), (-127, 127), (0, 15)]))
@settings(max_examples=80, deadline=None)
def test_zero_is_exact_and_the_zero_point_is_in_the_range(first, second, integers):
    low, high = integers
    smallest, largest = torch.tensor(min(first, second)), torch.tensor(max(first, second))
    scale, zero_point = choose_qparams(smallest, largest, low, high, symmetric=False)
    assert scale.item() >= FLOAT32_EPS
    assert low <= zero_point.item() <= high
    q = quantize(torch.zeros(1), scale, zero_point, torch.int8, quant_min=low, quant_max=high)
    assert dequantize(q, scale, zero_point).item() == 0.0


def test_by_hand():
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), 0, 255, symmetric=False)
    assert (scale.item(), zero_point.item()) == (torch.tensor(4.0).div(255).item(), 64)
    scale, zero_point = choose_qparams(torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 6.0]), -127, 127, symmetric=True)
    assert torch.equal(scale, torch.tensor([1.0, 6.0]) / 127)
    assert zero_point.tolist() == [0, 0]


def test_a_range_of_zero_gives_the_smallest_scale():
    zero = torch.zeros(())
    assert choose_qparams(zero, zero, -128, 127, symmetric=True)[0].item() == FLOAT32_EPS
    assert choose_qparams(zero, zero, -128, 127, symmetric=False, eps=2**-12)[0].item() == 2**-12


@pytest.mark.parametrize(
    ("dtype", "low", "high", "custom", "expected"),
    [
        (torch.int8, -128, 127, False, 0),
        (torch.uint8, 0, 255, False, 128),
        (torch.quint8, 0, 255, False, 128),
        (torch.uint8, 0, 127, True, 63),
        (torch.uint16, 0, 65535, False, 32768),
        (torch.int32, -(2**31), 2**31 - 1, False, 0),
    ],
)
def test_symmetric_zero_point(dtype, low, high, custom, expected):
    assert symmetric_zero_point(dtype, low, high, custom_range=custom) == expected


def test_float_qparams_need_not_hold_zero():
    scale, zero_point = choose_float_qparams(torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0]), 0, 255)
    assert torch.equal(scale, torch.tensor([2.0 / 255, 1.0]))
    assert torch.equal(zero_point, torch.tensor([-2.0, -1.0]) / scale)


FLOATS = st.floats(-(2.0**119), 2.0**119, width=32) | st.floats(-10, 10, width=32)


@settings(deadline=None, max_examples=500)
@given(
    ends=st.tuples(FLOATS, FLOATS),
    limits=st.sampled_from([(-128, 127), (0, 255), (-8, 7), (0, 1), (-(2**31), 2**31 - 1)]),
    eps=st.sampled_from([FLOAT32_EPS, 2**-12, 1e-30]),
    symmetric=st.booleans(),
)
def test_in_numbers_they_are_the_same_to_the_bit(ends, limits, eps, symmetric):
    low, high = min(ends), max(ends)
    settings = {"symmetric": symmetric, "eps": eps, "symmetric_zero_point": 3}
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), *limits, **settings)
    assert choose_qparams_in_numbers(low, high, *limits, **settings) == (scale.item(), zero_point.item())
