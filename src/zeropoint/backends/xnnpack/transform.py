"""Spell operators in the way that the XNNPACK delegate takes; values stay the same.

Used before annotation, so that more operators are computed in int8, and before lowering a graph of any origin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.patterns import is_float32
from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.bind import argument, argument_names, set_argument
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.emit import Emitter, inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import LAYERS, as_linear, pads_with_zero
from zeropoint.graph.source import WRITTEN_KEY

aten = torch.ops.aten
PASS = "xnnpack.transform"
LARGEST = torch.finfo(torch.float32).max


@graph_pass
def spell(model: GraphModule, spellings: Spellings) -> None:
    """Rewrites each float32 operator by the table: ``TO_ANNOTATE``, or ``TO_LOWER`` once q and dq are in place."""
    constants = constant_nodes(model)
    names = Names(model)
    for node in list(model.graph.nodes):
        rewrite = spellings.get(node.target) if node.op == "call_function" and is_float32(node) else None
        if rewrite is not None:
            rewrite(_Place(model, node, constants, names))


class _Place:
    """A node to be rewritten, with what rewriting needs."""

    def __init__(self, model: GraphModule, node: Node, constants: set[Node], names: Names) -> None:
        self.model, self.node, self.constants, self.names = model, node, constants, names
        self.emit = Emitter(node, PASS)

    def argument(self, name: str) -> Any:
        return argument(self.node, name)

    def replace(self, new: Node) -> None:
        new.meta[WRITTEN_KEY] = self.node.meta.get(WRITTEN_KEY, self.node.target)
        self.node.replace_all_uses_with(new)
        self.model.graph.erase_node(self.node)

    def constant(self, value: float) -> Node:
        """Returns the node of a new buffer that holds one number."""
        return self.tensor(torch.tensor(float(value)))

    def tensor(self, value: torch.Tensor) -> Node:
        """Returns the node of a new buffer."""
        path = self.names.new("_tensor_constant_")
        self.model.register_buffer(path, value)
        with self.model.graph.inserting_before(self.node):
            read = self.model.graph.get_attr(path)
        read.meta["val"] = self.node.meta["val"].new_empty(value.shape)
        inherit(read, self.node, PASS)
        self.constants.add(read)
        return read


Spellings = dict[Any, Callable[[_Place], None]]
"""How an operator is rewritten, for each that is."""


def _number_to_buffer(place: _Place) -> None:
    """``x + 2`` becomes ``x + buffer``: a tensor can be quantized, a number cannot."""
    other = place.argument("other")
    if isinstance(other, (int, float)) and abs(other) < 1e15:
        set_argument(place.node, "other", place.constant(other))


def _reversed_subtraction(place: _Place) -> None:
    """``2 - x`` is ``sub(2, x)``."""
    if place.argument("alpha") != 1:
        return
    other = place.argument("other")
    minuend = other if isinstance(other, Node) else place.constant(other)
    place.replace(place.emit.call(aten.sub.Tensor, minuend, place.argument("self")))


def _clamp_to_hardtanh(place: _Place) -> None:
    """A clamp is a hardtanh, and one at 0 a relu, which the delegate fuses.

    Clamps of an open end with a bound beyond 0 make a file of executorch 1.4 that does not run.
    """
    low, high = place.argument("min"), place.argument("max")
    if low == 0 and high is None:
        place.replace(place.emit.call(aten.relu.default, place.argument("self")))
        return
    low, high = (-LARGEST if low is None else float(low)), (LARGEST if high is None else float(high))
    if low <= high:
        place.replace(place.emit.call(aten.hardtanh.default, place.argument("self"), low, high))


def _mean_keeps_dims(place: _Place) -> None:
    """A mean over height and width without ``keepdim`` is one with, and a view."""
    source, dims = place.argument("self"), place.argument("dim")
    shape = source.meta["val"].shape
    if place.argument("keepdim") or place.argument("dtype") is not None or dims is None:
        return
    sizes = _sizes(shape[:2])
    if len(shape) != 4 or {d % 4 for d in dims} != {2, 3} or sizes.count(-1) > 1:
        return
    pooled = place.emit.call(aten.mean.dim, source, [2, 3], True)
    place.replace(place.emit.call(aten.view.default, pooled, sizes))


def _squeeze_to_view(place: _Place) -> None:
    """Squeezes are views; the delegate takes those, with at most one free size, written as -1."""
    sizes = _sizes(place.node.meta["val"].shape)
    if sizes.count(-1) <= 1:
        source = place.argument("self")
        place.replace(place.emit.call(aten.reshape.default, source, sizes))


def _free_view(place: _Place) -> None:
    """A view to a size that is computed at run time is one to -1."""
    if -1 in _sizes(place.node.meta["val"].shape):
        _squeeze_to_view(place)


def _sizes(shape: Any) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in shape]


def _matmul_to_linear(place: _Place) -> None:
    """A product with a constant matrix is a linear layer."""
    found = as_linear(place.node, place.constants)
    if found is None:
        return
    source, transposed, bias = found
    weight = place.emit.call(aten.permute.default, transposed, [1, 0])
    place.constants.add(weight)
    place.replace(place.emit.call(aten.linear.default, source, weight, bias))


def _explicit_padding(place: _Place) -> None:
    """``padding="same"`` as numbers; where it is more at one end than at the other, as a pad before the convolution."""
    source, weight, dilation = (place.argument(name) for name in ("input", "weight", "dilation"))
    lengths = [
        d * (size - 1)
        for d, size in zip(_each(dilation, weight.meta["val"].dim() - 2), weight.meta["val"].shape[2:], strict=True)
    ]
    lengths = lengths if place.argument("padding") == "same" else [0] * len(lengths)
    padding = [length // 2 for length in lengths]
    if any(length % 2 for length in lengths):
        amounts = [amount for length in reversed(lengths) for amount in (length // 2, length - length // 2)]
        source, padding = _padded(place, source, amounts), [0] * len(lengths)
    operator = aten.conv1d.default if place.node.target is aten.conv1d.padding else aten.conv2d.default
    rest = (place.argument("bias"), place.argument("stride"), padding, dilation, place.argument("groups"))
    place.replace(place.emit.call(operator, source, weight, *rest))


def _each(values: list[int], axes: int) -> list[int]:
    """Returns one value for each axis of space; the schema lets one stand for all."""
    return values * axes if len(values) == 1 else values


def _padded(place: _Place, source: Node, amounts: list[int]) -> Node:
    """Returns the source padded with zeros; in one step with a padding before it that nothing else reads or cuts."""
    before = argument(source, "pad") if pads_with_zero(source) and len(source.users) == 1 else []
    if len(before) == len(amounts) and all(isinstance(amount, int) and amount >= 0 for amount in before):
        amounts = [a + b for a, b in zip(amounts, before, strict=True)]
        source = source.all_input_nodes[0]
    return place.emit.call(aten.constant_pad_nd.default, source, amounts)


def _pool_stride(place: _Place) -> None:
    """``max_pool2d(x, 2)`` without a stride makes executorch 1.4 fail with an IndexError."""
    if not place.argument("stride"):
        set_argument(place.node, "stride", list(place.argument("kernel_size")))


def _average(place: _Place) -> None:
    """The delegate takes averages that count no padding: where it counts, it becomes an operator of its own.

    A missing stride makes executorch 1.4 fail.
    """
    _pool_stride(place)
    if not place.argument("count_include_pad") or place.argument("ceil_mode"):
        return
    padding = _each(place.argument("padding"), 2)
    if any(padding):
        amounts = [amount for size in reversed(padding) for amount in (size, size)]
        set_argument(place.node, "self", _padded(place, place.argument("self"), amounts))
        set_argument(place.node, "padding", [0, 0])
    set_argument(place.node, "count_include_pad", False)


def _cut(place: _Place) -> None:
    """Padding by less than nothing cuts: no kernel does, and a slice is what it is."""
    amounts, source, mode = place.argument("pad"), place.argument("self"), place.argument("mode")
    if not all(isinstance(amount, int) for amount in amounts):  # It depends on a free size.
        return
    if mode not in (None, "constant") or min(amounts, default=0) >= 0:
        return
    axis = place.node.meta["val"].dim()
    for before, after in zip(amounts[::2], amounts[1::2], strict=True):
        axis -= 1
        if min(before, after) < 0:
            end = after if after < 0 else None
            source = place.emit.call(aten.slice.Tensor, source, axis, max(0, -before), end)
    grown = [max(0, amount) for amount in amounts]
    if any(grown):
        source = place.emit.call(aten.constant_pad_nd.default, source, grown, place.argument("value") or 0.0)
    place.replace(source)


def _piece(place: _Place) -> None:
    """A piece of what is split is a slice: the delegate has those, and no operator that returns several tensors."""
    source, index = place.node.args
    if not isinstance(source, Node) or source.target not in SPLITS or not isinstance(index, int):
        return
    axis = argument(source, "dim") % place.node.meta["val"].dim()
    lengths = [piece.shape[axis] for piece in source.meta["val"]]
    if all(isinstance(length, int) for length in lengths):
        start = sum(lengths[:index])
        whole = source.all_input_nodes[0]
        place.replace(place.emit.call(aten.slice.Tensor, whole, axis, start, start + lengths[index]))


def _float_to_two_dimensions(place: _Place) -> None:
    """A float operator of one dimension gets a second of size 1.

    executorch 1.4 makes a 2d convolution of it, and where quantized values come or go, a quantized one, although the
    weight is float (backends/xnnpack/_passes/conv1d_unsqueeze_pass.py): that fails.
    """
    names = argument_names(place.node)
    node, x = place.node, place.argument(names[0])
    sizes = _sizes(node.meta["val"].shape)
    if x.meta["val"].dim() != 3 or sizes.count(-1) > 1 or not _has_float_weight(place):
        if node.target is aten.conv1d.padding:
            _explicit_padding(place)
        return
    wide = place.emit.call(aten.reshape.default, x, [*_sizes(x.meta["val"].shape), 1])
    rest = [_second_dimension(place, name) for name in names[1:]]
    result = place.emit.call(TWO_DIMENSIONS[node.target], wide, *rest)
    place.replace(place.emit.call(aten.reshape.default, result, sizes))


TWO_DIMENSIONS: dict[Any, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
    aten.conv_transpose1d.default: aten.conv_transpose2d.input,
    aten.batch_norm.default: aten.batch_norm.default,
    aten.prelu.default: aten.prelu.default,
}
ALONG_SIZE_1 = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
"""What a convolution does along a dimension of size 1 that its kernel has too: nothing."""


def _has_float_weight(place: _Place) -> bool:
    weight = place.argument("weight")
    return place.node.target not in LAYERS or (weight.op == "get_attr" and weight in place.constants)


def _second_dimension(place: _Place, name: str) -> Any:
    """Returns an argument of an operator of one dimension as one of two takes it."""
    value = place.argument(name)
    if name == "weight" and place.node.target in LAYERS:
        return place.tensor(get_attribute(place.model, str(value.target)).detach().unsqueeze(-1))
    return [*value, ALONG_SIZE_1[name]] if name in ALONG_SIZE_1 and isinstance(value, list) else value


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)

ALWAYS: Spellings = {
    operator.getitem: _piece,
    aten.pad.default: _cut,
    aten.constant_pad_nd.default: _cut,
    aten.squeeze.default: _squeeze_to_view,
    aten.squeeze.dim: _squeeze_to_view,
    aten.squeeze.dims: _squeeze_to_view,
    aten.unsqueeze.default: _squeeze_to_view,
    aten.flatten.using_ints: _free_view,
    aten.unflatten.int: _free_view,
    aten.view.default: _free_view,
    aten.reshape.default: _free_view,
    aten.max_pool2d.default: _pool_stride,
    aten.avg_pool2d.default: _average,
    aten.conv1d.padding: _explicit_padding,
    aten.conv2d.padding: _explicit_padding,
    aten.clamp.default: _clamp_to_hardtanh,
    aten.clamp_min.default: _clamp_to_hardtanh,
    aten.clamp_max.default: _clamp_to_hardtanh,
}
"""Rewritings that keep the pattern of q and dq around an operator."""

TO_LOWER: Spellings = ALWAYS | dict.fromkeys(TWO_DIMENSIONS, _float_to_two_dimensions)
"""Rewritings of a graph with q and dq in place."""

TO_ANNOTATE: Spellings = ALWAYS | {
    aten.add.Tensor: _number_to_buffer,
    aten.add_.Tensor: _number_to_buffer,
    aten.sub.Tensor: _number_to_buffer,
    aten.sub_.Tensor: _number_to_buffer,
    aten.mul.Tensor: _number_to_buffer,
    aten.mul_.Tensor: _number_to_buffer,
    aten.rsub.Scalar: _reversed_subtraction,
    aten.rsub.Tensor: _reversed_subtraction,
    aten.mean.dim: _mean_keeps_dims,
    aten.matmul.default: _matmul_to_linear,
    aten.mm.default: _matmul_to_linear,
    aten.addmm.default: _matmul_to_linear,
}
"""Rewritings that bring more operators under a row of the table."""
