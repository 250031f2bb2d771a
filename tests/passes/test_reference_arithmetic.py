"""Single operators in integer arithmetic, over the whole range of integers and zero points, against exact fractions.

The oracle takes integers, scales and zero points as exact numbers. Where the exact value lies within a millionth of its
size of a tie, either neighbour is right: the multiplier is a float32.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from tests.backends.q_dq import Graph, dequantize, exported, qd, quantize
from zeropoint.graph.invariants import check_invariants
from zeropoint.numerics import ops
from zeropoint.passes.reference.rewrite import REFERENCE, compute_in_integers

aten = torch.ops.aten
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-(2**15), 2**15 - 1)}
RELATIVE = Fraction(1, 10**6)
MANY = settings(max_examples=25, deadline=None)
ROWS, PICTURE, KERNEL = (3, 4), (1, 2, 4, 4), (4, 2, 3, 3)


@dataclass(frozen=True)
class Case:
    """An operator on tensors and on arrays of fractions, and the shapes of its inputs."""

    name: str
    compute: Callable[..., torch.Tensor]
    exact: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name


def convolved(x: np.ndarray, w: np.ndarray, stride: int = 1, padding: int = 0, groups: int = 1) -> np.ndarray:
    """A convolution by its definition."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=Fraction(0))
    k, each = w.shape[-1], x.shape[1] // groups
    size = (x.shape[-1] - k) // stride + 1
    out = np.empty((x.shape[0], w.shape[0], size, size), dtype=object)
    for o in range(w.shape[0]):
        first = o // (w.shape[0] // groups) * each
        for i in range(size):
            for j in range(size):
                window = x[:, first : first + each, i * stride : i * stride + k, j * stride : j * stride + k]
                out[:, o, i, j] = (window * w[o]).sum((1, 2, 3))
    return out


def spread(x: np.ndarray, stride: int) -> np.ndarray:
    """Zeros between the values, as a transposed convolution puts them."""
    size = (x.shape[-1] - 1) * stride + 1
    out = np.full((*x.shape[:2], size, size), Fraction(0), dtype=object)
    out[:, :, ::stride, ::stride] = x
    return out


def transposed(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return convolved(spread(x, 2), w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1], padding=2)


def between(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.minimum(np.maximum(x, Fraction(low)), Fraction(high))


CASES = (
    Case("add", lambda x, y: x + y, lambda x, y: x + y, (ROWS, (4,))),
    Case("add_relu", lambda x, y: F.relu(x + y), lambda x, y: np.maximum(x + y, 0), (ROWS, ROWS)),
    Case("sub", lambda x, y: torch.sub(x, y, alpha=2), lambda x, y: x - 2 * y, (ROWS, ROWS)),
    Case("mul", lambda x, y: x * y, lambda x, y: x * y, (ROWS, (3, 1))),
    Case("number", lambda x: 2 - x, lambda x: 2 - x, (ROWS,)),
    Case("factor", lambda x: x * -0.5, lambda x: -x / 2, (ROWS,)),
    Case("neg", lambda x: -x, lambda x: -x, (ROWS,)),
    Case("div", lambda x: x / 4, lambda x: x / 4, (ROWS,)),
    Case("rescale", lambda x: x, lambda x: x, (ROWS,)),
    Case("relu6", aten.relu6, between(0, 6), (ROWS,)),
    Case("clamps", lambda x: x.clamp(-0.5, 0.75).clamp(min=0.125), between(0.125, 0.75), (ROWS,)),
    Case("cat", lambda x, y: torch.cat([x, y], 1), lambda x, y: np.concatenate([x, y], 1), (ROWS, ROWS)),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 2), lambda x: x.reshape(1, 2, 2, 2, 2, 2).max((3, 5)), (PICTURE,)),
    Case("maximum", torch.maximum, np.maximum, (ROWS, ROWS)),
    Case(
        "pad",
        lambda x: F.pad(x, (1, 1), value=0.75),
        lambda x: np.pad(x, ((0, 0), (1, 1)), constant_values=Fraction(3, 4)),
        (ROWS,),
    ),
    Case("permute", lambda x: x.permute(1, 0).reshape(2, 6), lambda x: x.T.reshape(2, 6), (ROWS,)),
    Case("mean", lambda x: x.mean((2, 3)), lambda x: x.sum((2, 3)) / 16, (PICTURE,)),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 2), lambda x: x.reshape(1, 2, 2, 2, 2, 2).sum((3, 5)) / 4, (PICTURE,)),
    Case("linear", F.linear, lambda x, w: x @ w.T, (ROWS, (2, 4))),
    Case("matmul", torch.matmul, lambda x, y: x @ y, ((2, 3, 4), (2, 4, 2))),
    Case("mm", torch.mm, lambda x, y: x @ y, (ROWS, (4, 2))),
    Case("conv2d", lambda x, w: F.conv2d(x, w, None, 2, 1), lambda x, w: convolved(x, w, 2, 1), (PICTURE, KERNEL)),
    Case(
        "depthwise",
        lambda x, w: F.conv2d(x, w, groups=2),
        lambda x, w: convolved(x, w, groups=2),
        (PICTURE, (4, 1, 3, 3)),
    ),
    Case(
        "same", lambda x, w: F.conv2d(x, w, None, padding="same"), lambda x, w: convolved(x, w, 1, 1), (PICTURE, KERNEL)
    ),
    Case("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, None, 2), transposed, (PICTURE, (2, 4, 3, 3))),
)
BY_NAME = {case.name: case for case in CASES}


