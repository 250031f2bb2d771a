"""Which nodes of a graph share memory, and which are read again after another node wrote to it.

Exported graphs are not functional: ``y[0].add_(1)`` is a ``select`` and an ``add_``, after which ``y`` itself is read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from zeropoint.graph.bind import bind
from zeropoint.graph.compat import OpOverload
from zeropoint.graph.schema import schema_of

aten = torch.ops.aten
UNDECLARED = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
    aten.type_as.default,
)  # fmt: skip
"""Operators that may return their first argument itself, though their schema does not say so."""


def shares_memory_with(node: Node) -> Iterator[Node]:
    """Yields the nodes whose memory the node's result may be: what it is a view of, or writes to."""
    if node.target is operator.getitem or node.target in UNDECLARED:
        if isinstance(node.args[0], Node):
            yield node.args[0]
    elif isinstance(node.target, OpOverload):
        yield from _arguments(node, schema_of(node.target).shared)


def written_by(node: Node) -> Iterator[Node]:
    """Yields the nodes whose memory the node writes to."""
    if isinstance(node.target, OpOverload):
        yield from _arguments(node, schema_of(node.target).written)


def _arguments(node: Node, names: tuple[str, ...]) -> Iterator[Node]:
    """Yields the nodes that are passed as arguments of these names, those in lists too."""
    bound = bind(node) if names else {}
    for name in names:
        value = bound.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Node):
                yield item


class Memory:
    """The memory of each node, by the node that made it, or the path of the attribute that it is; found in one walk.

    A node's value may be replaced by a copy, such as a quantized one, unless that cuts off a later write: the memory is
    an attribute's, or an older node reads it after the write.
    """

    def __init__(self, graph: Graph) -> None:
        self._nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._origin: dict[Node, Node | str] = {}
        self._writes: dict[Node | str, list[int]] = defaultdict(list)
        self._rewritten: set[Node | str] = set()
        for node in self._nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        shared = next(shares_memory_with(node), None)
        own = str(node.target) if node.op == "get_attr" else node
        self._origin[node] = own if shared is None else self._origin[shared]
        for source in node.all_input_nodes:
            writes = self._writes.get(self._origin[source])
            if writes and writes[-1] > self._position[source]:
                self._rewritten.add(self._origin[source])
        for written in written_by(node):
            origin = self._origin[written]
            self._writes[origin].append(self._position[node])
            if isinstance(origin, str):
                self._rewritten.add(origin)

    def own(self, node: Node) -> Node | str:
        """Returns the node that made the memory of this node's value, or the path of the attribute that it is."""
        return self._origin[node]

    def is_rewritten(self, node: Node) -> bool:
        """True when the node's value depends on when it is read: others write to its memory."""
        return self._origin.get(node) in self._rewritten

    def is_written(self, node: Node) -> bool:
        """True when an operator writes to the node's memory, at any time; False for nodes that came later."""
        origin = self._origin.get(node)
        return origin is not None and bool(self._writes.get(origin))

    def write_after(self, node: Node) -> Node | None:
        """Returns the node whose write a copy of this node's value would cut off; None where there is none."""
        return self._last_write(node, self._position.get(node, 0) + 1)

    def write_from(self, node: Node) -> Node | None:
        """Returns what ``write_after`` does, or the node itself where it writes."""
        return self._last_write(node, self._position.get(node, 0))

    def _last_write(self, node: Node, start: int) -> Node | None:
        if not self.is_rewritten(node):
            return None
        last = self._writes[self._origin[node]][-1]
        return self._nodes[last] if last >= start else None


def remove_dead_writes(graph: Graph) -> None:
    """Erases operators whose result nothing reads and whose writes nothing sees, with what only they read.

    Everything may see a write to an attribute or an input, and what comes later one to memory that the graph made.
    """
    memory = Memory(graph)
    read_later: set[Node | str] = set()
    for node in reversed(graph.nodes):
        if not node.users and (not node.is_impure() or _writes_unseen(node, memory, read_later)):
            graph.erase_node(node)
        else:
            read_later.update(memory.own(source) for source in node.all_input_nodes)


def _writes_unseen(node: Node, memory: Memory, read_later: set[Node | str]) -> bool:
    owners = [memory.own(written) for written in written_by(node)]
    return bool(owners) and all(
        isinstance(owner, Node) and owner.op == "call_function" and owner not in read_later for owner in owners
    )
