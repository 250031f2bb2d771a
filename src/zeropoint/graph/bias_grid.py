"""On which grid the bias of a quantized layer is kept: the integers of one tensor can be on one only."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch.fx import Node

from zeropoint.graph.bind import argument
from zeropoint.graph.layers import PADS
from zeropoint.numerics import ops

Grid: TypeAlias = tuple[float, Node] | None
"""Scale of the input, and the stored weight, which has its scales; None for a bias that stays float."""


def input_of(layer: Node) -> Any:
    """Returns what a layer reads, past the padding that is computed with it."""
    x = argument(layer, "input")
    return x.all_input_nodes[0] if x.target in PADS and len(x.users) == 1 else x


def grid_of(layer: Node) -> Grid:
    """Returns what the grid of a layer's bias follows from: layers for which that is equal may share one bias."""
    x, weight = input_of(layer), argument(layer, "weight")
    if x.target is not ops.DEQUANTIZE_PER_TENSOR or weight.target not in ops.DEQUANTIZE_OPS:
        return None
    return x.args[1], weight.all_input_nodes[0]
