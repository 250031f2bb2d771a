"""Convolutions and linear layers whose output a batch norm reads, found by data flow."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import DECISION_KEY, Decision
from zeropoint.graph.attributes import Names, attribute_reads
from zeropoint.graph.batch_norms import MULTIPLE, STAYS, keeps_statistics
from zeropoint.graph.bind import argument
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.emit import Emitter
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, MOVES, PRODUCTS, TRANSPOSED, as_linear, axis_before
from zeropoint.graph.memory import Memory
from zeropoint.graph.no_ops import is_no_op
from zeropoint.graph.source import WRITTEN_KEY, describe

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class NormalizedLayer:
    """A layer and the batch norm that could be folded into it.

    Args:
        layer: a convolution or linear layer, or a product with a constant matrix.
        norm: the batch norm.
        result: the node that carries its output.
        reader: the only node that reads the layer: the batch norm, or the first of the nodes between the two, which do
            nothing or only move values.
    """

    layer: Node
    norm: Node
    result: Node
    reader: Node


class Tensors:
    """The model's tensors: which are constant, and which are read more than once."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.names = model, Names(model)
        self.constants, self.memory = constant_nodes(model), Memory(model.graph)
        self._readers = Counter[str]()
        for node in attribute_reads(model.graph):
            self._readers[str(node.target)] += len(node.users)

    def has_one_reader(self, node: Node) -> bool:
        """True when no other node of the graph reads the tensor, by whichever ``get_attr`` node."""
        return self._readers[str(node.target)] == 1


def find_layer(norm: Node, tensors: Tensors) -> NormalizedLayer | str:
    """Returns the layer that a batch norm can be folded into, or the reason why there is none."""
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
    reason = _other_axis(layer, axis) or _unknown_tensor(layer, norm, tensors)
    return reason or NormalizedLayer(layer, norm, result, between[-1] if between else norm)


def refuse(norm: Node, reason: str) -> None:
    """Notes why a batch norm is not folded."""
    norm.meta[DECISION_KEY] = Decision(STAYS, (norm,), f"batch norm is not folded: {reason}")


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


def _unknown_tensor(layer: Node, norm: Node, tensors: Tensors) -> str | None:
    """Returns why a tensor of layer or norm is not at hand: it is computed, not a parameter."""
    own = [argument(layer, name) for name in ("weight", "bias")] if layer.target in LAYERS else []
    read = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    changing = [node for node in own if isinstance(node, Node) and node not in tensors.constants]
    changing += [n for n in read if isinstance(n, Node) and n.op != "get_attr" and n not in tensors.constants]
    if not changing:
        return None
    does = "written to" if changing[0].op == "get_attr" else "computed"
    return f"{changing[0].name} is {does} at run time"


def linear_layer(product: Node, tensors: Tensors, pass_name: str) -> Node:
    """Replaces a product with a constant matrix by a linear layer, which can have a bias; returns that."""
    found = as_linear(product, tensors.constants)
    assert found is not None
    source, transposed, bias = found
    emit = Emitter(product, pass_name)
    weight = emit.call(aten.permute.default, transposed, [1, 0])
    tensors.constants.add(weight)
    layer = emit.call(aten.linear.default, source, weight, bias)
    layer.meta[WRITTEN_KEY] = product.target
    product.replace_all_uses_with(layer)
    product.graph.erase_node(product)
    return layer
