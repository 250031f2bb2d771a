"""Fold batch norm into the convolution or linear layer before it, found by data flow."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import DECISION_KEY, Decision
from zeropoint.annotate.rules import note_erased, origin_of
from zeropoint.graph.attributes import Names, attribute_reads, set_parameter
from zeropoint.graph.batch_norms import BATCH_NORMS, MULTIPLE, is_in_train_mode, keeps_statistics
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.compat import created_from, fake_like
from zeropoint.graph.constants import constant_nodes, evaluate
from zeropoint.graph.emit import Emitter, inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import (
    CONVOLUTIONS,
    LAYERS,
    MOVES,
    PRODUCTS,
    TRANSPOSED,
    as_linear,
    axis_before,
    scale_outputs,
)
from zeropoint.graph.memory import Memory
from zeropoint.graph.no_ops import is_no_op
from zeropoint.graph.source import WRITTEN_KEY, describe

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Fold:
    """A batch norm and the layer that it can be folded into; ``result`` is the node that carries its output."""

    layer: Node
    norm: Node
    result: Node


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
        found = _find(norm, tensors)
        if isinstance(found, str):
            norm.meta[DECISION_KEY] = Decision("batch_norm", (norm,), f"batch norm is not folded: {found}")
        else:
            _fold(found, tensors)


class _Tensors:
    """The model's tensors: which are constant, which are read more than once, and those that are folded so far."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.names = model, Names(model)
        self.constants, self.memory = constant_nodes(model), Memory(model.graph)
        self.folded: dict[tuple[object, ...], tuple[Node, Node]] = {}
        self._readers = Counter[str]()
        for node in attribute_reads(model.graph):
            self._readers[str(node.target)] += len(node.users)

    def has_one_reader(self, node: Node) -> bool:
        """True when no other node of the graph reads the tensor, by whichever ``get_attr`` node."""
        return self._readers[str(node.target)] == 1


def _find(norm: Node, tensors: _Tensors) -> _Fold | str:
    """Returns what can be folded, or the reason why nothing can."""
    if is_in_train_mode(norm):
        return "it was exported in train mode and normalizes by each batch; export model.eval()"
    if not keeps_statistics(norm):
        return "it keeps no running statistics and normalizes by each batch"
    result = norm
    if norm.target in MULTIPLE:
        taken = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
        if len(taken) != len(norm.users) or 0 not in taken or any(user.users for i, user in taken.items() if i):
            return "its statistics are read too"
        result = taken[0]
    between, layer, axis = _before(norm, tensors.memory)
    is_product = layer.target in PRODUCTS and as_linear(layer, tensors.constants) is not None
    if layer.target not in LAYERS and not is_product:
        place = "what comes before it," if between else "its input"
        return f"{place} {describe(layer)} is no convolution or linear layer"
    for node, reader in pairwise((layer, *reversed(between), norm)):
        if len(node.users) > 1:
            others = ", ".join(user.name for user in node.users if user is not reader)
            return f"{node.name} is read by {others} too"
    return _other_axis(layer, axis) or _unknown_tensor(layer, norm, tensors) or _Fold(layer, norm, result)


def _before(norm: Node, memory: Memory) -> tuple[list[Node], Node, int]:
    """Returns the nodes before a batch norm that keep its channels on one axis, what they read, and that axis there."""
    between: list[Node] = []
    node, axis = argument(norm, "input"), 1
    while True:
        before = axis if is_no_op(node, memory) else axis_before(node, axis) if node.target in MOVES else None
        if before is None:
            return between, node, axis
        between.append(node)
        node, axis = node.all_input_nodes[0], before


def _other_axis(layer: Node, axis: int) -> str | None:
    """Returns how batch norm lies where it is not along the layer's channels."""
    dimensions = layer.meta["val"].dim()
    is_convolution = layer.target in (*CONVOLUTIONS, *TRANSPOSED)
    if is_convolution and dimensions != argument(layer, "weight").meta["val"].dim():
        return f"{layer.name} has no batch axis, so batch norm is not along its channels"
    channels = 1 if is_convolution else dimensions - 1
    if axis == channels:
        return None
    return f"it is along axis {axis} of {layer.name}, whose channels are along axis {channels}"


