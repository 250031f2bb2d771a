"""Let annotations follow a rewritten graph."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY
from zeropoint.annotate.read import read_spec
from zeropoint.core.specs import DerivedQuantizationSpec, EdgeOrNode, SharedQuantizationSpec

Moved = dict[tuple[Node, Node], tuple[Node, Node]]
"""Edges that were, and what they are now: a node reads another one in place of the first."""


def move_annotations(graph: Graph, moved: Moved) -> None:
    """Makes the annotations of all nodes name the edges that are, in place of those that were.

    Annotations, which a quantizer may have given to several nodes, and their specs are not changed: new ones take their
    place.
    """
    if not moved:
        return
    for node in graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None:
            continue
        annotation = node.meta[Q_ANNOTATION_KEY] = copy.copy(annotation)
        wanted = getattr(annotation, "input_qspec_map", None) or {}
        annotation.input_qspec_map = {
            moved.get((source, node), (source, node))[0]: _moved_spec(spec, node, moved)
            for source, spec in wanted.items()
        }
        annotation.output_qspec = _moved_spec(getattr(annotation, "output_qspec", None), node, moved)


def _moved_spec(spec: Any, node: Node, moved: Moved) -> Any:
    if spec is None:
        return None
    match read_spec(spec, node):
        case SharedQuantizationSpec(edge_or_node=place) if _is_moved(place, moved):
            return SharedQuantizationSpec(_moved(place, moved))
        case DerivedQuantizationSpec() as derived if any(_is_moved(place, moved) for place in derived.derived_from):
            return replace(derived, derived_from=[_moved(place, moved) for place in derived.derived_from])
        case _:
            return spec


def _is_moved(place: EdgeOrNode, moved: Moved) -> bool:
    return not isinstance(place, Node) and tuple(place) in moved


def _moved(place: EdgeOrNode, moved: Moved) -> EdgeOrNode:
    return place if isinstance(place, Node) else moved.get(place, place)
