"""The graph of a model as a drawing: its operators in layers, integer and float ones in two colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.source import module_path, operator_name, source_line
from zeropoint.report.conversions import is_conversion
from zeropoint.report.operator_table import integer_nodes

WIDTH, HEIGHT = 150, 34
"""Of a box."""
ACROSS, DOWN = 18, 30
"""Between boxes."""
MARGIN = 60
"""Around the drawing: edges that pass several layers bend into it."""
SWEEPS = 4
"""How often the layers are put in order by what their boxes are connected to."""
MOST_LETTERS = 22


@dataclass(frozen=True, slots=True)
class Box:
    """An operator, an input or the output.

    Args:
        name: of the node.
        kind: ``"integer"``, ``"float"`` or ``"end"``.
        title: what is shown of it: operator, module and source line.
        label, place: its two lines of text.
        x, y: of its upper left corner.
    """

    name: str
    kind: str
    title: str
    label: str
    place: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Drawing:
    """Boxes and the paths between them, with the size of the whole.

    Args:
        width, height: of the drawing.
        boxes: the nodes.
        edges: paths, as SVG writes them.
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[str, ...]


def drawing_of(converted: GraphModule) -> Drawing:
    """Returns the drawing of a converted model: what computes from its inputs, without constants and conversions."""
    integer = set(integer_nodes(converted, converted))
    constants = constant_nodes(converted)
    shown = [node for node in converted.graph.nodes if _is_shown(node, constants)]
    known = set(shown)
    sources = {node: tuple(_sources(node, known)) for node in shown}
    layers = _ordered(_layers(sources), sources)
    width = max((len(layer) for layer in layers), default=1) * (WIDTH + ACROSS) - ACROSS
    places = {node: place for i, layer in enumerate(layers) for node, place in _places(layer, i, width)}
    boxes = tuple(_box(node, places[node], integer) for node in shown)
    edges = tuple(_path(places[source], places[node]) for node in shown for source in sources[node])
    return Drawing(width + 2 * MARGIN, len(layers) * (HEIGHT + DOWN) + MARGIN, boxes, edges)


def _is_shown(node: Node, constants: set[Node]) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and node not in constants and not _is_passed_through(node)


def _is_passed_through(node: Node) -> bool:
    return is_conversion(node) or operator_name(node) == "getitem"


def _sources(node: Node, shown: set[Node]) -> Iterator[Node]:
    """Yields the shown nodes that a node reads, through conversions and ``getitem``."""
    waiting, seen = list(node.all_input_nodes), set[Node]()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in shown:
            yield current
        elif current.op == "call_function":
            waiting.extend(current.all_input_nodes)


def _layers(sources: dict[Node, tuple[Node, ...]]) -> list[list[Node]]:
    """Returns the nodes by the longest way to them from an input."""
    depth: dict[Node, int] = {}
    for node, read in sources.items():
        depth[node] = 1 + max((depth[source] for source in read), default=-1)
    layers: defaultdict[int, list[Node]] = defaultdict(list)
    for node, found in depth.items():
        layers[found].append(node)
    return [layers[i] for i in sorted(layers)]


def _ordered(layers: list[list[Node]], sources: dict[Node, tuple[Node, ...]]) -> list[list[Node]]:
    """Returns each layer in the order of the mean place of what its nodes read and who reads them."""
    readers: defaultdict[Node, list[Node]] = defaultdict(list)
    for node, read in sources.items():
        for source in read:
            readers[source].append(node)
    place = {node: _share(i, layer) for layer in layers for i, node in enumerate(layer)}
    for sweep in range(SWEEPS):
        near = sources if sweep % 2 == 0 else readers
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            layer.sort(key=lambda node: _mean([place[other] for other in near.get(node, ())], place[node]))
            place.update({node: _share(i, layer) for i, node in enumerate(layer)})
    return layers


def _share(index: int, layer: Sequence[Node]) -> float:
    return (index + 0.5) / len(layer)


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _places(layer: Sequence[Node], index: int, width: float) -> Iterator[tuple[Node, tuple[float, float]]]:
    free = width - (len(layer) * (WIDTH + ACROSS) - ACROSS)
    for i, node in enumerate(layer):
        yield node, (MARGIN + free / 2 + i * (WIDTH + ACROSS), MARGIN / 2 + index * (HEIGHT + DOWN))


def _box(node: Node, place: tuple[float, float], integer: set[Node]) -> Box:
    kind = "integer" if node in integer else "float" if node.op == "call_function" else "end"
    label = operator_name(node) if kind != "end" else node.name
    module = module_path(node) if kind != "end" else ""
    title = "\n".join(part for part in (node.name, label, module, source_line(node)) if part)
    return Box(node.name, kind, title, _short(label), _short(module), *place)


def _short(text: str) -> str:
    """Returns the end of a path that is too long: what tells it from others."""
    return text if len(text) <= MOST_LETTERS else f"…{text[1 - MOST_LETTERS :]}"


def _path(source: tuple[float, float], reader: tuple[float, float]) -> str:
    """Returns a line from below one box to above another; where it passes layers, around what lies between."""
    x, y, end_x, end_y = source[0] + WIDTH / 2, source[1] + HEIGHT, reader[0] + WIDTH / 2, reader[1]
    if end_y - y <= DOWN:
        return f"M{x:.0f} {y:.0f}C{x:.0f} {y + DOWN / 2:.0f} {end_x:.0f} {end_y - DOWN / 2:.0f} {end_x:.0f} {end_y:.0f}"
    side = max(x, end_x) + WIDTH / 2 + ACROSS / 2
    bend, straight = y + DOWN, end_y - DOWN
    return (
        f"M{x:.0f} {y:.0f}C{side:.0f} {bend:.0f} {side:.0f} {bend:.0f} {side:.0f} {bend + DOWN:.0f}"
        f"L{side:.0f} {straight - DOWN:.0f}"
        f"C{side:.0f} {straight:.0f} {side:.0f} {straight:.0f} {end_x:.0f} {end_y:.0f}"
    )
