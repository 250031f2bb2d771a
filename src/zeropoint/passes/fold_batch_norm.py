"""Fold batch norm into the convolution or linear layer before it, found by data flow."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import DECISION_KEY, Decision
from zeropoint.graph.attributes import Names, attribute_reads, get_attribute, set_parameter
from zeropoint.graph.batch_norms import BATCH_NORMS, MULTIPLE, is_in_train_mode, keeps_statistics
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.compat import fake_like
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import LAYERS, LINEAR, TRANSPOSED, scale_outputs
from zeropoint.graph.source import describe


@dataclass(frozen=True, slots=True)
class _Fold:
    """A batch norm and the layer that it can be folded into; ``result`` is the node that carries its output."""

    layer: Node
    norm: Node
    result: Node


@graph_pass
def fold_batch_norm(model: GraphModule) -> None:
    """Multiplies weights and biases by what batch norm would, and removes it.

    A batch norm that cannot be folded stays, with a decision that says why: its layer has another reader, it was
    exported in train mode, it has no running statistics, what comes before it is no convolution or linear layer, or
    it follows a linear layer along another axis than the layer's features. A weight that serves several batch norms
    is folded once for each.
    """
    tensors = _Tensors(model)
    for norm in [n for n in model.graph.nodes if n.op == "call_function" and n.target in BATCH_NORMS]:
        found = _find(model, norm)
        if isinstance(found, str):
            norm.meta[DECISION_KEY] = Decision("batch_norm", (norm,), f"batch norm is not folded: {found}")
        else:
            _fold(found, tensors)


class _Tensors:
    """The model's parameters: which are read more than once, and those that are folded so far."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.names = model, Names(model)
        self.folded: dict[tuple[object, ...], tuple[Node, Node]] = {}
        self._readers = Counter[str]()
        for node in attribute_reads(model.graph):
            self._readers[str(node.target)] += len(node.users)

    def has_one_reader(self, node: Node) -> bool:
        """True when no other node of the graph reads the tensor, by whichever ``get_attr`` node."""
        return self._readers[str(node.target)] == 1


def _find(model: GraphModule, norm: Node) -> _Fold | str:
    """Returns what can be folded, or the reason why nothing can."""
    if is_in_train_mode(norm):
        return "it was exported in train mode and normalizes by each batch; export model.eval()"
    if not keeps_statistics(norm):
        return "it keeps no running statistics and normalizes by each batch"
    layer, result = argument(norm, "input"), norm
    if norm.target in MULTIPLE:
        taken = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
        if len(taken) != len(norm.users) or 0 not in taken or any(user.users for i, user in taken.items() if i):
            return "its statistics are read too"
        result = taken[0]
    if layer.target not in LAYERS:
        return f"its input {describe(layer)} is no convolution or linear layer"
    if len(layer.users) > 1:
        others = ", ".join(user.name for user in layer.users if user is not norm)
        return f"{layer.name} is read by {others} too"
    if layer.target in LINEAR and layer.meta["val"].dim() != 2:
        return f"{layer.name} returns {layer.meta['val'].dim()} dimensions, so batch norm is not along its features"
    if layer.target not in LINEAR and layer.meta["val"].dim() != argument(layer, "weight").meta["val"].dim():
        return f"{layer.name} has no batch axis, so batch norm is not along its channels"
    return _unknown_tensor(layer, norm) or _Fold(layer, norm, result)


def _unknown_tensor(layer: Node, norm: Node) -> str | None:
    """Returns why a tensor of layer or norm is not at hand: it is computed, not a parameter."""
    read = [argument(layer, "weight"), argument(layer, "bias")]
    read += [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    computed = [node.name for node in read if isinstance(node, Node) and node.op != "get_attr"]
    return f"{computed[0]} is computed at run time" if computed else None


def _fold(fold: _Fold, tensors: _Tensors) -> None:
    layer, norm = fold.layer, fold.norm
    key = (layer.target in TRANSPOSED, argument(layer, "groups", 1), *_tensors_key(layer, norm))
    if key not in tensors.folded:
        weight, bias = _folded_tensors(tensors.model, layer, norm)
        tensors.folded[key] = _new_parameters(layer, weight, bias, tensors)
    weight_node, bias_node = tensors.folded[key]
    set_argument(layer, "weight", weight_node)
    set_argument(layer, "bias", bias_node)
    fold.result.replace_all_uses_with(layer)
    if "custom" in fold.result.meta:
        layer.meta["custom"] = {**layer.meta.get("custom", {}), **fold.result.meta["custom"]}
    for node in dict.fromkeys((*norm.users, norm)):
        layer.graph.erase_node(node)


def _tensors_key(layer: Node, norm: Node) -> tuple[object, ...]:
    read = [argument(layer, name) for name in ("weight", "bias")]
    read += [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
    read.append(argument(norm, "epsilon"))
    return tuple(read)


def _tensor(model: GraphModule, node: Any) -> torch.Tensor | None:
    return get_attribute(model, str(node.target)).detach().double() if isinstance(node, Node) else None


@torch.no_grad()
def _folded_tensors(model: GraphModule, layer: Node, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and bias with batch norm in them, in the layer's dtype; all but the weight computed in float64.

    ``y = (Wx + b - mean) * gamma / sqrt(var + eps) + beta`` (Ioffe and Szegedy 2015).
    """
    mean, variance = _tensor(model, argument(norm, "running_mean")), _tensor(model, argument(norm, "running_var"))
    weight = get_attribute(model, str(argument(layer, "weight").target)).detach()
    assert mean is not None
    assert variance is not None
    epsilon = argument(norm, "eps")
    factor = torch.rsqrt(variance + (argument(norm, "epsilon") if epsilon is None else epsilon))
    gamma, beta = _tensor(model, argument(norm, "weight")), _tensor(model, argument(norm, "bias"))
    bias = _tensor(model, argument(layer, "bias"))
    factor = factor if gamma is None else factor * gamma
    shift = (torch.zeros_like(mean) if bias is None else bias) - mean
    shift = shift * factor if beta is None else shift * factor + beta
    of_weight = factor.to(torch.promote_types(weight.dtype, torch.float32))
    return scale_outputs(layer, weight, of_weight).to(weight.dtype), shift.to(weight.dtype)


def _new_parameters(layer: Node, weight: torch.Tensor, bias: torch.Tensor, tensors: _Tensors) -> tuple[Node, Node]:
    """Returns the nodes of the new tensors: at the old paths where no one else reads those, else at new ones."""
    weight_node, bias_node = (argument(layer, name) for name in ("weight", "bias"))
    stem = str(weight_node.target).replace(".", "_")
    placed = _place(layer, weight_node, weight, tensors, f"{stem}_folded_")
    return placed, _place(layer, bias_node, bias, tensors, f"{stem}_bias_")


def _place(layer: Node, old: Node | None, value: torch.Tensor, tensors: _Tensors, prefix: str) -> Node:
    model, graph = tensors.model, layer.graph
    if old is not None and tensors.has_one_reader(old):
        set_parameter(model, str(old.target), value)
        return old
    path = tensors.names.new(prefix)
    model.register_parameter(path, nn.Parameter(value, requires_grad=False))
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(path)
    node.meta["val"] = fake_like(argument(layer, "weight").meta["val"], value.shape)
    inherit(node, layer, "fold_batch_norm")
    return node
