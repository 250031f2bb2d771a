"""The bias of a layer as integers of the accumulator's scale."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.emit import Emitter
from zeropoint.numerics import ops
from zeropoint.passes.reference.grid import Grid, Scale
from zeropoint.passes.reference.integers import Integers
from zeropoint.passes.reference.sums import OUT_DTYPE

aten = torch.ops.aten
MAX_STEPS = 2**30
"""Up to here a bias is added to an int32 accumulator."""
SAME = 1e-5
"""Relative difference up to which the scale of stored integers is that of the accumulator."""
DEQUANTIZES = (ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_CHANNEL)


def whole_bias(integers: Integers, emit: Emitter, bias: Node, input_scale: Scale, scale: Any) -> Node | None:
    """Returns the bias in int32 steps of ``s_x * s_w``: those stored, or the real values rounded.

    None where it is added in float: a scale is chosen at run time (as XNNPACK does then), the bias is no constant of
    one value for each channel, or too large.
    """
    if isinstance(input_scale, Node) or bias not in integers.constants or bias.meta["val"].dim() != 1:
        return None
    step, value = integers.constant(scale), integers.constant(bias)
    if step is None or value is None or not bool((value.double().abs() < MAX_STEPS * step.double()).all()):
        return None
    if (stored := _stored(integers, bias, step)) is not None:
        return stored
    steps = emit.call(OUT_DTYPE, aten.div.Tensor, torch.float32, bias, scale)
    return emit.call(aten.to.dtype, emit.call(aten.round.default, steps), torch.int32)


def _stored(integers: Integers, bias: Node, step: torch.Tensor) -> Node | None:
    """Returns the integers of a bias that is dequantized, where they are steps of the accumulator already."""
    grid = Grid.of(bias) if bias.target in DEQUANTIZES else None
    if grid is None or grid.dtype != torch.int32:
        return None
    scale, zero_point = integers.constant(grid.scale), integers.constant(grid.zero_point)
    if scale is None or zero_point is None or bool(zero_point.any()):
        return None
    is_same = torch.allclose(scale.double(), step.double(), rtol=SAME, atol=0.0)
    stored = bias.args[0]
    return stored if is_same and isinstance(stored, Node) else None
