"""A graph that was prepared for training, as it is run in eval mode: the arithmetic is that of the converted model.

Batch norm in eval mode is in the weight and the bias of the layer before it, and biases lie on the grid of the integers
that they will be. So what is measured in eval mode is what ``convert_pt2e`` gives.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node

from zeropoint.core.dtypes import INTEGER_DTYPES, plain_dtype
from zeropoint.core.errors import CalibrationError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.batch_norms import is_in_train_mode
from zeropoint.graph.bias_grid import input_of
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import LAYERS, TRANSPOSED, groups_of
from zeropoint.graph.observers import is_fake_quantizer, observer_of
from zeropoint.passes.affine_blocks import affine_of
from zeropoint.passes.fold_batch_norm import factor_and_shift_of
from zeropoint.passes.qat_batch_norm import Role, groups_in
from zeropoint.passes.qparams_of import group_size_of
from zeropoint.passes.round_biases import INT32, INT64, on_grid

aten = torch.ops.aten
Chain: TypeAlias = tuple[Node, Node, Node | None]
"""A layer, by what its output is divided, and the bias that is added then."""
NORM_READS = ("weight", "bias", "running_mean", "running_var")
ON_GRID_KEY = "zeropoint_bias_on_grid"
"""Metadata of a layer whose bias ``convert_pt2e`` will round."""


@graph_pass
def mark_biases(model: GraphModule) -> None:
    """Marks the layers whose biases will be rounded, for a backend that keeps them as integers."""
    for node in model.graph.nodes:
        if node.target in LAYERS:
            node.meta[ON_GRID_KEY] = True


def fold_in_use(graph: Graph, model: GraphModule) -> None:
    """Changes a graph, a copy of that of ``model``, to the form that is run in eval mode.

    Groups whose batch norm trains stay as they are, and so do those in which something was changed.
    """
    for members in groups_in(graph):
        if _is_whole(members) and not is_in_train_mode(members["norm"]):
            _fold(model, members)
    for node in [node for node in graph.nodes if node.meta.get(ON_GRID_KEY)]:
        _round_in_use(model, node)


def chain_of(members: dict[Role, Node]) -> Chain | None:
    """Returns what is divided, by what, and the bias that is added, of a group in which nothing was changed."""
    output, norm = members.get("output"), members.get("norm")
    if output is None or norm is None or norm.target is not aten.batch_norm.default:
        return None
    if argument(norm, "input") is not output:
        return None
    bias = None
    if output.target is aten.add.Tensor:
        output, added = output.args
        bias = _per_channel(added)
        if bias is None:
            return None
    if not isinstance(output, Node) or output.target is not aten.div.Tensor:
        return None
    scale = _per_channel(output.args[1])
    layer = output.args[0]
    if scale is None or not isinstance(layer, Node) or layer is not members.get("layer"):
        return None
    return layer, scale, bias


def _per_channel(node: Any) -> Node | None:
    """Returns the vector that is seen as one value for each index of the second axis."""
    if not isinstance(node, Node) or node.target is not aten.reshape.default:
        return None
    vector, shape = node.args
    is_second = isinstance(shape, (list, tuple)) and list(shape) == [1, -1, *[1] * (len(shape) - 2)]
    return vector if is_second and isinstance(vector, Node) else None


def _is_whole(members: dict[Role, Node]) -> bool:
    """True for a group whose layer adds the zeros, or nothing, and whose batch norm reads stored tensors."""
    if chain_of(members) is None:
        return False
    layer, norm, zeros = members["layer"], members["norm"], members.get("bias")
    added = zeros.all_input_nodes[0] if zeros is not None else None
    read = [argument(norm, name) for name in NORM_READS]
    stored = all(each is None or each.op == "get_attr" for each in (*read, added))
    return stored and read[2] is not None and argument(layer, "bias") is zeros


def _fold(model: GraphModule, members: dict[Role, Node]) -> None:
    """Lets the layer add what batch norm does, and its readers read the layer."""
    layer, norm, zeros = members["layer"], members["norm"], members.get("bias")
    gamma = argument(norm, "weight")
    if gamma is not None and not bool((get_attribute(model, str(gamma.target)) != 0).all()):
        return  # The scaled weight of such a channel is not 0, as the folded one is.
    read = [*(argument(norm, name) for name in NORM_READS), zeros.all_input_nodes[0] if zeros is not None else None]
    with layer.graph.inserting_before(layer):
        again = [None if each is None else layer.graph.get_attr(str(each.target)) for each in read]
        shift = layer.graph.call_function(shift_of, (*again, argument(norm, "eps"), layer.meta["val"].dtype))
    set_argument(layer, "bias", shift)
    members["output"].replace_all_uses_with(layer)
    norm.replace_all_uses_with(argument(norm, "input"))
    norm.graph.erase_node(norm)


def shift_of(
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns what a layer with batch norm in its weight adds, ``(channels,)``."""
    doubles = [None if each is None else each.double() for each in (gamma, beta, mean, variance, bias)]
    return factor_and_shift_of(*doubles, eps)[1].to(dtype)  # type: ignore[arg-type]


