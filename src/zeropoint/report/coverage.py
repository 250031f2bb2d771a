"""Coverage: every compute node of a model as quantized or not, with the reason."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import Plan
from zeropoint.graph.compat import OpOverload, is_tensor_list, is_tensor_value
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import module_path, operator_name, source_line

NOT_ANNOTATED = "the quantizer did not annotate it"


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One compute node.

    Args:
        node: its name in the graph.
        operator: e.g. ``conv2d``.
        module: path of the innermost module around it.
        source: ``file:line`` of the user's program.
        pattern: the row of the backend's table that it belongs to; empty where there is none.
        reason: why it stays float; empty when it is quantized.
    """

    node: str
    operator: str
    module: str
    source: str
    pattern: str
    reason: str

    @property
    def is_quantized(self) -> bool:
        """True when the node's inputs or output are quantized."""
        return not self.reason

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.source) if part)
        state = f"integer ({self.pattern})" if self.is_quantized else f"float: {self.reason}"
        return f"{self.node} ({self.operator}){f' [{place}]' if place else ''}: {state}"


def compute_nodes(model: GraphModule) -> Iterator[Node]:
    """Yields the nodes that compute a tensor from the model's inputs, control flow bodies included."""
    for _, body in bodies(model):
        yield from compute_nodes(body)
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        if node.op != "call_function" or node in constants or node.target is operator.getitem:
            continue
        value = node.meta.get("val")
        if isinstance(node.target, OpOverload) and (is_tensor_value(value) or is_tensor_list(value)):
            yield node


def coverage(model: GraphModule, plan: Plan) -> tuple[CoverageRow, ...]:
    """Returns one row per compute node, in the order of the graph. Call it before observers are inserted."""
    quantized = plan.quantized_nodes()
    return tuple(_row(node, plan, quantized) for node in compute_nodes(model))


def _row(node: Node, plan: Plan, quantized: set[Node]) -> CoverageRow:
    decision = plan.decisions.get(node)
    pattern = decision.pattern if decision is not None else ""
    if node in quantized:
        reason = ""
    else:
        reason = NOT_ANNOTATED if decision is None else decision.refusal or ""
    return CoverageRow(node.name, operator_name(node), module_path(node), source_line(node), pattern, reason)


def quantized_count(rows: Iterable[CoverageRow]) -> int:
    """Returns how many rows are quantized."""
    return sum(row.is_quantized for row in rows)
