"""Walks over all nodes of a program."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from zeropoint.core.errors import CaptureError
from zeropoint.graph.graph_pass import bodies


def bfs_trace_with_node_process(model: ExportedProgram | GraphModule, node_op: Callable[[Node], object]) -> None:
    """Calls a function with each node that is no input and no output, graph by graph.

    The bodies of control flow operators follow the graph that calls them: both branches of ``cond``, condition and body
    of ``while_loop``, and those of ``scan`` and ``map``; each once.

    Raises:
        CaptureError: the model is neither an exported program nor a graph module.
    """
    graph_module = model.graph_module if isinstance(model, ExportedProgram) else model
    if not isinstance(graph_module, GraphModule):
        remedy = "Give what torch.export.export returns, or its .module()."
        raise CaptureError(f"got {type(model).__name__}, not an exported program or graph module", remedy=remedy)
    waiting = deque([graph_module])
    while waiting:
        current = waiting.popleft()
        for node in current.graph.nodes:
            if node.op not in ("placeholder", "output"):
                node_op(node)
        waiting.extend(body for _, body in bodies(current))
