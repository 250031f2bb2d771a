"""Round float biases to the grid of integers on which the backend will compute them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.bias_grid import Grid, grid_of, input_of
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import LAYERS, TRANSPOSED
from zeropoint.numerics import ops

INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)


@dataclass(frozen=True, slots=True)
class BiasRounding:
    """What became of one bias.

    Args:
        node: name of the operator that reads it.
        to_zero: channels whose bias is not zero but less than half a step of the grid.
        overflowed: channels whose bias does not fit int32, or int64 for inputs of 16 bits, and was clipped.
        largest_error: largest change of a bias that fits, in units of the output.
    """

    node: str
    to_zero: tuple[int, ...]
    overflowed: tuple[int, ...]
    largest_error: float


@graph_pass
def round_biases(model: GraphModule) -> list[BiasRounding]:
    """Gives each quantized convolution and linear layer a bias of its own, of multiples of ``s_x * s_w``.

    The backend keeps the bias as int32 with that scale (Jacob et al. 2018, section 2.4), so a float bias off the grid
    would make the graph differ from what runs. Inputs of more than 8 bits have accumulators and biases of int64, as in
    TensorFlow Lite's 16x8 specification: their step is 256 times as fine. Layers that read one bias and one weight at
    inputs of one scale, as the steps of a recurrent layer do, share it. Returns what was changed, one entry per bias.
    """
    constants, names = constant_nodes(model), Names(model)
    found: list[BiasRounding] = []
    made: dict[tuple[Node, Grid], Node] = {}
    for node in list(model.graph.nodes):
        if node.target not in LAYERS:
            continue
        bias = argument(node, "bias")
        scale = bias_scale(model, node)
        if not isinstance(bias, Node) or bias.op != "get_attr" or bias not in constants or scale is None:
            continue
        key = (bias, grid_of(node))
        if key in made:
            set_argument(node, "bias", made[key])
            continue
        value = get_attribute(model, str(bias.target)).detach()
        rounded, report = _round(node.name, value, scale, bias_limits(node))
        found.append(report)
        made[key] = _own_bias(model, node, bias, rounded, names)
        set_argument(node, "bias", made[key])
    return found


def bias_scale(model: GraphModule, node: Node) -> torch.Tensor | None:
    """Returns ``s_x * s_w``, shape ``()`` or ``(out channels,)``; None where either is not static.

    None too where the weight's scales are not those of output channels.
    """
    x, weight = input_of(node), argument(node, "weight")
    if x.target is not ops.DEQUANTIZE_PER_TENSOR:
        return None
    input_scale = torch.tensor(x.args[1], dtype=torch.float32)
    if weight.target is ops.DEQUANTIZE_PER_TENSOR:
        return input_scale * torch.tensor(weight.args[1], dtype=torch.float32)
    if weight.target is not ops.DEQUANTIZE_PER_CHANNEL or weight.args[3] != int(node.target in TRANSPOSED):
        return None
    scales = get_attribute(model, str(weight.args[1].target))
    groups = argument(node, "groups") or 1
    per_output = scales.repeat(groups) if node.target in TRANSPOSED else scales
    return input_scale.to(scales.device) * per_output


def bias_limits(layer: Node) -> torch.iinfo:
    """Returns the range of the integers that the bias of a quantized layer is kept in."""
    return INT32 if argument(input_of(layer), "dtype").itemsize == 1 else INT64


def on_grid(value: torch.Tensor, scale: torch.Tensor, limits: torch.iinfo = INT32) -> torch.Tensor:
    """Returns the values rounded to multiples of the scale that fit the limits."""
    return (_steps(value, scale).clamp(limits.min, limits.max) * scale).to(value.dtype)


def _steps(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(value.double() / scale)


def _round(
    name: str, value: torch.Tensor, scale: torch.Tensor, limits: torch.iinfo
) -> tuple[torch.Tensor, BiasRounding]:
    steps = _steps(value, scale)
    kept = steps.clamp(limits.min, limits.max)
    rounded = (kept * scale).to(value.dtype)
    to_zero = _indices((kept == 0) & (value != 0))
    changes = (rounded - value).abs()
    overflowed: tuple[int, ...] = ()
    if not torch.equal(steps, kept):
        overflowed, changes = _indices(steps != kept), changes[steps == kept]
    return rounded, BiasRounding(name, to_zero, overflowed, changes.max().item() if changes.numel() else 0.0)


def _indices(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.flatten().nonzero().flatten().tolist())


def _own_bias(model: GraphModule, node: Node, bias: Node, value: torch.Tensor, names: Names) -> Node:
    """Returns the value at a path of its own: one bias tensor cannot be on two grids."""
    path = names.new(f"{str(bias.target).replace('.', '_')}_")
    model.register_parameter(path, nn.Parameter(value, requires_grad=False))
    with node.graph.inserting_before(bias):
        own = node.graph.create_node("get_attr", path)
    own.meta = dict(bias.meta)
    inherit(own, bias, "round_biases")
    return own
