"""Look up rows of a quantized embedding table as bytes.

There is a kernel for it, ``quantized_decomposed::embedding_byte`` (executorch/kernels/quantized), which takes int64
indices. Without it the whole table would be made float at every call; and the kernel that does that takes no float zero
points, as tables have, and no groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.extras import import_extra
from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.bind import argument
from zeropoint.graph.emit import Emitter
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.numerics import ops

EMBEDDING = torch.ops.aten.embedding.default
REGISTERS = "executorch.exir.passes.quant_fusion_pass"
"""Importing it registers the operator for graphs; the runtime has the kernel from ``executorch.kernels.quantized``."""


def look_up_bytes(model: GraphModule) -> None:
    """Replaces a lookup in a dequantized table, of a scale per row or per group of a row, by the lookup of bytes."""
    tables = [node for node in model.graph.nodes if node.target is EMBEDDING and _is_bytes(argument(node, "weight"))]
    if not tables:
        return
    import_extra(REGISTERS, "executorch")
    names = Names(model)
    for node in tables:
        weight = argument(node, "weight")
        integers, scale, zero_point = weight.args[:3]
        limits = weight.args[4:6] if weight.target is ops.DEQUANTIZE_PER_CHANNEL else weight.args[3:5]
        emit, indices = Emitter(node, "look_up_bytes"), argument(node, "indices")
        if indices.meta["val"].dtype != torch.int64:
            indices = emit.call(torch.ops.aten.to.dtype, indices, torch.int64)
        zero_point = _float_or_none(model, node, zero_point, names)
        operator = torch.ops.quantized_decomposed.embedding_byte.default
        node.replace_all_uses_with(emit.call(operator, integers, scale, zero_point, *limits, indices))
        model.graph.erase_node(node)
    remove_dead_code(model.graph)


def _is_bytes(table: Node) -> bool:
    """True for a stored table of bytes that is dequantized row by row to float32."""
    if table.target not in (ops.DEQUANTIZE_PER_CHANNEL, ops.DEQUANTIZE_PER_CHANNEL_GROUP):
        return False
    along_rows = table.target is ops.DEQUANTIZE_PER_CHANNEL_GROUP or table.args[3] in (0, -2)
    integers: Any = table.args[0]
    is_stored = integers.op == "get_attr" and integers.meta["val"].dtype in (torch.int8, torch.uint8)
    return along_rows and is_stored and table.meta["val"].dtype == torch.float32


def _float_or_none(model: GraphModule, node: Node, zero_point: Node, names: Names) -> Node | None:
    """Returns zero points as the kernel takes them: of the type of the scales, or None where all are 0."""
    value = get_attribute(model, str(zero_point.target))
    if not bool(value.any()):
        return None
    if value.is_floating_point():
        return zero_point
    path = names.new("_float_zero_point_")
    model.register_buffer(path, value.to(torch.float32))
    with node.graph.inserting_before(node):
        read = node.graph.get_attr(path)
    read.meta["val"] = zero_point.meta["val"].to(torch.float32)
    return read
