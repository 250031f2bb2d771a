"""Constants computed once, in graphs that others made; ``convert_pt2e`` folds what it quantizes."""

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import Names, attribute_reads, owner_and_name
from zeropoint.graph.constants import constant_nodes, evaluate
from zeropoint.graph.graph_pass import recompile, remove_dead_code
from zeropoint.numerics import ops
from zeropoint.passes.run_time import CONVERT_ELEMENT_TYPE

__all__ = ["constant_fold"]

STAYING = (*ops.DEQUANTIZE_OPS, CONVERT_ELEMENT_TYPE)
"""Operators that a backend is to find."""


def constant_fold(gm: GraphModule, constraint_fn: Callable[[Node], bool] | None = None) -> None:
    """Replaces the operators that compute tensors from constants alone by buffers ``_frozen_paramN``, in place.

    What dequantize operators and conversions to float16 give stays computed, so that a backend finds them, and so do
    numbers. Tensors that nothing reads afterwards are dropped.

    Args:
        gm: any graph module.
        constraint_fn: says of an operator whether it may be replaced; None: each may.
    """
    graph, names = gm.graph, Names(gm)
    for node, value in _folded(gm, constraint_fn).items():
        path = names.new("_frozen_param")
        gm.register_buffer(path, value)
        with graph.inserting_before(node):
            frozen = graph.get_attr(path)
        frozen.meta = dict(node.meta)
        node.replace_all_uses_with(frozen)
        graph.erase_node(node)
    _drop_unread(gm)
    recompile(gm)


def _folded(gm: GraphModule, constraint_fn: Callable[[Node], bool] | None) -> dict[Node, torch.Tensor]:
    """Returns what the last operators of each chain that may be replaced give, in the graph's order."""
    found: dict[Node, torch.Tensor] = {}
    gone: set[Node] = set()
    for node in reversed(_foldable(gm)):
        if all(user in gone for user in node.users):
            gone.add(node)
        elif constraint_fn is None or constraint_fn(node):
            value = evaluate(gm, node)
            if isinstance(value, torch.Tensor):
                found[node] = value
                gone.add(node)
    return dict(reversed(found.items()))


def _foldable(gm: GraphModule) -> list[Node]:
    """Returns the operators that read constants alone, and nothing that stays computed."""
    constants = constant_nodes(gm)
    foldable: list[Node] = []
    stays: set[Node] = set()
    for node in gm.graph.nodes:
        if node not in constants or node.op == "get_attr":
            continue
        if node.target in STAYING or any(read in stays for read in node.all_input_nodes):
            stays.add(node)
        else:
            foldable.append(node)
    return foldable


def _drop_unread(gm: GraphModule) -> None:
    """Removes dead operators, and the tensors of which no node is left."""
    before = {str(node.target) for node in attribute_reads(gm.graph)}
    remove_dead_code(gm.graph)
    after = {str(node.target) for node in attribute_reads(gm.graph)}
    for path in before - after:
        owner, name = owner_and_name(gm, path)
        delattr(owner, name)
