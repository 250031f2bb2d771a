"""Sums of integers, each with a scale: what operators compute, before it is rounded to a grid or read in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.emit import Emitter
from zeropoint.numerics.affine import FLOAT32_INTEGERS
from zeropoint.passes.reference.grid import Grid, Scale, divided

aten = torch.ops.aten
OUT_DTYPE = torch.ops.higher_order.out_dtype
"""``out_dtype(operator, dtype, *arguments)``: the operator, computed and returned in a type that holds the result."""


@dataclass(frozen=True, slots=True)
class Sum:
    """``sum(integers * scale) + sum(reals)``.

    Args:
        terms: nodes of integers, zero points subtracted, each with its scale.
        reals: numbers, and nodes of float tensors.
    """

    terms: tuple[tuple[Node, Scale], ...]
    reals: tuple[float | Node, ...] = ()


def requantized(emit: Emitter, value: Sum, grid: Grid) -> Node:
    """Returns the integers of a sum on a static grid: each term times a float32 multiplier, rounded once.

    Clamped before it becomes an integer: what is too large for one saturates.
    """
    assert isinstance(grid.scale, float)
    dtype = computed_in(grid)
    parts: list[Any] = [
        emit.call(OUT_DTYPE, aten.mul.Tensor, dtype, integers, divided(emit, scale, grid.scale))
        for integers, scale in value.terms
    ]
    parts += [divided(emit, real, grid.scale) for real in value.reals]
    steps = emit.call(aten.round.default, _added(emit, parts))
    return saturated(emit, emit.call(aten.add.Tensor, steps, grid.zero_point), grid)


def real(emit: Emitter, value: Sum, dtype: torch.dtype) -> Node:
    """Returns a sum as a float tensor."""
    parts: list[Any] = [emit.call(aten.mul.Tensor, integers, scale) for integers, scale in value.terms]
    result = _added(emit, [*parts, *value.reals])
    return result if result.meta["val"].dtype == dtype else emit.call(aten.to.dtype, result, dtype)


def saturated(emit: Emitter, steps: Node, grid: Grid) -> Node:
    """Returns rounded float values as integers of a grid."""
    clamped = emit.call(aten.clamp.default, steps, grid.low, grid.high)
    return emit.call(aten.to.dtype, clamped, grid.dtype)


def computed_in(grid: Grid) -> torch.dtype:
    """Returns the float type that holds the integers of a grid."""
    return torch.float32 if max(-grid.low, grid.high) <= FLOAT32_INTEGERS else torch.float64


def _added(emit: Emitter, parts: list[Any]) -> Node:
    total = parts[0]
    for part in parts[1:]:
        total = emit.call(aten.add.Tensor, total, part)
    return total
