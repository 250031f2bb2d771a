"""Coverage: every compute node of a model as quantized or not, with the reason."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import Plan
from zeropoint.graph.batch_norms import counts_batches
from zeropoint.graph.bind import source_of
from zeropoint.graph.compat import OpOverload, is_tensor_list, is_tensor_value
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import module_path, operator_name, source_line

ONLY_CONSTANTS = "it is computed in float: only its weight is quantized"
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
    """Yields the nodes that compute a tensor from the model's inputs, control flow bodies included; no counters."""
    for _, body in bodies(model):
        yield from compute_nodes(body)
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        if node.op != "call_function" or node in constants or node.target is operator.getitem or counts_batches(node):
            continue
        value = node.meta.get("val")
        if isinstance(node.target, OpOverload) and (is_tensor_value(value) or is_tensor_list(value)):
            yield node


def coverage(model: GraphModule, plan: Plan) -> tuple[CoverageRow, ...]:
    """Returns one row per compute node, in the order of the graph. Call it before observers are inserted."""
    constants, quantized = _constants(model), plan.quantized_nodes()
    computing = {site.node for site in plan.specs if site.is_output or source_of(site) not in constants}
    return tuple(_row(node, plan, quantized, computing) for node in compute_nodes(model))


def _constants(model: GraphModule) -> set[Node]:
    return constant_nodes(model).union(*(_constants(body) for _, body in bodies(model)))


def _row(node: Node, plan: Plan, quantized: set[Node], computing: set[Node]) -> CoverageRow:
    """``computing``: the quantized nodes that read or return integers besides their constants."""
    decision = plan.decisions.get(node)
    is_covered = decision is not None and decision.refusal is None
    if node in quantized or is_covered:
        together = {node, *decision.nodes} if decision is not None and is_covered else {node}
        reason = ONLY_CONSTANTS if together & quantized and not together & computing else ""
    else:
        reason = NOT_ANNOTATED if decision is None else decision.refusal or ""
    pattern = decision.pattern if decision is not None else ""
    return CoverageRow(node.name, operator_name(node), module_path(node), source_line(node), pattern, reason)


def quantized_count(rows: Iterable[CoverageRow]) -> int:
    """Returns how many rows are quantized."""
    return sum(row.is_quantized for row in rows)
