"""Store the lookup tables that stay float as float16."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.constants import FLOAT_PATH_KEY, path_behind
from zeropoint.graph.emit import Emitter, Fakes, inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.numerics import ops

EMBEDDING = torch.ops.aten.embedding.default
LARGEST = torch.finfo(torch.float16).max
PASS = "halve_tables"
STATIC = (ops.QUANTIZE_PER_TENSOR, ops.QUANTIZE_PER_CHANNEL)


@graph_pass
def halve_tables(model: GraphModule) -> None:
    """Stores each float32 table that embeddings alone read as float16, half the bytes; a row is float32 once read.

    Does nothing where activations have fixed scales: there tables are small beside the rest of what is lost. Values
    keep 11 bits, an error of at most 1/2048 of each above 6e-5, less than any 8-bit weight has. A table with a value
    beyond 65504 stays as it is.
    """
    if any(node.target in STATIC for node in model.graph.nodes):
        return
    names, fakes = Names(model), Fakes()
    for table in [node for node in model.graph.nodes if node.op == "get_attr" and _is_table(model, node)]:
        path = names.new("_half_param")
        model.register_buffer(path, get_attribute(model, str(table.target)).detach().to(torch.float16))
        with table.graph.inserting_before(table):
            half = table.graph.get_attr(path)
        half.meta["val"] = fakes.like(table.meta["val"], dtype=torch.float16)
        half.meta[FLOAT_PATH_KEY] = path_behind(table)
        inherit(half, table, PASS)
        for reader in list(table.users):
            _read_half(reader, half, fakes)


def _is_table(model: GraphModule, node: Node) -> bool:
    """True for a float32 constant that is the table of all that reads it, with values that float16 can hold."""
    readers = list(node.users)
    if not readers or any(r.target is not EMBEDDING or argument(r, "weight") is not node for r in readers):
        return False
    value = get_attribute(model, str(node.target))
    return value.dtype == torch.float32 and bool(value.abs().max() <= LARGEST)


def _read_half(reader: Node, half: Node, fakes: Fakes) -> None:
    rows = reader.meta["val"]
    set_argument(reader, "weight", half)
    reader.meta["val"] = fakes.like(rows, dtype=torch.float16)
    following = list(reader.users)
    emit = Emitter(reader.next, PASS)
    wide = emit.call(torch.ops.aten.to.dtype, reader, torch.float32)
    wide.meta = {**reader.meta, "val": rows, "from_node": wide.meta["from_node"]}
    for user in following:
        user.replace_input_with(reader, wide)
