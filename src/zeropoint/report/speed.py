"""What speed to expect of a quantized model on this processor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.processor import has_integer_dot_product
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, PADS, TRANSPOSED
from zeropoint.numerics import ops


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-accumulates of a converted model for its example inputs, by where they run.

    Args:
        integer: in layers whose input and weight are quantized.
        floating: in the others.
        depthwise_layers: how many quantized convolutions have one input channel per group.
        conversions: quantize operators at run time.
    """

    integer: int
    floating: int
    depthwise_layers: int
    conversions: int


def work_of(converted: GraphModule) -> Work:
    """Returns the multiply-accumulates of a converted model; free sizes count as 1."""
    integer = floating = depthwise = 0
    for node in converted.graph.nodes:
        if node.target not in LAYERS:
            continue
        amount = multiply_accumulates(node)
        is_integer = is_integer_layer(node)
        integer += amount if is_integer else 0
        floating += 0 if is_integer else amount
        depthwise += is_integer and node.target in CONVOLUTIONS and _is_depthwise(node)
    conversions = sum(node.target in ops.QUANTIZE_OPS for node in converted.graph.nodes)
    return Work(integer, floating, depthwise, conversions)


def is_integer_layer(layer: Node) -> bool:
    """True where the input is quantized as well as the weight; with the weight alone, a layer is computed in float."""
    x, weight = argument(layer, "input"), argument(layer, "weight")
    if x.target in PADS and len(x.users) == 1:
        x = x.args[0]
    return x.target in ops.DEQUANTIZE_OPS and weight.target in ops.DEQUANTIZE_OPS


def multiply_accumulates(node: Node) -> int:
    """Returns those of a layer for the example inputs; free sizes count as 1."""
    weight, output = argument(node, "weight").meta["val"], node.meta["val"]
    if node.target in TRANSPOSED:
        return _size(argument(node, "input").meta["val"]) * math.prod(weight.shape[1:])
    return _size(output) * math.prod(weight.shape[1:])


def _size(value: torch.Tensor) -> int:
    return math.prod(size if isinstance(size, int) else 1 for size in value.shape)


def _is_depthwise(node: Node) -> bool:
    return argument(node, "groups") > 1 and argument(node, "weight").meta["val"].shape[1] == 1


def speed_note(work: Work) -> str:
    """Returns why int8 may not be faster than float on this processor; empty where nothing speaks against it.

    Measured with executorch 1.4.1: without a dot product instruction (AVX2), int8 convolutions of XNNPACK take 0.35 to
    1.7 of the float time, depthwise ones more than the float ones; with one (AVX512 VNNI), all gain.
    """
    reasons: list[str] = []
    found = has_integer_dot_product()
    if not found:
        unknown = "it is not known whether this processor has an integer dot product instruction; without one"
        none = "this processor has no integer dot product instruction, so"
        reasons.append(f"{none if found is False else unknown} int8 gains little over float")
        if work.depthwise_layers:
            count = work.depthwise_layers
            reasons.append(
                f"without one, XNNPACK's int8 depthwise convolutions ({count} here) are slower than float ones"
            )
    if work.floating > work.integer:
        reasons.append(f"{work.floating / (work.floating + work.integer):.0%} of the multiply-accumulates stay float")
    return "; ".join(reasons) if work.integer else ""
