"""Constants quantized in pieces equal the operators of torch bit for bit."""

import pytest
import torch

from zeropoint.numerics import ops
from zeropoint.numerics.blocks import BLOCK, quantize_in_blocks

RANGES = [(torch.int8, -127, 127), (torch.int8, -8, 7), (torch.uint8, 0, 255), (torch.int16, -(2**15), 2**15 - 1)]


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 0, 2), (7, 11, 3, 3), (2, BLOCK + 17), (BLOCK // 100, 130)])
def test_per_tensor(shape, dtype, low, high):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 40
    for scale, zero_point in ((0.313, 3), (1e-3, 0)):
        expected = ops.QUANTIZE_PER_TENSOR(x, torch.tensor(scale).item(), zero_point, low, high, dtype)
        got = quantize_in_blocks(x, torch.tensor([scale]), torch.tensor([zero_point]), None, low, high, dtype)
        assert torch.equal(got, expected)
        assert got.dtype == dtype


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((6,), 0), ((7, 11, 3, 3), 0), ((7, 11, 3, 3), 1), ((3, BLOCK + 5), 0), ((BLOCK + 5, 3), 1)]
)
def test_per_channel(shape, axis, dtype, low, high):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=random) * 5
    scale = torch.rand(shape[axis], generator=random) + 1e-3
    zero_point = torch.randint(max(low, -5), min(high, 5) + 1, (shape[axis],), generator=random)
    expected = ops.QUANTIZE_PER_CHANNEL(x, scale, zero_point, axis, low, high, dtype)
    got = quantize_in_blocks(x, scale, zero_point, axis, low, high, dtype)
    assert torch.equal(got, expected)
    assert got.is_contiguous()


def test_ties_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    got = quantize_in_blocks(x, torch.ones(1), torch.zeros(1, dtype=torch.int64), None, -128, 127, torch.int8)
    assert got.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_into_a_tensor(axis):
    x = torch.randn(6, 6)
    scale = torch.full((1 if axis is None else 6,), 0.02)
    zero_point = torch.zeros(len(scale), dtype=torch.int64)
    out = torch.empty(6, 6, dtype=torch.int8)
    assert quantize_in_blocks(x, scale, zero_point, axis, -127, 127, torch.int8, out) is out
    assert torch.equal(out, quantize_in_blocks(x, scale, zero_point, axis, -127, 127, torch.int8))
