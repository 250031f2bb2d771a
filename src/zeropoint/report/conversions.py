"""The operators between integers and real values: those of PT2E, and torchao's affine ones by their names."""

from __future__ import annotations

from torch.fx import Node

from zeropoint.graph.source import operator_name
from zeropoint.numerics import ops


def is_quantize(node: Node) -> bool:
    """True for an operator that makes integers."""
    return node.target in ops.QUANTIZE_OPS or _is_named(node, "quantize_affine")


def is_dequantize(node: Node) -> bool:
    """True for an operator that makes real values of integers."""
    return node.target in ops.DEQUANTIZE_OPS or _is_named(node, "dequantize_affine")


def chooses_qparams(node: Node) -> bool:
    """True for an operator that finds scale and zero point at run time."""
    return node.target in ops.CHOOSE_QPARAMS_OPS or _is_named(node, "choose_qparams_affine")


def is_conversion(node: Node) -> bool:
    """True for each of these."""
    return is_quantize(node) or is_dequantize(node) or chooses_qparams(node)


def _is_named(node: Node, name: str) -> bool:
    return node.op == "call_function" and operator_name(node) == name
