"""What holds of every graph that this package made."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from zeropoint.graph.invariants import Invariant
from zeropoint.graph.observers import observer_of
from zeropoint.numerics import ops


def _no_observer(model: GraphModule, node: Node) -> bool:
    return observer_of(model, node) is None


def _scale_is_positive(model: GraphModule, node: Node) -> bool:
    del model
    if node.target not in (ops.QUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR):
        return True
    return isinstance(node.args[1], float) and 0.0 < node.args[1] < float("inf")


def _zero_point_in_range(model: GraphModule, node: Node) -> bool:
    del model
    if node.target not in (ops.QUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR):
        return True
    _, _, zero_point, low, high = node.args[:5]
    return low <= zero_point <= high  # type: ignore[operator]


def _has_value(model: GraphModule, node: Node) -> bool:
    del model
    return node.op not in ("call_function", "placeholder") or "val" in node.meta


CONVERTED = (
    Invariant("no observer is left", _no_observer),
    Invariant("each scale is positive and finite", _scale_is_positive),
    Invariant("each zero point lies in its range", _zero_point_in_range),
    Invariant("each call and each input has a value in its metadata", _has_value),
)
