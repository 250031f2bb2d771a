"""Numbers by which the nodes of an exported program are found again in what is made of it."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

from zeropoint.core.errors import SpecError
from zeropoint.graph.trace import bfs_trace_with_node_process

CUSTOM_KEY = "custom"
NUMERIC_DEBUG_HANDLE_KEY = "numeric_debug_handle"


def generate_numeric_debug_handle(ep: ExportedProgram) -> None:
    """Gives each node of a program that is no input and no output a number, ``meta["custom"]["numeric_debug_handle"]``.

    Prepare, convert and lowering keep them. A node that has one keeps it, and the others get higher ones.

    Raises:
        SpecError: it is no exported program: the numbers are given before ``.module()``.
    """
    if not isinstance(ep, ExportedProgram):
        remedy = "Give what torch.export.export returns, and take its .module() afterwards."
        where = "generate_numeric_debug_handle"
        raise SpecError(f"got {type(ep).__name__}, not an exported program", where=where, remedy=remedy)
    nodes: list[Node] = []
    bfs_trace_with_node_process(ep, nodes.append)
    last = max((_handles(node).get(NUMERIC_DEBUG_HANDLE_KEY, 0) for node in nodes), default=0)
    for node in nodes:
        if NUMERIC_DEBUG_HANDLE_KEY not in _handles(node):
            last += 1
            node.meta[CUSTOM_KEY] = {**_handles(node), NUMERIC_DEBUG_HANDLE_KEY: last}  # Nodes may share a dictionary.


def _handles(node: Node) -> dict[str, int]:
    return node.meta.get(CUSTOM_KEY) or {}
