"""Operators that do nothing: dropout in eval mode, clones, detaches, conversions to what a tensor is."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument
from zeropoint.graph.memory import Memory
from zeropoint.graph.sizes import have_equal_sizes

aten = torch.ops.aten

DROPOUTS = (
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default,
    aten.alpha_dropout.default, aten.alpha_dropout_.default, aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
)  # fmt: skip
COPIES = (aten.clone.default, aten.lift_fresh_copy.default)
CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
"""Operators that return their input itself where it is of the wanted type already."""
ALIASES = (aten.detach.default, aten.alias.default)


def erase_no_ops(model: GraphModule) -> list[Node]:
    """Removes the operators that do nothing, and returns them: each would break a pattern."""
    memory = Memory(model.graph)
    erased: list[Node] = []
    for node in list(model.graph.nodes):
        if is_no_op(node, memory):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            erased.append(node)
    return erased


def is_no_op(node: Node, memory: Memory) -> bool:
    """True when the node returns the values of its first argument, and no one can tell the two apart."""
    if node.target in DROPOUTS:
        return not argument(node, "train")
    if node.target in COPIES:  # A copy is one for the sake of what is written to it, or to what it was made of.
        written = any(memory.is_written(each) for each in (node, *node.all_input_nodes))
        return not written and argument(node, "memory_format") is None
    if node.target in CONVERSIONS:
        return not argument(node, "copy") and argument(node, "memory_format") is None and _keeps_type(node)
    if node.target is aten.expand.default:
        return have_equal_sizes(node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape)
    return node.target in ALIASES


def _keeps_type(node: Node) -> bool:
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
