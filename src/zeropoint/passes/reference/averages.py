"""Averages: sums of integers over a count."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.fx import Node

from zeropoint.graph.bind import argument, bind
from zeropoint.passes.reference.grid import Scale, times
from zeropoint.passes.reference.integers import Integers, Operators
from zeropoint.passes.reference.layers import Window, convolved, each_axis
from zeropoint.passes.reference.sums import Sum

aten = torch.ops.aten


def _mean(integers: Integers, node: Node) -> Sum | None:
    axes = argument(node, "dim") or list(range(argument(node, "self").meta["val"].dim()))
    return _over_axes(integers, node, axes, bool(argument(node, "keepdim", False)))


def _adaptive(integers: Integers, node: Node) -> Sum | None:
    """Windows side by side, where the sizes allow for such."""
    new = list(argument(node, "output_size"))
    sizes = list(argument(node, "self").meta["val"].shape[-len(new) :])
    if all(size == 1 for size in new):
        return _over_axes(integers, node, [-1 - i for i in range(len(new))], keepdim=True)
    if not all(isinstance(before, int) and before % after == 0 for before, after in zip(sizes, new, strict=True)):
        return None
    kernel = [before // after for before, after in zip(sizes, new, strict=True)]
    return _over_windows(integers, node, kernel, kernel, [], 1.0 / math.prod(kernel))


def _pooled(integers: Integers, node: Node) -> Sum | None:
    sizes = list(argument(node, "self").meta["val"].shape[2:])
    kernel = each_axis(argument(node, "kernel_size"), len(sizes))
    stride = each_axis(argument(node, "stride") or kernel, len(sizes))
    padding = each_axis(argument(node, "padding"), len(sizes))
    if not any(padding) and not argument(node, "ceil_mode"):
        sizes = kernel  # Each window is whole: one tells of all.
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    assert callable(node.target)
    averages = node.target(**{**bind(node), "self": torch.ones(1, 1, *sizes)})
    amounts = _amounts(sizes, list(averages.shape[2:]), kernel, stride, padding)
    counts = _sums(F.pad(torch.ones(1, 1, *sizes), amounts), kernel, stride)
    return _over_windows(integers, node, kernel, stride, amounts, _factor(integers, node, averages / counts))


def _sums(x: torch.Tensor, kernel: list[int], stride: list[int]) -> torch.Tensor:
    """Returns the sums over windows of a tensor of one channel."""
    none = [0] * len(kernel)
    return aten.convolution.default(x, torch.ones(1, 1, *kernel), None, stride, none, [1] * len(kernel), False, none, 1)


def _factor(integers: Integers, node: Node, values: torch.Tensor) -> Scale:
    """Returns what each sum is multiplied by: one number, or a constant with one for each window."""
    same = bool((values == values.flatten()[0]).all())
    return float(values.flatten()[0]) if same else integers.tensor(node, values)


def _amounts(sizes: list[int], new: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """Returns the padding of both ends, the last axis first, by which each window lies inside."""
    amounts: list[int] = []
    for before, after, window, step, pad in zip(sizes, new, kernel, stride, padding, strict=True):
        end = (after - 1) * step + window - pad - before
        amounts = [pad, max(pad, end), *amounts]
    return amounts


def _over_windows(
    integers: Integers, node: Node, kernel: list[int], stride: list[int], amounts: list[int], factor: Scale
) -> Sum | None:
    """Returns sums over windows, which a convolution with ones in each channel gives, times a factor."""
    operand = integers.operand_of_one_scale(argument(node, "self"))
    if operand is None:
        return None
    value, space = operand.integers.meta["val"], len(kernel)
    channels = value.shape[1]
    if not isinstance(channels, int) or value.dim() != space + 2:
        return None
    emit = integers.emitter(node)
    ones = emit.call(aten.ones.default, [channels, 1, *kernel], dtype=value.dtype, device=value.device)
    window = Window(stride, [0] * space, [1] * space, [0] * space, False, amounts if any(amounts) else [])
    total = convolved(emit, operand.integers, ones, window, channels, operand.accumulator)
    return Sum(((total, times(emit, operand.scale, factor)),))


def _over_axes(integers: Integers, node: Node, axes: list[int], keepdim: bool) -> Sum | None:
    """Returns sums over whole axes, where their sizes are known, over how many values they are of."""
    operand = integers.operand_of_one_scale(argument(node, "self"))
    if operand is None or argument(node, "dtype") is not None:
        return None
    shape = operand.integers.meta["val"].shape
    count = math.prod(shape[axis] for axis in axes)
    if not isinstance(count, int) or count == 0:
        return None
    emit = integers.emitter(node)
    total = emit.call(aten.sum.dim_IntList, operand.integers, axes, keepdim, dtype=operand.accumulator)
    return Sum(((total, times(emit, operand.scale, 1.0 / count)),))


AVERAGES: Operators = {
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.adaptive_avg_pool1d.default: _adaptive,
    aten.adaptive_avg_pool2d.default: _adaptive,
    aten.adaptive_avg_pool3d.default: _adaptive,
    aten.avg_pool1d.default: _pooled,
    aten.avg_pool2d.default: _pooled,
    aten.avg_pool3d.default: _pooled,
}