@functools.cache
def exported_case(name: str, dtype: torch.dtype) -> GraphModule:
    case, (low, high) = BY_NAME[name], RANGES[dtype]

    def between_grids(*integers: torch.Tensor) -> torch.Tensor:
        values = [dequantize(q, 0.1, low, low, high, dtype) for q in integers]
        return quantize(case.compute(*values), 0.1, low, low, high, dtype)

    return exported(Graph(between_grids), *(torch.zeros(shape, dtype=dtype) for shape in case.shapes))


def computed(
    case: Case, dtype: torch.dtype, grids: list[tuple[float, int]], inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Returns the operator's integers for integers, each on its grid; the last grid is that of the result."""
    model = copy.deepcopy(exported_case(case.name, dtype))
    for node in model.graph.nodes:
        if node.target is ops.DEQUANTIZE_PER_TENSOR:
            position = [n for n in model.graph.nodes if n.op == "placeholder"].index(node.args[0])
            node.args = (node.args[0], *grids[position], *node.args[3:])
        elif node.target is ops.QUANTIZE_PER_TENSOR:
            node.args = (node.args[0], *grids[-1], *node.args[3:])
    compute_in_integers(model)
    check_invariants(model, REFERENCE, "the test")
    model.recompile()
    with torch.no_grad():
        return model(*inputs)


scales = st.one_of(st.sampled_from([1.0, 0.5, 2**-12, 1 / 3]), st.floats(1e-3, 4.0))


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([low, high, low + 1, high - 1]), st.integers(low, high))


@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_exact_fractions(case: Case, dtype: torch.dtype):
    low, high = RANGES[dtype]

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        grids = [(data.draw(scales), data.draw(integers(low, high))) for _ in range(len(case.shapes) + 1)]
        arrays = []
        for shape in case.shapes:
            count = int(np.prod(shape))
            arrays.append(data.draw(st.lists(integers(low, high), min_size=count, max_size=count)))
        tensors = [torch.tensor(a, dtype=dtype).reshape(s) for a, s in zip(arrays, case.shapes, strict=True)]
        values = [
            np.array([(q - zero) * Fraction(scale) for q in array], dtype=object).reshape(shape)
            for array, shape, (scale, zero) in zip(arrays, case.shapes, grids, strict=False)
        ]
        scale, zero = grids[-1]
        result = computed(case, dtype, grids, tensors)
        exact = case.exact(*values)
        assert result.dtype == dtype
        assert result.shape == exact.shape
        for actual, value in zip(result.flatten().tolist(), exact.flatten().tolist(), strict=True):
            steps = Fraction(value) / Fraction(scale)
            expected = min(max(steps + zero, Fraction(low)), Fraction(high))
            assert abs(actual - expected) <= Fraction(1, 2) + RELATIVE * min(abs(steps), high - low), (value, scale)

    check()


# Layers: scales and zero points for each channel, biases.


