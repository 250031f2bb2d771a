"""Convolutions and linear layers: their operators, and how the axes of their weights lie.

Weights: convolution ``(out, in / groups, k...)``, linear ``(out, in)``, transposed convolution
``(in, out / groups, k...)``; groups lie one after the other along the first axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.graph.sizes import axis_before_view, have_equal_sizes

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.conv3d.padding,
)  # fmt: skip
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LINEAR = (aten.linear.default,)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, *LINEAR)
VIEWS = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
MOVES = (
    *VIEWS, aten.permute.default, aten.transpose.int, aten.t.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip
"""Operators that return the values that they read, all of them and no others."""
PRODUCTS: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"), aten.mm.default: ("self", "mat2"), aten.addmm.default: ("mat1", "mat2")
}  # fmt: skip
"""Products of matrices, and the names of their factors."""
CLAMPS = (
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default,
)  # fmt: skip
"""Activations that only clamp: backends compute them together with the layer before them."""
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def pads_with_zero(node: Node) -> bool:
    """True for padding with zeros."""
    return node.target in PADS and argument(node, "mode") in (None, "constant") and not argument(node, "value")


def groups_of(layer: Node) -> int:
    """Returns the number of groups of a layer; 1 for a linear one."""
    return int(argument(layer, "groups", 1))


def channel_axis(layer: Node) -> int:
    """Returns the axis of a layer's output, and of its input, along which its channels lie.

    Before the axes of space, that is: the first one of a convolution of one sample, without a batch.
    """
    if layer.target in LINEAR:
        return -1
    space = argument(layer, "weight").meta["val"].dim() - 2
    return layer.meta["val"].dim() - space - 1


def axis_before(node: Node, axis: int) -> int | None:
    """Returns the axis of what one of ``MOVES`` reads that is this axis of its result; None where it is no axis."""
    before = node.all_input_nodes[0].meta["val"]
    if node.target in VIEWS:
        return axis_before_view(before.shape, node.meta["val"].shape, axis)
    order = list(range(before.dim()))
    if node.target is aten.permute.default:
        order = [each % before.dim() for each in argument(node, "dims")]
    elif node.target is aten.transpose.int:
        first, second = argument(node, "dim0"), argument(node, "dim1")
        order[first], order[second] = order[second], order[first]
    elif node.target is aten.t.default:
        order.reverse()
    return order[axis]


def as_linear(node: Node, constants: set[Node]) -> tuple[Node, Node, Node | None] | None:
    """Returns input, transposed weight and bias of a product that is a linear layer; None where it is not.

    That is a product with a constant matrix, to which a parameter with a value for each column may be added.
    """
    left, right = (argument(node, name) for name in PRODUCTS[node.target])
    if right not in constants or left in constants or right.meta["val"].dim() != 2:
        return None
    if node.target is not aten.addmm.default:
        return left, right, None
    bias, factors = argument(node, "self"), (argument(node, "alpha"), argument(node, "beta"))
    is_parameter = bias.op == "get_attr" and bias in constants
    is_bias = is_parameter and have_equal_sizes(bias.meta["val"].shape, node.meta["val"].shape[-1:])
    return (left, right, bias) if is_bias and factors == (1, 1) else None


def scale_outputs(layer: Node, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns the weight with each output channel multiplied by its factor, shape ``(out,)``."""
    if layer.target not in TRANSPOSED:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    groups = groups_of(layer)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def scale_inputs(layer: Node, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns the weight with what it multiplies each input channel by multiplied by a factor, shape ``(in,)``."""
    if layer.target in TRANSPOSED:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    groups = groups_of(layer)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def output_channels(layer: Node) -> int:
    """Returns how many channels a layer's output has."""
    return int(layer.meta["val"].shape[channel_axis(layer)])
