"""Where values pass between integers and float in a converted model, and what stays float in between."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import operator_name
from zeropoint.report.conversions import is_conversion, is_dequantize, is_quantize
from zeropoint.report.coverage import compute_nodes
from zeropoint.report.operator_table import integer_nodes


@dataclass(frozen=True, slots=True)
class Island:
    """Float operators that are connected, between integer ones: values are dequantized for them and quantized after.

    Args:
        nodes: their names in the graph, in its order.
        operators: the operator of each.
    """

    nodes: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Borders:
    """Conversions at run time.

    Args:
        quantizes: quantize operators at run time, those that integer operators do as they return included.
        entries: those of them that read a float value: an input, what a float operator returned, or what an integer
            one did, where the scale is found at run time.
        requantizations: those that read integers of another scale, and only change the scale.
        exits: dequantize operators whose values a float operator or the output reads.
        islands: float operators between integer ones.
    """

    quantizes: int
    entries: int
    requantizations: int
    exits: int
    islands: tuple[Island, ...]


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
        tuple(_islands(model, integer, constants)),
    )


def _islands(model: GraphModule, integer: set[Node], constants: set[Node]) -> Iterator[Island]:
    own = set(model.graph.nodes)
    floats = [n for n in compute_nodes(model) if n in own and n not in integer and not is_conversion(n)]
    for nodes in _connected(floats):
        read = {source for node in nodes for source in node.all_input_nodes if source not in constants}
        readers = {user for node in nodes for user in node.users}
        is_between = any(is_dequantize(source) or source in integer for source in read)
        if is_between and any(is_conversion(user) for user in readers):
            yield Island(tuple(node.name for node in nodes), tuple(operator_name(node) for node in nodes))


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