@given(st.data())
@MANY
def test_layer_with_a_grid_for_each_channel_and_a_bias(data: st.DataObject):
    """The bias is a constant: its steps of ``s_x * s_w`` are rounded first, then all is exact."""
    zero_points = data.draw(st.lists(integers(-128, 127), min_size=3, max_size=3))
    weight_scales = data.draw(st.lists(scales, min_size=3, max_size=3))
    bias = data.draw(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3))
    weight = data.draw(st.lists(integers(-128, 127), min_size=12, max_size=12))
    x = data.draw(st.lists(integers(-128, 127), min_size=8, max_size=8))
    (x_scale, x_zero), (scale, zero) = ((data.draw(scales), data.draw(integers(-128, 127))) for _ in range(2))
    model = copy.deepcopy(exported_layer())
    model.weight, model.bias = torch.tensor(weight, dtype=torch.int8).reshape(3, 4), torch.tensor(bias)
    model.scales, model.zero_points = torch.tensor(weight_scales), torch.tensor(zero_points)
    for node in model.graph.nodes:
        if node.target is ops.DEQUANTIZE_PER_TENSOR:
            node.args = (node.args[0], x_scale, x_zero, *node.args[3:])
        elif node.target is ops.QUANTIZE_PER_TENSOR:
            node.args = (node.args[0], scale, zero, *node.args[3:])
    compute_in_integers(model)
    model.recompile()
    result = model(torch.tensor(x, dtype=torch.int8).reshape(2, 4))
    for row in range(2):
        for channel in range(3):
            terms = zip(x[4 * row : 4 * row + 4], weight[4 * channel : 4 * channel + 4], strict=True)
            step = torch.tensor(weight_scales)[channel] * x_scale
            total = sum((a - x_zero) * (b - zero_points[channel]) for a, b in terms)
            total += round(float(torch.tensor(bias[channel]) / step))
            steps = total * Fraction(step.item()) / Fraction(scale)
            expected = min(max(steps + zero, -128), 127)
            assert abs(result[row, channel].item() - expected) <= Fraction(1, 2) + RELATIVE * min(abs(steps), 255)


class PerChannel(torch.nn.Module):
    """A linear layer of integers, with a scale and a zero point for each channel, and a float bias."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(3, 4, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(3))
        self.register_buffer("zero_points", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = qd.dequantize_per_channel(self.weight, self.scales, self.zero_points, 0, -128, 127, torch.int8)
        return quantize(F.linear(dequantize(x), weight, self.bias))


@functools.cache
def exported_layer() -> GraphModule:
    return exported(PerChannel(), torch.zeros(2, 4, dtype=torch.int8))


# Quantize and dequantize operators alone.


real_values = st.one_of(
    st.sampled_from([0.0, 1e-45, 0.5, 1.5, 127.5, -128.5, 3e38, -3e38, float("inf"), float("-inf")]),
    st.floats(-300, 300, width=32),
)


@functools.cache
def exported_quantize(dtype: torch.dtype) -> GraphModule:
    low, high = RANGES.get(dtype, (-(2**31), 2**31 - 1))
    return exported(Graph(lambda x: quantize(x, 0.1, low, low, high, dtype)), torch.zeros(12))


@pytest.mark.parametrize("dtype", [*RANGES, torch.int32], ids=str)
@MANY
@given(values=st.lists(real_values, min_size=12, max_size=12), scale=scales, data=st.data())
def test_quantize_saturates_and_equals_exact_fractions(dtype, values, scale, data):
    low, high = RANGES.get(dtype, (-(2**31), 2**31 - 1))
    zero = data.draw(integers(low, high))
    model = copy.deepcopy(exported_quantize(dtype))
    node = next(node for node in model.graph.nodes if node.target is ops.QUANTIZE_PER_TENSOR)
    node.args = (node.args[0], scale, zero, *node.args[3:])
    compute_in_integers(model)
    check_invariants(model, REFERENCE, "the test")
    model.recompile()
    for actual, value in zip(model(torch.tensor(values)).tolist(), values, strict=True):
        if np.isinf(value):
            assert actual == (high if value > 0 else low)
            continue
        steps = Fraction(value) / Fraction(scale)
        expected = min(max(steps + zero, low), high)
        assert abs(actual - expected) <= Fraction(1, 2) + RELATIVE * min(abs(steps), high - low)
