"""Which node of the exported program a node computes, as its ``from_node`` metadata says."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

FROM_NODE_KEY = "from_node"
UNLIFTED = "ExportedProgram.module().unlift()"
"""What export records for the nodes of parameters: they are in no exported graph."""


@dataclass(frozen=True, slots=True)
class NodeSourceDebugInfo:
    """A node of the exported program; all that was made of it has the same.

    Args:
        name: its name, e.g. ``conv2d``.
        graph_id: the identity of its graph.
    """

    name: str
    graph_id: int


def debug_info(node: Node) -> NodeSourceDebugInfo | None:
    """Returns the first node that a node comes from.

    None for inputs, outputs, parameters, what was made of a parameter alone, and what has no history.
    """
    history = node.meta.get(FROM_NODE_KEY)
    if node.op in ("placeholder", "output") or not history:
        return None
    source = history[-1]
    while source.pass_name != UNLIFTED and source.from_node:
        source = source.from_node[-1]
    if source.pass_name == UNLIFTED:
        return None
    return NodeSourceDebugInfo(source.name, source.graph_id)
