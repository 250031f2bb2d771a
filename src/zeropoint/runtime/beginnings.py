"""The beginnings of a graph: files of a part of the model, to find the first operator that goes wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Sequence

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.chains import ancestors, sole_reader
from zeropoint.graph.compat import return_tuple
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.graph.layers import CLAMPS
from zeropoint.numerics import ops

FUSED = (*CLAMPS, torch.ops.aten.clamp.default)
"""Activations that a backend may compute with the layer before them: the two are not cut apart."""
Q_AND_DQ = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)


def first_place(candidates: Sequence[Node], ends: Sequence[Node], goes_wrong: Callable[[Node], bool]) -> Node | None:
    """Returns an operator with which the graph goes wrong, while it does not with those before it; None for none.

    Args:
        candidates: operators after which the graph can be cut, in its order.
        ends: nodes that are searched backwards from, the first that goes wrong of them.
        goes_wrong: of the beginning that ends with a place. Asked about few of them: the search is a bisection, again
            for each branch that goes wrong.
    """
    ask = functools.cache(goes_wrong)
    known = set(candidates)
    wrong = next((place for end in ends for place in _nearest([end], known) if ask(place)), None)
    culprit = None
    while wrong is not None:
        before = ancestors(wrong)
        culprit = _bisected([place for place in candidates if place in before or place is wrong], ask)
        wrong = next((place for place in _nearest(culprit.all_input_nodes, known) if ask(place)), None)
    return culprit


def _bisected(candidates: list[Node], goes_wrong: Callable[[Node], bool]) -> Node:
    """Returns a place that goes wrong after one that does not, of candidates of which the last goes wrong."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if goes_wrong(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return candidates[low]


def _nearest(nodes: Iterable[Node], candidates: Container[Node]) -> list[Node]:
    """Returns the candidates among nodes, or those that are met first on the way back from them."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        current = waiting.pop()
        if current in candidates:
            found[current] = None
        elif current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return list(found)


def places(converted: GraphModule) -> list[Node]:
    """Returns the operators after which the graph can be cut, in its order."""
    return [node for node in converted.graph.nodes if _is_place(node)]


def _is_place(node: Node) -> bool:
    """True for operators after which the graph can be cut: not between a layer and what is fused into it."""
    if node.op != "call_function" or node.target in Q_AND_DQ or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if any(source.target in ops.DEQUANTIZE_OPS for source in node.all_input_nodes) and output_quantize(node) is None:
        following = sole_reader(node)
        return following is None or following.target not in FUSED or output_quantize(following) is None
    return bool(node.all_input_nodes)


def output_quantize(node: Node) -> Node | None:
    """Returns the quantize that is the node's only reader."""
    reader = sole_reader(node)
    return reader if reader is not None and reader.target is ops.QUANTIZE_PER_TENSOR else None


def beginning(converted: GraphModule, names: Sequence[str]) -> GraphModule:
    """Returns a copy of the model that returns a tuple of the nodes of these names, with their q/dq where they have."""
    part = deep_copy(converted)
    by_name = {node.name: node for node in part.graph.nodes}
    output = next(node for node in part.graph.nodes if node.op == "output")
    output.args = (tuple(_with_q_and_dq(by_name[name], output) for name in names),)
    remove_dead_code(part.graph)
    return_tuple(part.graph, len(names))
    return GraphModule(part, part.graph)


def _with_q_and_dq(node: Node, output: Node) -> Node:
    quantize = output_quantize(node)
    if quantize is None:
        return node
    with node.graph.inserting_before(output):
        dequantized = node.graph.call_function(ops.DEQUANTIZE_PER_TENSOR, (quantize, *quantize.args[1:]))
    dequantized.meta["val"] = node.meta["val"]
    return dequantized
