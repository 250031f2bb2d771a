"""Operators that move, pick or compare values: on integers of one grid they do the same."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.graph.layers import MOVES as REORDERINGS
from zeropoint.graph.layers import PADS, axis_before

aten = torch.ops.aten

OF_ONE = (
    *REORDERINGS, *PADS, aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.expand.default,
    aten.repeat.default, aten.flip.default, aten.roll.default, aten.index_select.default, aten.pixel_shuffle.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
    aten.detach.default, aten.alias.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.amax.default,
    aten.amin.default,
)  # fmt: skip
"""Moves of their first argument."""
OF_TWO = (aten.maximum.default, aten.minimum.default)
OF_LISTS = (aten.cat.default, aten.stack.default)
MOVES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(OF_ONE, ("self",)),
    **dict.fromkeys(OF_TWO, ("self", "other")),
    **dict.fromkeys(OF_LISTS, ("tensors",)),
    aten.where.self: ("self", "other"),
    operator.getitem: ("sequence",),
}
"""The names of the arguments that hold values, by operator."""
CLAMPS: dict[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, math.inf),
    aten.relu_.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.hardtanh_.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_.default: ("min", "max"),
    aten.clamp_min.default: ("min", math.inf),
    aten.clamp_max.default: (-math.inf, "max"),
}
"""The bounds of operators that clamp: numbers, or the names of the arguments that they are."""


def sources_of(node: Node) -> list[Node]:
    """Returns the nodes whose values a move returns."""
    found: list[Node] = []
    for name in MOVES[node.target]:
        value = argument(node, name)
        found += value if isinstance(value, (list, tuple)) else [value]
    return found


def bounds_of(node: Node) -> tuple[float, float] | None:
    """Returns the real values between which an operator clamps; None where they are no numbers."""
    low, high = (argument(node, bound) if isinstance(bound, str) else bound for bound in CLAMPS[node.target])
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return None if isinstance(low, Node) or isinstance(high, Node) else (low, high)


def axis_after(node: Node, axis: int) -> int | None:
    """Returns the axis of a move's result along which the channels of its source lie; None where there is none."""
    if node.target not in REORDERINGS:
        return None
    return next((each for each in range(node.meta["val"].dim()) if axis_before(node, each) == axis), None)


def padding_value(node: Node) -> float | None:
    """Returns the number that a padding puts around its source; None where it repeats values of the source."""
    if node.target not in PADS or argument(node, "mode") not in (None, "constant"):
        return None
    value = argument(node, "value")
    return 0.0 if value is None else float(value)
