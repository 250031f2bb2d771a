"""Sums, differences and products of quantized tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.passes.reference.grid import Scale, times
from zeropoint.passes.reference.integers import Integers, Operators
from zeropoint.passes.reference.sums import OUT_DTYPE, Sum

aten = torch.ops.aten


def _added(integers: Integers, node: Node) -> Sum | None:
    return _weighted(integers, node, 1, argument(node, "alpha", 1))


def _subtracted(integers: Integers, node: Node) -> Sum | None:
    return _weighted(integers, node, 1, _negative(argument(node, "alpha", 1)))


def _subtracted_from(integers: Integers, node: Node) -> Sum | None:
    return _weighted(integers, node, _negative(argument(node, "alpha", 1)), 1)


def _negative(number: Any) -> Any:
    return None if isinstance(number, Node) else -number


def _weighted(integers: Integers, node: Node, *weights: Any) -> Sum | None:
    """Returns a weighted sum of ``self`` and ``other``, at least one of them quantized, the other that or a number."""
    emit = integers.emitter(node)
    terms: list[tuple[Node, Scale]] = []
    reals: list[float | Node] = []
    for name, weight in zip(("self", "other"), weights, strict=True):
        value = argument(node, name)
        operand = integers.operand_of_one_scale(value)
        if isinstance(weight, Node) or weight is None or (operand is None and isinstance(value, Node)):
            return None
        if operand is None:
            reals.append(float(value) * weight)
        else:
            scale = operand.scale if weight == 1 else times(emit, operand.scale, float(weight))
            terms.append((operand.integers, scale))
    return Sum(tuple(terms), tuple(reals))


def _multiplied(integers: Integers, node: Node) -> Sum | None:
    first, second = argument(node, "self"), argument(node, "other")
    left, right = integers.operand_of_one_scale(first), integers.operand_of_one_scale(second)
    emit = integers.emitter(node)
    if left is not None and right is not None:
        dtype = torch.promote_types(left.accumulator, right.accumulator)
        product = emit.call(OUT_DTYPE, aten.mul.Tensor, dtype, left.integers, right.integers)
        return Sum(((product, times(emit, left.scale, right.scale)),))
    known, number = (left, second) if left is not None else (right, first)
    if known is None or isinstance(number, Node):
        return None
    return Sum(((known.integers, times(emit, known.scale, float(number))),))


def _divided(integers: Integers, node: Node) -> Sum | None:
    operand, number = integers.operand_of_one_scale(argument(node, "self")), argument(node, "other")
    if operand is None or isinstance(number, Node) or not number or argument(node, "rounding_mode") is not None:
        return None
    return Sum(((operand.integers, times(integers.emitter(node), operand.scale, 1.0 / number)),))


def _negated(integers: Integers, node: Node) -> Sum | None:
    operand = integers.operand_of_one_scale(argument(node, "self"))
    if operand is None:
        return None
    return Sum(((operand.integers, times(integers.emitter(node), operand.scale, -1.0)),))


ARITHMETIC: Operators = {
    aten.add.Tensor: _added,
    aten.add_.Tensor: _added,
    aten.add.Scalar: _added,
    aten.sub.Tensor: _subtracted,
    aten.sub_.Tensor: _subtracted,
    aten.sub.Scalar: _subtracted,
    aten.rsub.Tensor: _subtracted_from,
    aten.rsub.Scalar: _subtracted_from,
    aten.mul.Tensor: _multiplied,
    aten.mul_.Tensor: _multiplied,
    aten.mul.Scalar: _multiplied,
    aten.div.Tensor: _divided,
    aten.div.Scalar: _divided,
    aten.neg.default: _negated,
}
