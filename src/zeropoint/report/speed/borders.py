"""Where values pass between integers and float in a converted model, and what stays float in between."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.core.dtypes import is_float
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import operator_name
from zeropoint.report.conversions import is_conversion, is_dequantize, is_quantize
from zeropoint.report.coverage import compute_nodes
from zeropoint.report.operator_table import integer_nodes


@dataclass(frozen=True, slots=True)
class FloatGroup:
    """Float operators that are connected, next to integer ones.

    Args:
        nodes: their names in the graph, in its order.
        operators: the operator of each.
        dequantized: how many tensors they read from integers.
        quantized: how many quantize operators read what they return.
    """

    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    dequantized: int
    quantized: int

    @property
    def is_island(self) -> bool:
        """True between integer operators: values are dequantized for it, and quantized after it."""
        return self.dequantized > 0 and self.quantized > 0

    def __str__(self) -> str:
        counts = Counter(self.operators).most_common()
        named = ", ".join(name if count == 1 else f"{name} {count}" for name, count in counts)
        return f"{self.nodes[0]}: {named}; {self.dequantized} dequantized for it, {self.quantized} quantized after it"


@dataclass(frozen=True, slots=True)
class Borders:
    """Conversions at run time.

    Args:
        quantizes: quantize operators at run time, those that integer operators do as they return included.
        entries: those of them that read a float value: an input, what a float operator returned, or what an integer
            one did, where the scale is found at run time.
        requantizations: those that read integers of another scale, and only change the scale.
        exits: dequantize operators whose values a float operator or the output reads.
        islands: groups of float operators between integer ones.
    """

    quantizes: int
    entries: int
    requantizations: int
    exits: int
    islands: tuple[FloatGroup, ...]


def borders_of(converted: GraphModule) -> Borders:
    """Returns the conversions of a converted model, the bodies of control flow included."""
    parts = list(_parts(converted, converted))
    return Borders(
        sum(part.quantizes for part in parts),
        sum(part.entries for part in parts),
        sum(part.requantizations for part in parts),
        sum(part.exits for part in parts),
        tuple(island for part in parts for island in part.islands),
    )


def _parts(model: GraphModule, whole: GraphModule) -> Iterator[Borders]:
    for _, body in bodies(model):
        yield from _parts(body, whole)
    integer = set(integer_nodes(model, whole))
    constants = constant_nodes(model)
    quantizes = [node for node in model.graph.nodes if is_quantize(node) and node not in constants]
    sources = [node.all_input_nodes[0] for node in quantizes]
    requantizations = sum(is_dequantize(source) for source in sources)
    returned = sum(n.all_input_nodes[0] in integer and constants.issuperset(n.all_input_nodes[1:]) for n in quantizes)
    exits = [node for node in model.graph.nodes if is_dequantize(node) and node not in constants]
    yield Borders(
        len(quantizes),
        len(quantizes) - requantizations - returned,
        requantizations,
        sum(any(not is_quantize(user) and user not in integer for user in node.users) for node in exits),
        tuple(group for group in float_groups(model, integer) if group.is_island),
    )


def float_groups(model: GraphModule, integer: set[Node]) -> Iterator[FloatGroup]:
    """Yields the float operators of one graph that read from integers, or of which something is quantized.

    Args:
        model: a converted graph; the bodies of its control flow are left out.
        integer: its nodes that are computed in integers.
    """
    constants = constant_nodes(model)
    own = (node for node in compute_nodes(model) if node.graph is model.graph and node not in integer)
    floats = [node for node in own if not is_conversion(node) and _holds_floats(node.meta.get("val"))]
    for nodes in _connected(floats):
        read = {source for node in nodes for source in node.all_input_nodes if source not in constants}
        dequantized = sum(is_dequantize(source) or _maker(source) in integer for source in read)
        quantized = sum(is_quantize(reader) for node in nodes for reader in set(_readers(node)))
        if dequantized or quantized:
            yield FloatGroup(tuple(n.name for n in nodes), tuple(map(operator_name, nodes)), dequantized, quantized)


def _holds_floats(value: object) -> bool:
    return any(map(is_float, value)) if isinstance(value, (list, tuple)) else is_float(value)


def _maker(node: Node) -> Node:
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _readers(node: Node) -> Iterator[Node]:
    """Yields what reads a node, or one of the tensors in the list that it returns."""
    for reader in node.users:
        yield from reader.users if reader.target is operator.getitem else (reader,)


def _connected(nodes: list[Node]) -> Iterator[list[Node]]:
    """Yields nodes in groups that are connected, each in the order of the graph."""
    order = {node: i for i, node in enumerate(nodes)}
    seen: set[Node] = set()
    for start in nodes:
        waiting, group = [start], list[Node]()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            group += [current] if current in order else []
            neighbours = [*current.all_input_nodes, *current.users]
            waiting += [other for other in neighbours if other in order or other.target is operator.getitem]
        if group:
            yield sorted(group, key=order.__getitem__)
