"""Fold batch norm into the convolution or linear layer before it, found by data flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.annotate.rules import note_erased, origin_of
from zeropoint.graph.attributes import set_parameter
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.compat import created_from, fake_like
from zeropoint.graph.constants import evaluate, path_behind
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import LAYERS, TRANSPOSED, scale_outputs
from zeropoint.passes.normalized_layers import NormalizedLayer, Tensors, find_layer, linear_layer, refuse

PASS = "fold_batch_norm"
TRAINED = "it was exported in train mode and normalizes by each batch; export model.eval()"


@graph_pass
def fold_batch_norm(model: GraphModule) -> None:
    """Multiplies weights and biases by what batch norm would, and removes it.

    Between layer and batch norm may lie operators that do nothing or only move values. A product with a constant matrix
    becomes a linear layer. A batch norm that cannot be folded stays, with a decision that says why: its layer has
    another reader, it was exported in train mode, it has no running statistics, what comes before it is no convolution
    or linear layer, or it is along another axis than the layer's channels. A weight that serves several batch norms is
    folded once for each.
    """
    norms = [n for n in model.graph.nodes if n.op == "call_function" and n.target in BATCH_NORMS]
    tensors = _Tensors(model) if norms else None
    for norm in norms:
        assert tensors is not None
        found = TRAINED if is_in_train_mode(norm) else find_layer(norm, tensors)
        if isinstance(found, str):
            refuse(norm, found)
        else:
            _fold(found, tensors)


class _Tensors(Tensors):
    """The model's tensors, and those that are folded so far."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self.folded: dict[tuple[object, ...], tuple[Node, Node]] = {}


def _fold(fold: NormalizedLayer, tensors: _Tensors) -> None:
    norm = fold.norm
    layer = fold.layer if fold.layer.target in LAYERS else linear_layer(fold.layer, tensors, PASS)
    key = (layer.target in TRANSPOSED, argument(layer, "groups", 1), *_tensors_key(layer, norm))
    if key not in tensors.folded:
        weight, bias = _folded_tensors(tensors.model, layer, norm)
        old = argument(layer, "weight"), argument(layer, "bias")
        tensors.folded[key] = new_parameters(layer, old, weight, bias, tensors)
    weight_node, bias_node = tensors.folded[key]
    set_argument(layer, "weight", weight_node)
    set_argument(layer, "bias", bias_node)
    _move_origin(fold, layer)
    fold.result.replace_all_uses_with(argument(norm, "input"))
    if "custom" in fold.result.meta:
        layer.meta["custom"] = {**layer.meta.get("custom", {}), **fold.result.meta["custom"]}
    note_erased(tensors.model, [origin_of(norm)], origin_of(layer))
    for node in dict.fromkeys((*norm.users, norm)):
        layer.graph.erase_node(node)


def _move_origin(fold: NormalizedLayer, layer: Node) -> None:
    """Says that what batch norm read is what it returned; what lies before has other values than it had."""
    node: Node = argument(fold.norm, "input")
    node.meta["from_node"] = created_from(fold.result, "fold_batch_norm")
    while node is not layer:
        node = node.all_input_nodes[0]
        node.meta["from_node"] = []


def _tensors_key(layer: Node, norm: Node) -> tuple[object, ...]:
    read = [argument(layer, name) for name in ("weight", "bias")]
    read += [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
    read.append(argument(norm, "epsilon"))
    return tuple(read)


def _tensor(model: GraphModule, node: Any) -> torch.Tensor | None:
    return evaluate(model, node).double() if isinstance(node, Node) else None


@torch.no_grad()
def _folded_tensors(model: GraphModule, layer: Node, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and bias with batch norm in them, in the layer's dtype; all but the weight computed in float64."""
    weight = evaluate(model, argument(layer, "weight"))
    factor, shift = factor_and_shift(model, norm, argument(layer, "bias"))
    of_weight = factor.to(torch.promote_types(weight.dtype, torch.float32))
    return scale_outputs(layer, weight, of_weight).to(weight.dtype), shift.to(weight.dtype)


@torch.no_grad()
def factor_and_shift(model: GraphModule, norm: Node, bias: Node | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns by what batch norm in eval mode multiplies a layer's product, and what it adds; ``(channels,)``, float64.

    ``y = (Wx + b - mean) * gamma / sqrt(var + eps) + beta`` (Ioffe and Szegedy 2015).
    """
    read = [_tensor(model, argument(norm, name)) for name in ("weight", "bias", "running_mean", "running_var")]
    assert read[2] is not None
    assert read[3] is not None
    epsilon = argument(norm, "eps")
    epsilon = argument(norm, "epsilon") if epsilon is None else epsilon
    return factor_and_shift_of(read[0], read[1], read[2], read[3], _tensor(model, bias), epsilon)


def factor_and_shift_of(
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two of the batch norm with these tensors, each ``(channels,)``, float64; ``bias``: the layer's."""
    factor = torch.rsqrt(variance + eps)
    factor = factor if gamma is None else factor * gamma
    shift = (torch.zeros_like(mean) if bias is None else bias) - mean
    return factor, shift * factor if beta is None else shift * factor + beta


def new_parameters(
    layer: Node, old: tuple[Node, Node | None], weight: torch.Tensor, bias: torch.Tensor, tensors: Tensors
) -> tuple[Node, Node]:
    """Returns the nodes of a layer's new weight and bias, at the ``old`` paths where no one else reads those."""
    stem = path_behind(old[0]).replace(".", "_")
    placed = _place(layer, old[0], weight, tensors, f"{stem}_folded_")
    return placed, _place(layer, old[1], bias, tensors, f"{stem}_bias_")


def _place(layer: Node, old: Node | None, value: torch.Tensor, tensors: Tensors, prefix: str) -> Node:
    model, graph = tensors.model, layer.graph
    if old is not None and old.op == "get_attr" and tensors.has_one_reader(old):
        set_parameter(model, str(old.target), value)
        return old
    path = tensors.names.new(prefix)
    model.register_parameter(path, nn.Parameter(value, requires_grad=False))
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(path)
    node.meta["val"] = fake_like(argument(layer, "weight").meta["val"], value.shape)
    inherit(node, layer, PASS)
    tensors.constants.add(node)
    return node
