"""The real values that integers stand for, as quantize and dequantize operators say it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument, bind
from zeropoint.graph.emit import Emitter
from zeropoint.numerics import affine, ops

aten = torch.ops.aten
Scale: TypeAlias = float | Node
"""A number, or the node of a tensor that goes with the integers by broadcasting, or has a value for each channel."""
CENTERED = {torch.int8: torch.int16, torch.uint8: torch.int16, torch.int16: torch.int32, torch.int32: torch.int64}
"""What holds each integer of a type minus each other. torch has no arithmetic for uint16."""
PER_TENSOR = (
    ops.QUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR,
    ops.QUANTIZE_PER_TENSOR_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR,
)  # fmt: skip
PER_TOKEN = (ops.QUANTIZE_PER_TOKEN, ops.DEQUANTIZE_PER_TOKEN)
PER_GROUP = (ops.QUANTIZE_PER_CHANNEL_GROUP, ops.DEQUANTIZE_PER_CHANNEL_GROUP)


@dataclass(frozen=True, slots=True)
class Grid:
    """``(integer - zero_point) * scale``, integers from ``low`` to ``high``.

    Scale and zero point are numbers or nodes: of one value, of a value for each index of ``axis``, or ``(..., 1)``
    with a value for each vector along the last axis (``by_row``).
    """

    scale: Scale
    zero_point: int | Node
    low: int
    high: int
    dtype: torch.dtype
    axis: int | None = None
    by_row: bool = False

    @classmethod
    def of(cls, node: Node) -> Grid:
        """Returns what a quantize or dequantize operator says."""
        passed = bind(node)
        scale, zero_point = (passed.get(name, passed.get(f"{name}s")) for name in ("scale", "zero_point"))
        limits = (argument(node, "quant_min"), argument(node, "quant_max"), argument(node, "dtype"))
        dimensions = node.meta["val"].dim()
        axis = argument(node, "axis") % dimensions if "axis" in passed else None
        assert isinstance(scale, (float, Node))
        return cls(scale, 0 if zero_point is None else zero_point, *limits, axis, node.target in PER_TOKEN)

    @property
    def is_static(self) -> bool:
        """True where scale and zero point are numbers."""
        return isinstance(self.scale, float) and isinstance(self.zero_point, int)

    @property
    def has_arithmetic(self) -> bool:
        """True where integers can be subtracted from each other."""
        is_float = isinstance(self.zero_point, Node) and self.zero_point.meta["val"].is_floating_point()
        return self.dtype in CENTERED and not is_float

    def has_integers_of(self, other: Grid) -> bool:
        """True where an integer stands for the same value on both."""
        return (self.scale, self.zero_point, self.dtype) == (other.scale, other.zero_point, other.dtype)

    def integer(self, value: float) -> int:
        """Returns the integer that a static grid has for a real value, as quantizing gives it."""
        assert isinstance(self.scale, float)
        assert isinstance(self.zero_point, int)
        integer = int(affine.quantize(torch.tensor(float(value)), self.scale, self.zero_point, self.dtype))
        return max(min(integer, self.high), self.low)

    def clamped(self, low: float, high: float) -> Grid:
        """Returns the grid of the values between two real ones: rounding keeps their order."""
        return replace(self, low=self.integer(low), high=self.integer(high))


def along_axis(emit: Emitter, value: Any, axis: int | None, dimensions: int) -> Any:
    """Returns the values of each channel in a shape that goes with a tensor of so many dimensions."""
    if axis is None or axis == dimensions - 1 or not isinstance(value, Node):
        return value
    return emit.call(aten.view.default, value, [-1] + [1] * (dimensions - axis - 1))


def times(emit: Emitter, first: Any, second: Any) -> Any:
    """Returns a product: a number where both are numbers, else a node."""
    if not isinstance(first, Node) and not isinstance(second, Node):
        return first * second
    first, second = (first, second) if isinstance(first, Node) else (second, first)
    return emit.call(aten.mul.Tensor, first, second)


def divided(emit: Emitter, value: Any, by: float) -> Any:
    """Returns a quotient: a number where the dividend is one, else a node."""
    return emit.call(aten.div.Tensor, value, by) if isinstance(value, Node) else value / by
