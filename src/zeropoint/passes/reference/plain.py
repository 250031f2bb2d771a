"""Quantize and dequantize operators as arithmetic: steps of the scale, rounded, plus the zero point, and back.

Steps are ``x * (1 / scale)``, as torch's operators and XNNPACK compute them: ``x / scale`` gives one value in a million
another integer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.graph.emit import Emitter
from zeropoint.numerics import ops
from zeropoint.passes.reference.grid import Grid, Scale, along_axis
from zeropoint.passes.reference.sums import computed_in, saturated

aten = torch.ops.aten
BEFORE_ROUNDING = (ops.QUANTIZE_PER_TOKEN, ops.QUANTIZE_PER_CHANNEL_GROUP)
"""What adds the zero point before it rounds."""


def quantized(emit: Emitter, node: Node) -> Node:
    """Returns what a quantize operator does, in arithmetic of float32 up to the conversion to an integer."""
    grid, x = Grid.of(node), argument(node, "input")
    dtype = computed_in(grid)
    inverse = _as(emit, _reciprocal(emit, grid.scale), dtype)
    x, inverse, zero_point = _broadcast(emit, node, _as(emit, x, dtype), inverse, grid)
    steps = emit.call(aten.mul.Tensor, x, inverse)
    if node.target in BEFORE_ROUNDING:
        steps = emit.call(aten.round.default, emit.call(aten.add.Tensor, steps, zero_point))
    else:
        steps = emit.call(aten.add.Tensor, emit.call(aten.round.default, steps), zero_point)
    return _shaped_as(emit, saturated(emit, steps, grid), node)


def dequantized(emit: Emitter, node: Node) -> Node:
    """Returns what a dequantize operator does."""
    grid = Grid.of(node)
    dtype = computed_in(grid)
    q, scale = _as(emit, argument(node, "input"), dtype), _as(emit, grid.scale, dtype)
    q, scale, zero_point = _broadcast(emit, node, q, scale, grid)
    real = emit.call(aten.mul.Tensor, emit.call(aten.sub.Tensor, q, zero_point), scale)
    return _shaped_as(emit, _as(emit, real, node.meta["val"].dtype), node)


def _as(emit: Emitter, x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Node) or x.meta["val"].dtype == dtype:
        return x
    return emit.call(aten.to.dtype, x, dtype)


def _reciprocal(emit: Emitter, scale: Scale) -> Scale:
    return emit.call(aten.reciprocal.default, scale) if isinstance(scale, Node) else 1.0 / scale


def _broadcast(emit: Emitter, node: Node, x: Node, scale: Scale, grid: Grid) -> tuple[Node, Any, Any]:
    """Returns the tensor, its scale or inverse scale and the zero point in shapes that go together."""
    zero_point, shape = grid.zero_point, x.meta["val"].shape
    size = argument(node, "group_size")
    if size is None:
        scale, zero_point = (along_axis(emit, value, grid.axis, len(shape)) for value in (scale, zero_point))
        return x, scale, zero_point
    size = min(size, shape[-1])  # A row shorter than its group is one.
    grouped = emit.call(aten.reshape.default, x, [*shape[:-1], -1, size])
    if isinstance(zero_point, Node):
        zero_point = emit.call(aten.unsqueeze.default, zero_point, -1)
    return grouped, emit.call(aten.unsqueeze.default, scale, -1), zero_point


def _shaped_as(emit: Emitter, result: Node, node: Node) -> Node:
    shape = node.meta["val"].shape
    if result.meta["val"].dim() == len(shape):
        return result
    return emit.call(aten.flatten.using_ints, result, -2)
