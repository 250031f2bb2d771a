"""Bring an exported graph into the form that quantizers expect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument
from zeropoint.graph.emit import Emitter
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import MOVES
from zeropoint.graph.memory import remove_dead_writes
from zeropoint.graph.sizes import are_equal
from zeropoint.graph.source import WRITTEN_KEY
from zeropoint.graph.views import views_to_reshapes
from zeropoint.passes.recompose import recompose
from zeropoint.passes.recurrent import RECURRENT, take_apart

aten = torch.ops.aten
GUARDS = "_guards_fn"
BY_SIZES: dict[Any, Any] = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
}
"""Operators that read the sizes of another tensor, and what takes the same sizes as numbers."""


@graph_pass
def canonicalize(model: GraphModule) -> None:
    """Removes checks that export adds and writes that nothing sees, takes attention and recurrent layers apart, undoes
    decompositions.
    """
    known: dict[object, Any] = {}
    for node in [node for node in model.graph.nodes if _is_check(node)]:
        model.graph.erase_node(node)
    remove_dead_writes(model.graph)
    attended: set[Node] = set()
    for node in list(model.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            attended.update(decompose_attention(node, known))
        elif node.target in BY_SIZES:
            _give_sizes(node)
        elif node.target in RECURRENT:
            take_apart(node, known)
    # What moves the result's values may read any strides: those of attention are the query's, the product's are not.
    views_to_reshapes(model.graph, attended, MOVES)
    recompose(model, known)


def _is_check(node: Node) -> bool:
    """True for a check of the inputs' sizes, or of a type, which does not change once it is exported."""
    return (node.op == "call_module" and node.target == GUARDS) or node.target is aten._assert_tensor_metadata.default


def _give_sizes(node: Node) -> None:
    """Lets an operator that reads the sizes of another tensor take them as numbers, where all but one are known.

    The other tensor would have a reader that computes nothing with it.
    """
    source, shape = argument(node, "self"), node.meta["val"].shape
    free = [axis - len(shape) for axis, size in enumerate(shape) if not isinstance(size, int)]
    if node.target is aten.expand_as.default:  # There, -1 is the size that the source has along that axis.
        before = source.meta["val"].shape
        known = all(-axis <= len(before) and are_equal(before[axis], shape[axis]) for axis in free)
    else:
        known = len(free) <= 1
    if not known:
        return
    node.meta.setdefault(WRITTEN_KEY, node.target)
    node.target = BY_SIZES[node.target]
    node.args, node.kwargs = (source, [size if isinstance(size, int) else -1 for size in shape]), {}


def decompose_attention(node: Node, known: dict[object, Any]) -> list[Node]:
    """Replaces scaled dot product attention by ``softmax(q k^T scale + mask) v``, so that its products are operators.

    The definition is that of ``torch.nn.functional.scaled_dot_product_attention``. Attention with dropout is left.
    Returns the result, if any.
    """
    if argument(node, "dropout_p"):
        return []
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    emit = Emitter(node, "decompose_attention", known)
    if argument(node, "enable_gqa"):
        repeat = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key = emit.call(aten.repeat_interleave.self_int, key, repeat, -3)
        value = emit.call(aten.repeat_interleave.self_int, value, repeat, -3)
    scale = argument(node, "scale")
    factor = 1.0 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else scale
    products = emit.call(aten.matmul.default, query, emit.call(aten.transpose.int, key, -2, -1))
    scores = emit.call(aten.mul.Tensor, products, factor)  # As export spells it; backends do not take mul.Scalar.
    hidden, scores = _mask(emit, scores, argument(node, "attn_mask"), bool(argument(node, "is_causal")))
    weights = emit.call(aten.softmax.int, scores, -1)
    if hidden is not None:  # A row that is hidden as a whole gives 0, not NaN: left padding makes such rows.
        nothing = emit.call(aten.all.dim, hidden, -1, True)
        weights = emit.call(aten.masked_fill.Scalar, weights, nothing, 0.0)
    result = emit.call(aten.matmul.default, weights, value)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return [result]


def _mask(emit: Emitter, scores: Node, mask: Any, is_causal: bool) -> tuple[Node | None, Node]:
    """Returns what the user's boolean mask hides, None where there is none, and the masked scores."""
    if is_causal:
        sizes = [_size(emit, scores, axis) for axis in (-2, -1)]
        full = emit.call(aten.ones.default, sizes, dtype=torch.bool, device=scores.meta["val"].device)
        hidden = emit.call(aten.logical_not.default, emit.call(aten.tril.default, full))
        return None, emit.call(aten.masked_fill.Scalar, scores, hidden, float("-inf"))
    if mask is None:
        return None, scores
    if mask.meta["val"].dtype != torch.bool:
        return None, emit.call(aten.add.Tensor, scores, mask)
    hidden = emit.call(aten.logical_not.default, mask)
    return hidden, emit.call(aten.masked_fill.Scalar, scores, hidden, float("-inf"))


def _size(emit: Emitter, node: Node, axis: int) -> int | Node:
    """Returns the size along an axis: a number, or where it is free, the node that asks for it."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else emit.call(aten.sym_size.int, node, axis)