def _unknown_tensor(layer: Node, norm: Node, tensors: _Tensors) -> str | None:
    """Returns why a tensor of layer or norm is not at hand: it is computed, not a parameter."""
    own = [argument(layer, name) for name in ("weight", "bias")] if layer.target in LAYERS else []
    read = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    changing = [node for node in own if isinstance(node, Node) and node not in tensors.constants]
    changing += [n for n in read if isinstance(n, Node) and n.op != "get_attr" and n not in tensors.constants]
    if not changing:
        return None
    does = "written to" if changing[0].op == "get_attr" else "computed"
    return f"{changing[0].name} is {does} at run time"


def _fold(fold: _Fold, tensors: _Tensors) -> None:
    norm = fold.norm
    layer = fold.layer if fold.layer.target in LAYERS else _linear_layer(fold.layer, tensors)
    key = (layer.target in TRANSPOSED, argument(layer, "groups", 1), *_tensors_key(layer, norm))
    if key not in tensors.folded:
        weight, bias = _folded_tensors(tensors.model, layer, norm)
        tensors.folded[key] = _new_parameters(layer, weight, bias, tensors)
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


def _move_origin(fold: _Fold, layer: Node) -> None:
    """Says that what batch norm read is what it returned; what lies before has other values than it had."""
    node: Node = argument(fold.norm, "input")
    node.meta["from_node"] = created_from(fold.result, "fold_batch_norm")
    while node is not layer:
        node = node.all_input_nodes[0]
        node.meta["from_node"] = []


def _linear_layer(product: Node, tensors: _Tensors) -> Node:
    """Replaces a product with a constant matrix by a linear layer, which can have a bias."""
    found = as_linear(product, tensors.constants)
    assert found is not None
    source, transposed, bias = found
    emit = Emitter(product, "fold_batch_norm")
    weight = emit.call(aten.permute.default, transposed, [1, 0])
    tensors.constants.add(weight)
    layer = emit.call(aten.linear.default, source, weight, bias)
    layer.meta[WRITTEN_KEY] = product.target
    product.replace_all_uses_with(layer)
    product.graph.erase_node(product)
    return layer


def _tensors_key(layer: Node, norm: Node) -> tuple[object, ...]:
    read = [argument(layer, name) for name in ("weight", "bias")]
    read += [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
    read.append(argument(norm, "epsilon"))
    return tuple(read)


def _tensor(model: GraphModule, node: Any) -> torch.Tensor | None:
    return evaluate(model, node).double() if isinstance(node, Node) else None


@torch.no_grad()
def _folded_tensors(model: GraphModule, layer: Node, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and bias with batch norm in them, in the layer's dtype; all but the weight computed in float64.

    ``y = (Wx + b - mean) * gamma / sqrt(var + eps) + beta`` (Ioffe and Szegedy 2015).
    """
    mean, variance = _tensor(model, argument(norm, "running_mean")), _tensor(model, argument(norm, "running_var"))
    weight = evaluate(model, argument(layer, "weight"))
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
    stem = _path_behind(weight_node).replace(".", "_")
    placed = _place(layer, weight_node, weight, tensors, f"{stem}_folded_")
    return placed, _place(layer, bias_node, bias, tensors, f"{stem}_bias_")


def _path_behind(node: Node) -> str:
    """Returns the path of a parameter, or of the first of those that a constant is made of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _place(layer: Node, old: Node | None, value: torch.Tensor, tensors: _Tensors, prefix: str) -> Node:
    model, graph = tensors.model, layer.graph
    if old is not None and old.op == "get_attr" and tensors.has_one_reader(old):
        set_parameter(model, str(old.target), value)
        return old
    path = tensors.names.new(prefix)
    model.register_parameter(path, nn.Parameter(value, requires_grad=False))
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(path)
    node.meta["val"] = fake_like(argument(layer, "weight").meta["val"], value.shape)
    inherit(node, layer, "fold_batch_norm")
    tensors.constants.add(node)
    return node
