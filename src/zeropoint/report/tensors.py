"""The tensors of a converted model: those stored as integers, and what stayed float."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import get_attribute, tensors_of
from zeropoint.graph.constants import FLOAT_PATH_KEY
from zeropoint.numerics import ops
from zeropoint.numerics.granularity import PerAxis, PerGroup
from zeropoint.numerics.quantized_tensor import QuantizedTensor

STORED = (ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_CHANNEL, ops.DEQUANTIZE_PER_CHANNEL_GROUP)

LARGE_SHARE = 0.5
"""A model whose tensors keep more than this share of their bytes in float did not shrink as int8 should."""


def quantized_tensors(converted: GraphModule) -> dict[str, QuantizedTensor]:
    """Returns the constants that are stored as integers, by their path in the float model.

    Those whose zero points are no integers, as embedding tables may have them, are left out.
    """
    found: dict[str, QuantizedTensor] = {}
    for node in converted.graph.nodes:
        if node.target not in STORED:
            continue
        stored = node.args[0]
        is_stored = isinstance(stored, Node) and stored.op == "get_attr"
        if is_stored and not _has_float_zero_points(converted, node):
            path = stored.meta.get(FLOAT_PATH_KEY, str(stored.target))
            found.setdefault(path, _tensor(converted, node, stored))
    return found


def _has_float_zero_points(converted: GraphModule, dequantize: Node) -> bool:
    zero_points = dequantize.args[2]
    return isinstance(zero_points, Node) and get_attribute(converted, str(zero_points.target)).is_floating_point()


def _tensor(converted: GraphModule, dequantize: Node, stored: Node) -> QuantizedTensor:
    arguments: list[Any] = list(dequantize.args)
    integers = get_attribute(converted, str(stored.target))
    if dequantize.target is ops.DEQUANTIZE_PER_TENSOR:
        _, scale, zero_point, low, high = arguments[:5]
        return QuantizedTensor.from_int_repr(integers, scale, zero_point, quant_min=low, quant_max=high)
    scales, zero_points = (get_attribute(converted, str(read.target)) for read in arguments[1:3])
    if dequantize.target is ops.DEQUANTIZE_PER_CHANNEL:
        granularity, (low, high) = PerAxis(arguments[3]), arguments[4:6]
    else:
        granularity, (low, high) = PerGroup(arguments[6]), arguments[3:5]
    return QuantizedTensor.from_int_repr(
        integers, scales, zero_points, quant_min=low, quant_max=high, granularity=granularity
    )


def float_weight_lines(converted: GraphModule, converted_bytes: int) -> list[str]:
    """Returns a warning that names the largest float tensors, where they are most of the model."""
    floats = {name: t for name, t in tensors_of(converted).items() if t.is_floating_point()}
    sizes = {name: t.numel() * t.element_size() for name, t in floats.items()}
    if not converted_bytes or sum(sizes.values()) < LARGE_SHARE * converted_bytes:
        return []
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} ({sizes[name]:,} bytes)" for name in largest)
    share = sum(sizes.values()) / converted_bytes
    return [f"warning   {share:.0%} of the weights' bytes are float: {named}"]
