"""Where the multiply-accumulates of a converted model run: in integers or in float, node by node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from zeropoint.graph.bind import argument
from zeropoint.graph.compat import size_in_example
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, PADS, PRODUCTS, TRANSPOSED
from zeropoint.graph.source import module_path, operator_name
from zeropoint.numerics import ops
from zeropoint.passes.recurrent import RECURRENT

aten = torch.ops.aten
FACTORS: dict[Any, tuple[str, str]] = {
    **dict.fromkeys(LAYERS, ("input", "weight")),
    **PRODUCTS,
    aten.bmm.default: ("self", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}
"""Operators that multiply and accumulate, and the names of what they multiply."""
OTHERS = (
    aten.einsum.default, aten.bilinear.default, aten.scaled_dot_product_attention.default, *RECURRENT,
)  # fmt: skip
"""Operators that hide products: no backend computes them in integers, and torch counts them."""


@dataclass(frozen=True, slots=True)
class NodeWork:
    """The multiply-accumulates of one node, for the sizes that the model was exported with.

    Args:
        node: its name in the graph.
        operator: e.g. ``conv2d``.
        module: path of the innermost module around it.
        multiply_accumulates: how many; in the body of a loop, those of one pass.
        is_integer: both factors are quantized; with the weight alone, a layer is computed in float.
        is_depthwise: a convolution with one input channel per group.
    """

    node: str
    operator: str
    module: str
    multiply_accumulates: int
    is_integer: bool
    is_depthwise: bool = False


def node_work(converted: GraphModule) -> tuple[NodeWork, ...]:
    """Returns the work of each node that multiplies and accumulates, in the order of the graph."""
    return tuple(_work(converted))


def integer_and_float(work: Iterable[NodeWork]) -> tuple[int, int]:
    """Returns the multiply-accumulates that are computed in integers, and those in float."""
    amounts = {True: 0, False: 0}
    for node in work:
        amounts[node.is_integer] += node.multiply_accumulates
    return amounts[True], amounts[False]


def _work(model: GraphModule) -> Iterator[NodeWork]:
    for _, body in bodies(model):
        yield from _work(body)
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        if node in constants or (node.target not in FACTORS and node.target not in OTHERS):
            continue
        amount, is_integer = multiply_accumulates(node), node.target in FACTORS and is_integer_layer(node)
        yield NodeWork(node.name, operator_name(node), module_path(node), amount, is_integer, _is_depthwise(node))


def is_integer_layer(node: Node) -> bool:
    """True where both factors are quantized; with the weight alone, a layer is computed in float."""
    return all(_is_quantized(argument(node, name)) for name in FACTORS[node.target])


def _is_quantized(factor: Node) -> bool:
    if factor.target in PADS and len(factor.users) == 1:
        factor = factor.all_input_nodes[0]
    return factor.target in ops.DEQUANTIZE_OPS


def multiply_accumulates(node: Node) -> int:
    """Returns those of an operator that multiplies and accumulates, for the sizes that the model was exported with."""
    if node.target not in FACTORS:
        return _counted(node)
    first, second = (_shape(argument(node, name)) for name in FACTORS[node.target])
    if node.target in TRANSPOSED:
        return math.prod(first) * math.prod(second[1:])
    each = math.prod(second[1:]) if node.target in LAYERS else first[-1]
    return math.prod(_shape(node)) * each


def _shape(node: Node) -> tuple[int, ...]:
    """Returns the sizes in the example; one that depends on values counts as 1."""
    return _sizes(node.meta["val"])


def _sizes(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(1 if (known := size_in_example(size)) is None else known for size in value.shape)


def _counted(node: Node) -> int:
    """Returns what torch counts: two operations for each multiply-accumulate."""
    arguments = map_arg((node.args, node.kwargs), lambda read: _empty(read.meta.get("val")))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    return counter.get_total_flops() // 2


def _empty(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(_sizes(value), dtype=value.dtype, device="meta")
    return size_in_example(value) if isinstance(value, torch.SymInt) else value


def _is_depthwise(node: Node) -> bool:
    return (
        node.target in CONVOLUTIONS
        and argument(node, "groups") > 1
        and argument(node, "weight").meta["val"].shape[1] == 1
    )