def _round_in_use(model: GraphModule, layer: Node) -> None:
    """Puts the bias of a layer on the grid that ``round_biases`` will put it on, in eval mode."""
    x, weight, bias = input_of(layer), argument(layer, "weight"), argument(layer, "bias")
    if not isinstance(bias, Node) or not (bias.op == "get_attr" or bias.target is shift_of):
        return
    fakes = [observer_of(model, each) if isinstance(each, Node) else None for each in (x, weight)]
    is_transposed = layer.target in TRANSPOSED
    if not _is_on_grid(fakes[0], None) or not _is_on_grid(fakes[1], int(is_transposed)):
        return
    with layer.graph.inserting_before(layer):
        modules = [layer.graph.get_attr(str(each.target)) for each in (x, weight)]
        repeats = groups_of(layer) if is_transposed else 1
        rounded = layer.graph.call_function(bias_in_use, (bias, *modules, repeats))
    set_argument(layer, "bias", rounded)


def _is_on_grid(fake: Any, axis: int | None) -> bool:
    """True for a fake quantizer of one scale, or one for each index of ``axis``, that every tensor meets."""
    if (
        not is_fake_quantizer(fake)
        or getattr(fake, "is_dynamic", False)
        or plain_dtype(fake.dtype) not in INTEGER_DTYPES
    ):
        return False
    if affine_of(fake) is not None or group_size_of(fake) is not None:
        return False
    return fake.qscheme not in PER_CHANNEL or (axis is not None and fake.ch_axis == axis)


def bias_in_use(bias: torch.Tensor, x: Any, weight: Any, repeats: int) -> torch.Tensor:
    """Returns a bias rounded to multiples of ``s_x s_w``, while both round; its gradient passes.

    Args:
        bias: ``(out channels,)``.
        x, weight: the fake quantizers of the layer's input and weight.
        repeats: how often the scales of the weight repeat: the groups of a transposed convolution.
    """
    if not (bool(x.fake_quant_enabled[0]) and bool(weight.fake_quant_enabled[0])):
        return bias
    try:
        scales = [fake.calculate_qparams()[0].detach().flatten().float() for fake in (x, weight)]
    except CalibrationError:
        return bias  # What saw nothing says so where it is called, or at convert.
    limits = INT32 if plain_dtype(x.dtype).itemsize == 1 else INT64
    step = scales[0][:1].to(scales[1].device) * (scales[1].repeat(repeats) if len(scales[1]) > 1 else scales[1])
    return _PassGradient.apply(bias, on_grid(bias.detach(), step, limits))  # type: ignore[return-value]


class _PassGradient(torch.autograd.Function):
    """Returns the second tensor; the gradient goes to the first, as if they were equal (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        del ctx, value
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        del ctx
        return gradient, None
