"""Sizes of tensors, which are numbers or, where they are free, expressions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def are_equal(first: Any, second: Any) -> bool:
    """True when two sizes are equal whatever the free ones turn out to be; asking adds no condition to the model."""
    return statically_known_true(first == second)


def is_never_negative(size: Any) -> bool:
    """True when a size, or a number computed from sizes, is 0 or more whatever the free ones turn out to be."""
    return statically_known_true(size >= 0)


def have_equal_sizes(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """True when two shapes are equal whatever the free sizes turn out to be."""
    return len(first) == len(second) and all(are_equal(a, b) for a, b in zip(first, second, strict=True))


def axis_before_view(before: Sequence[Any], after: Sequence[Any], axis: int) -> int | None:
    """Returns the axis of ``before`` that a view makes ``axis`` of ``after``; None where it splits or merges that axis.

    Memory is in order, so it is the axis of the same size with as many values before it.
    """
    outer = math.prod(after[:axis])
    for index, size in enumerate(before):
        if are_equal(size, after[axis]) and are_equal(math.prod(before[:index]), outer):
            return index
    return None
