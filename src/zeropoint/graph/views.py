"""Views and strides: ``view`` takes those that export saw, ``reshape`` any."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

from zeropoint.graph.compat import OpOverload
from zeropoint.graph.memory import Memory
from zeropoint.graph.source import WRITTEN_KEY

aten = torch.ops.aten

BY_STRIDES = (
    aten.as_strided.default, aten.as_strided_.default, aten.view.dtype, aten.view_as_complex.default,
    aten.view_as_real.default, aten._reshape_alias.default, aten.sym_stride.int, aten.set_.source_Tensor,
)  # fmt: skip
"""Operators that take a tensor as it lies in memory."""
KNOWN = ("aten", "quantized_decomposed", "torchao", "zeropoint", "_operator", "math", "torch", "builtins")
"""Namespaces, and modules of Python functions, of which no other operator does."""


def views_to_reshapes(graph: Graph, changed: set[Node], through: Container[Any] | None = None) -> None:
    """Lets views read any strides, where what they read lies in memory otherwise than export saw.

    Args:
        changed: the nodes whose results lie otherwise; those after them are added.
        through: operators whose results lie as what they read does; None: all.
    """
    for node in graph.nodes if changed else ():
        if not any(source in changed for source in node.all_input_nodes):
            continue
        if node.target is aten.view.default:
            node.meta.setdefault(WRITTEN_KEY, node.target)
            node.target = aten.reshape.default
        if through is None or node.target in through:
            changed.add(node)


def reads_strides(node: Node, memory: Memory) -> bool:
    """True when the node may need its inputs to lie in memory as they do, and no ``reshape`` can stand for it."""
    if node.op != "call_function":
        return node.op == "call_module"
    if node.target is aten.view.default:  # A reshape may copy, and what is written to a copy is lost.
        return memory.is_written(node)
    namespace = node.target.namespace if isinstance(node.target, OpOverload) else node.target.__module__
    return node.target in BY_STRIDES or namespace not in KNOWN
