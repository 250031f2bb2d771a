"""Convolutions, linear layers and products of matrices, with integer accumulators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.graph.emit import Emitter
from zeropoint.graph.layers import CONVOLUTIONS, PRODUCTS, TRANSPOSED
from zeropoint.passes.reference.bias import whole_bias
from zeropoint.passes.reference.grid import along_axis, times
from zeropoint.passes.reference.integers import Integers, Operand, Operators
from zeropoint.passes.reference.sums import OUT_DTYPE, Sum

aten = torch.ops.aten
FACTORS: dict[Any, tuple[str, str]] = {**PRODUCTS, aten.bmm.default: ("self", "mat2")}


def _linear(integers: Integers, node: Node) -> Sum | None:
    x, weight = (integers.operand(argument(node, name)) for name in ("input", "weight"))
    if x is None or weight is None or x.axis is not None or weight.axis not in (None, 0) or weight.by_row:
        return None
    dtype = _accumulator(x, weight)
    products = integers.emitter(node).call(OUT_DTYPE, aten.linear.default, dtype, x.integers, weight.integers, None)
    return _with_bias(integers, node, products, x, weight)


def _product(integers: Integers, node: Node) -> Sum | None:
    """A product of matrices. ``out_dtype`` has none of several: there, the factors get the type of the result."""
    x, weight = (integers.operand(argument(node, name)) for name in FACTORS[node.target])
    if x is None or weight is None or x.axis is not None or weight.by_row:
        return None
    dimensions = x.integers.meta["val"].dim(), weight.integers.meta["val"].dim()
    factors = argument(node, "alpha", 1), argument(node, "beta", 1)
    if weight.axis not in (None, dimensions[1] - 1) or 1 in dimensions or factors != (1, 1):
        return None
    emit, dtype = integers.emitter(node), _accumulator(x, weight)
    if dimensions == (2, 2):
        products = emit.call(OUT_DTYPE, aten.mm.default, dtype, x.integers, weight.integers)
    else:
        left, right = (emit.call(aten.to.dtype, each.integers, dtype) for each in (x, weight))
        products = emit.call(aten.matmul.default, left, right)
    return _with_bias(integers, node, products, x, weight, "self" if node.target is aten.addmm.default else "bias")


def _convolution(integers: Integers, node: Node) -> Sum | None:
    x, weight = (integers.operand(argument(node, name)) for name in ("input", "weight"))
    transposed = node.target in TRANSPOSED or bool(argument(node, "transposed", False))
    if x is None or weight is None or x.axis is not None or weight.axis not in (None, int(transposed)):
        return None
    if x.by_row or weight.by_row:
        return None
    emit, groups = integers.emitter(node), argument(node, "groups")
    window = Window.of(node, transposed, weight.integers.meta["val"].shape[2:])
    source, is_single = x.integers, x.integers.meta["val"].dim() == len(window.stride) + 1
    if is_single:
        source = emit.call(aten.unsqueeze.default, source, 0)
    products = convolved(emit, source, weight.integers, window, groups, _accumulator(x, weight))
    if is_single:
        products = emit.call(aten.squeeze.dim, products, 0)
    if weight.axis == 1 and groups != 1:
        assert isinstance(weight.scale, Node)
        scale = emit.call(aten.repeat.default, weight.scale, [groups])
        weight = Operand(weight.integers, scale, weight.axis)
    return _with_bias(integers, node, products, x, weight)


def _accumulator(x: Operand, weight: Operand) -> torch.dtype:
    return torch.promote_types(x.accumulator, weight.accumulator)


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over its input; a number for each axis of space. ``before``: padding that is not even."""

    stride: list[Any]
    padding: list[Any]
    dilation: list[Any]
    output_padding: list[Any]
    transposed: bool
    before: list[Any]

    @classmethod
    def of(cls, node: Node, transposed: bool, kernel: torch.Size) -> Window:
        stride, dilation = (each_axis(argument(node, name), len(kernel)) for name in ("stride", "dilation"))
        output_padding = each_axis(argument(node, "output_padding", 0), len(kernel))
        padding, before = argument(node, "padding"), list[Any]()
        if isinstance(padding, str):
            lengths = [d * (size - 1) * (padding == "same") for d, size in zip(dilation, kernel, strict=True)]
            padding = [length // 2 for length in lengths]
            if any(length % 2 for length in lengths):
                before = [amount for length in reversed(lengths) for amount in (length // 2, length - length // 2)]
                padding = [0]
        return cls(stride, each_axis(padding, len(kernel)), dilation, output_padding, transposed, before)


def each_axis(value: Any, axes: int) -> list[Any]:
    """Returns a value for each axis of space; the schema lets one stand for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values


def convolved(emit: Emitter, x: Node, weight: Node, window: Window, groups: int, dtype: torch.dtype) -> Node:
    """Returns the accumulators of a convolution. torch has no int32 kernel for transposed and dilated ones."""
    if window.before:
        x = emit.call(aten.constant_pad_nd.default, x, window.before, 0)
    has_kernel = not window.transposed and all(step == 1 for step in window.dilation)
    shape = (window.stride, window.padding, window.dilation, window.transposed, window.output_padding, groups)
    computed = dtype if has_kernel else torch.int64
    result = emit.call(OUT_DTYPE, aten.convolution.default, computed, x, weight, None, *shape)
    return result if computed == dtype else emit.call(aten.to.dtype, result, dtype)


def _with_bias(
    integers: Integers, node: Node, products: Node, x: Operand, weight: Operand, bias_name: str = "bias"
) -> Sum:
    """Returns accumulators with the product of both scales, and the bias as integers or as it is."""
    emit, dimensions = integers.emitter(node), products.meta["val"].dim()
    channels = dimensions - (weight.integers.meta["val"].dim() - 1 if node.target in CONVOLVING else 1)
    scale, bias = times(emit, weight.scale, x.scale), argument(node, bias_name)
    whole = None if bias is None else whole_bias(integers, emit, bias, x.scale, scale)
    if whole is not None:
        products = emit.call(aten.add.Tensor, products, along_axis(emit, whole, channels, dimensions))
    terms = ((products, along_axis(emit, scale, channels, dimensions)),)
    if bias is None or whole is not None:
        return Sum(terms)
    return Sum(terms, (along_axis(emit, bias, channels, dimensions) if bias.meta["val"].dim() == 1 else bias,))


CONVOLVING = (*CONVOLUTIONS, *TRANSPOSED, aten.convolution.default)
LAYERS: Operators = {
    aten.linear.default: _linear,
    **dict.fromkeys(CONVOLVING, _convolution),
    **dict.fromkeys(FACTORS, _product),
}
