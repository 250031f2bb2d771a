"""Which nodes have a value that no input can change, and what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.compat import OpOverload, is_tensor_value
from zeropoint.graph.memory import shares_memory_with, written_by
from zeropoint.graph.schema import schema_of

FLOAT_PATH_KEY = "zeropoint_float_path"
"""Metadata of a constant that stands for another: the path of what it was made of."""


def mutated_attributes(graph: Graph) -> set[str]:
    """Returns the paths of the buffers that some operator of the graph writes to, through views too."""
    written: set[str] = set()
    for node in graph.nodes:
        for source in written_by(node):
            written.update(attributes_behind(source))
    return written


def attributes_behind(node: Node) -> set[str]:
    """Returns the paths of the tensors whose memory the node's result may be."""
    found: set[str] = set()
    waiting, seen = [node], set[Node]()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            found.add(str(current.target))
        else:
            waiting.extend(shares_memory_with(current))
    return found


def constant_nodes(model: GraphModule) -> set[Node]:
    """Returns the nodes whose value depends on parameters and constants only, in one walk.

    A buffer that the graph writes to is no constant, and neither is what random or mutating operators return.
    """
    mutated = mutated_attributes(model.graph)
    constant: set[Node] = set()
    for node in model.graph.nodes:
        if node.op == "get_attr":
            if str(node.target) not in mutated and _holds_tensor(model, node):
                constant.add(node)
        elif _is_pure_function(node) and node.all_input_nodes and all(n in constant for n in node.all_input_nodes):
            constant.add(node)
    return constant


def _holds_tensor(model: GraphModule, node: Node) -> bool:
    if is_tensor_value(node.meta.get("val")):
        return True
    owner, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), name, None), torch.Tensor)


def _is_pure_function(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return schema_of(node.target).is_pure
    return getattr(node.target, "__module__", "") in ("_operator", "operator", "math")


def path_behind(constant: Node) -> str:
    """Returns the path of the parameter that a constant is, or of the first of those that it is made of."""
    while constant.op != "get_attr":
        constant = constant.all_input_nodes[0]
    return str(constant.target)


@torch.no_grad()
def evaluate(model: GraphModule, node: Node) -> Any:
    """Returns the value of a constant node, computing what it depends on."""
    if node.op == "get_attr":
        return _value(model, node, {})
    values: dict[Node, Any] = {}
    waiting = [node]
    while waiting:
        current = waiting[-1]
        missing = [n for n in current.all_input_nodes if n not in values]
        if missing:
            waiting.extend(missing)
            continue
        waiting.pop()
        if current not in values:
            values[current] = _value(model, current, values)
    return values[node]


def _value(model: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return get_attribute(model, str(node.target)).detach()
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)
