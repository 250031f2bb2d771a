"""Write a graph of quantize and dequantize operators in integer arithmetic."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.invariants import Invariant, check_invariants
from zeropoint.graph.memory import remove_dead_writes
from zeropoint.graph.views import views_to_reshapes
from zeropoint.numerics import ops
from zeropoint.passes.finish import finish
from zeropoint.passes.reference.arithmetic import ARITHMETIC
from zeropoint.passes.reference.averages import AVERAGES
from zeropoint.passes.reference.grid import Grid
from zeropoint.passes.reference.integers import Integers, Operators
from zeropoint.passes.reference.layers import LAYERS
from zeropoint.passes.reference.plain import dequantized, quantized
from zeropoint.passes.reference.sums import real

OPERATORS: Operators = {**ARITHMETIC, **AVERAGES, **LAYERS}


def in_integers(model: GraphModule) -> GraphModule:
    """Returns the reference representation of a converted model; its graph is changed and shared with the result.

    Raises:
        GraphError: a quantize or dequantize operator was left, which is an error of zeropoint.
    """
    compute_in_integers(model)
    check_invariants(model, REFERENCE, "in_integers")
    return finish(model)


@graph_pass
def compute_in_integers(model: GraphModule) -> None:
    """Replaces dequantize, operator and quantize by integer arithmetic, wherever the operator has such.

    Operands are int16 minus their zero points, accumulators int32; a quantize after them is one multiplication by a
    float32 number, rounded half to even and clamped. Layers whose output stays float give accumulators times the scale.
    Other operators stay in float between what quantize and dequantize operators do, written out.
    Weights are read as they are stored.
    """
    integers = Integers(model, OPERATORS)
    nodes = list(model.graph.nodes)
    for node in nodes:
        if node.target is ops.QUANTIZE_PER_TENSOR:
            _replace(node, integers.on_grid(node.args[0], Grid.of(node)))
    changed: set[Node] = set()
    for node in nodes:
        if node.target in LAYERS and (value := integers.sum(node)) is not None:
            result = real(integers.emitter(node), value, node.meta["val"].dtype)
            _replace(node, result)
            changed.add(result)
    views_to_reshapes(model.graph, changed)
    for node in list(model.graph.nodes):
        if node.target in ops.QUANTIZE_OPS:
            _replace(node, quantized(integers.emitter(node), node))
        elif node.target in ops.DEQUANTIZE_OPS and node.users:
            _replace(node, dequantized(integers.emitter(node), node))
    remove_dead_writes(model.graph)


def _replace(node: Node, new: Node | None) -> None:
    if new is not None:
        node.replace_all_uses_with(new)


def _is_written_out(model: GraphModule, node: Node) -> bool:
    del model
    return node.target not in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)


REFERENCE = (Invariant("each quantize and dequantize operator is written as arithmetic", _is_written_out),)
