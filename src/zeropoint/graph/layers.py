"""Convolutions and linear layers: their operators, and how the axes of their weights lie.

Weights: convolution ``(out, in / groups, k...)``, linear ``(out, in)``, transposed convolution
``(in, out / groups, k...)``; groups lie one after the other along the first axis.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.conv3d.padding,
)  # fmt: skip
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LINEAR = (aten.linear.default,)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, *LINEAR)
MOVES = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.clone.default,
)  # fmt: skip
"""Operators that return the values that they read, all of them and no others."""
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def pads_with_zero(node: Node) -> bool:
    """True for padding with zeros."""
    return node.target in PADS and argument(node, "mode") in (None, "constant") and not argument(node, "value")


def groups_of(layer: Node) -> int:
    """Returns the number of groups of a layer; 1 for a linear one."""
    return int(argument(layer, "groups", 1))


def channel_axis(layer: Node) -> int:
    """Returns the axis of a layer's output, and of its input, along which its channels lie."""
    return -1 if layer.target in LINEAR else 1


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
