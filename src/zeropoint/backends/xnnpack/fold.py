"""Which operators of a converted graph the delegate computes in integers: their q/dq pairs are folded into kernels."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.annotate.match import annotate_by_table
from zeropoint.annotate.plan import DECISION_KEY, Decision
from zeropoint.annotate.rules import Rules
from zeropoint.backends.xnnpack.config import get_default_quantization_config
from zeropoint.backends.xnnpack.sound import DYNAMIC_DQ
from zeropoint.backends.xnnpack.table import TABLE
from zeropoint.graph.bind import reads
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.graph.layers import CLAMPS, LAYERS
from zeropoint.numerics import ops

UNKNOWN = "it returns no float tensor"


def folded(model: GraphModule) -> tuple[set[Node], dict[Node, str]]:
    """Returns the nodes that are computed in integers; and those that a quantizer annotated, but the delegate computes
    in float, with the reason.

    Args:
        model: as ``lower`` lowers it, in q/dq form. What it quantizes is compared with the table, on the same graph
            without quantization. Where no node of it has an annotation any more, each operator between a dequantize
            and a quantize counts as annotated.
    """
    annotated = {node for node in model.graph.nodes if is_valid_annotation(node.meta.get(Q_ANNOTATION_KEY))}
    decisions = {node.name: node.meta.get(DECISION_KEY) for node in _annotated(model).graph.nodes}
    by_name = {node.name: node for node in model.graph.nodes}
    constants = constant_nodes(model)
    integer: set[Node] = set()
    refused: dict[Node, str] = {}
    for node in _computing(model, constants):
        if _is_dynamic(node):
            integer.add(node)
            continue
        decision: Decision | None = decisions.get(node.name)
        covered = (
            [by_name[each.name] for each in decision.nodes if each.name in by_name] if decision is not None else []
        )
        if not _is_quantized(node, covered, constants):
            continue
        if decision is not None and decision.refusal is None:
            integer.update(covered)
        elif node not in integer and (node in annotated or not annotated):
            refused[node] = UNKNOWN if decision is None else decision.refusal or UNKNOWN
    return integer, refused


def _computing(model: GraphModule, constants: set[Node]) -> Iterator[Node]:
    conversions = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)
    for node in model.graph.nodes:
        if node.op == "call_function" and node not in constants and node.target not in conversions:
            yield node


def _annotated(model: GraphModule) -> GraphModule:
    """Returns a copy without quantization of activations, in which the nodes have the decisions of the table."""
    bare = GraphModule(model, deep_copy(model.graph))
    for node in bare.graph.nodes:
        for key in (Q_ANNOTATION_KEY, DECISION_KEY):
            node.meta.pop(key, None)
        if node.target in ops.DEQUANTIZE_OPS:
            quantize = node.args[0]
            if isinstance(quantize, Node) and quantize.target in ops.QUANTIZE_OPS:
                node.replace_all_uses_with(quantize.args[0])  # type: ignore[arg-type]
    remove_dead_code(bare.graph)
    annotate_by_table(bare, TABLE, Rules(everything=get_default_quantization_config()))
    return bare


def _is_dynamic(node: Node) -> bool:
    """True for a layer whose input is quantized at run time."""
    return node.target in LAYERS and any(source.target in DYNAMIC_DQ for _, source in reads(node))


def _is_quantized(node: Node, covered: list[Node], constants: set[Node]) -> bool:
    """True where the graph dequantizes what a node reads, and quantizes what it, or what is fused into it, returns."""
    dequantized = [source for _, source in reads(node) if source.target in ops.DEQUANTIZE_OPS]
    if not any(source not in constants for source in dequantized):
        return False
    following = sole_reader(node)
    ends = [node, *covered, *([following] if following is not None and following.target in CLAMPS else [])]
    readers = [reader for end in ends for reader in end.users]
    return any(reader.target in ops.QUANTIZE_OPS for reader in readers)
