"""What must hold of a graph after a pipeline, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.core.errors import GraphError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import describe


@dataclass(frozen=True, slots=True)
class Invariant:
    """A sentence about every node, and the function that says whether it holds for one."""

    sentence: str
    holds: Callable[[GraphModule, Node], bool]


def check_invariants(model: GraphModule, invariants: tuple[Invariant, ...], pipeline: str) -> None:
    """Raises when a node breaks an invariant, in the bodies of control flow too.

    Raises:
        GraphError: names the pipeline, the invariant and the node; it is an error of zeropoint or of a custom pass.
    """
    for _, body in bodies(model):
        check_invariants(body, invariants, pipeline)
    for node in model.graph.nodes:
        for invariant in invariants:
            if not invariant.holds(model, node):
                raise GraphError(f"after {pipeline}: {invariant.sentence!r} does not hold", where=describe(node))
