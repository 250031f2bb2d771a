"""Operators that do nothing: dropout in eval mode, clones, detaches, conversions to what a tensor is."""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.memory import Memory
from zeropoint.graph.sizes import have_equal_sizes
from zeropoint.graph.views import reads_strides, views_to_reshapes

aten = torch.ops.aten

DROPOUTS = (
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default,
    aten.alpha_dropout.default, aten.alpha_dropout_.default, aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
)  # fmt: skip
COPIES = (aten.clone.default, aten.lift_fresh_copy.default)
REORDERING = (aten.contiguous.default, aten.clone.default)
"""Operators that copy a tensor in a given order, or return it itself where it lies so."""
IN_ORDER = (torch.contiguous_format, 0)
"""That memory format, and as a schema gives it, a number."""
CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
"""Operators that return their input itself where it is of the wanted type already."""
ALIASES = (aten.detach.default, aten.alias.default)


@graph_pass
def erase_no_ops(model: GraphModule) -> list[Node]:
    """Removes the operators that do nothing, and returns them: each would break a pattern.

    Those that only put a tensor in order in memory are such, unless another operator needs that order.
    """
    memory = Memory(model.graph)
    nodes = list(model.graph.nodes)
    reordering = set(_reordering(nodes, memory))
    views_to_reshapes(model.graph, reordering.copy())
    apart = _returned_apart(nodes, memory)
    erased = [node for node in nodes if node in reordering or (is_no_op(node, memory) and node not in apart)]
    for node in erased:
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)
    return erased


def _reordering(nodes: list[Node], memory: Memory) -> list[Node]:
    """Returns the copies in order that nothing needs; one that is returned is what the caller asked for."""
    found = [
        node
        for node in nodes
        if node.target in REORDERING
        and argument(node, "memory_format") in IN_ORDER
        and not _is_written(node, memory)
        and all(user.op != "output" for user in node.users)
    ]
    return [] if found and any(reads_strides(node, memory) for node in nodes) else found


def _returned_apart(nodes: list[Node], memory: Memory) -> set[Node]:
    """Returns the copies that keep results apart from the inputs and from one another.

    The caller may write to either; bodies of control flow must not return one tensor twice, nor what they are given.
    """
    returned = [node for last in nodes if last.op == "output" for node in last.all_input_nodes]
    origins = {node: _copied_from(node, memory) for node in returned}
    count = Counter(origins.values())
    apart: set[Node] = set()
    for node, origin in origins.items():
        own = memory.own(node)
        is_input = isinstance(origin, str) or origin.op == "placeholder"
        if isinstance(own, Node) and own.target in COPIES and (is_input or count[origin] > 1):
            apart.add(own)
    return apart


def _copied_from(node: Node, memory: Memory) -> Node | str:
    """Returns what ``memory.own`` does, and of a copy that of what it copies."""
    own = memory.own(node)
    while isinstance(own, Node) and own.target in COPIES:
        own = memory.own(own.all_input_nodes[0])
    return own


def is_no_op(node: Node, memory: Memory) -> bool:
    """True when the node returns the values of its first argument, and no one can tell the two apart."""
    if node.target in DROPOUTS:
        return not argument(node, "train")
    if node.target in COPIES:  # A copy is one for the sake of what is written to it, or to what it was made of.
        return not _is_written(node, memory) and argument(node, "memory_format") is None
    if node.target in CONVERSIONS:
        return not argument(node, "copy") and argument(node, "memory_format") is None and _keeps_type(node)
    if node.target is aten.expand.default:
        return have_equal_sizes(node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape)
    return node.target in ALIASES


def _is_written(node: Node, memory: Memory) -> bool:
    return any(memory.is_written(each) for each in (node, *node.all_input_nodes))


def _keeps_type(node: Node) -> bool:
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
