"""Does the file compute what the converted model computes? And if not, where does it begin to differ?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.core.errors import RuntimeFailure, VerificationError
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.graph.source import describe
from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.child import Batches, run_in_child

FLOOR_DB = 30.0
"""Below it a file does not compute its model: rounding alone leaves 40 dB and more."""

aten = torch.ops.aten
FUSED = (
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.clamp.default,
)  # fmt: skip
"""Activations that a backend may compute with the layer before them: the two are not cut apart."""
Q_AND_DQ = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)
Lower = Callable[[GraphModule, tuple[Any, ...]], bytes]


@dataclass(frozen=True, slots=True)
class Verification:
    """How a file compares with its converted model: the lowest SQNR of any output over all inputs, in dB."""

    sqnr_db: float
    batches: int


def verify(pte: bytes, converted: GraphModule, batches: Batches, lower: Lower) -> Verification:
    """Returns how the file's outputs compare with the converted model's.

    Args:
        pte: the bytes of the file.
        converted: the model that it was lowered from.
        batches: inputs to compare on.
        lower: makes a file of a part of the model, to find the first operator that differs.

    Raises:
        VerificationError: the outputs differ by less than 30 dB; names the first operator that does.
        RuntimeFailure: the file does not run.
    """
    actual = run_in_child(pte, batches)
    lowest = min(_sqnr(converted, inputs, outputs) for inputs, outputs in zip(batches, actual, strict=True))
    if lowest >= FLOOR_DB:
        return Verification(lowest, len(batches))
    culprit = first_bad_operator(converted, batches[0], lower)
    where = describe(culprit) if culprit is not None else "output"
    what = f"the file's results agree with the converted model's by {lowest:.1f} dB only (at least {FLOOR_DB:g} wanted)"
    remedy = f"The first operator that differs is {where}: leave it float (set_module_name or set_operator_type None)."
    raise VerificationError(what, where=where, remedy=remedy)


@torch.no_grad()
def _sqnr(model: GraphModule, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> float:
    expected = [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, torch.Tensor)]
    if len(expected) != len(outputs):
        return -math.inf
    return min((sqnr_db(e, a) for e, a in zip(expected, outputs, strict=True)), default=math.inf)


def first_bad_operator(converted: GraphModule, inputs: tuple[Any, ...], lower: Lower) -> Node | None:
    """Returns the first operator whose result the file gets wrong, by bisection over the beginnings of the graph."""
    places = [node for node in converted.graph.nodes if _is_place(node)]
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        if _begins_well(converted, places[middle], inputs, lower):
            low = middle + 1
        else:
            high = middle
    return places[low] if low < len(places) else None


def _is_place(node: Node) -> bool:
    """True for operators after which the graph can be cut: not between a layer and what is fused into it."""
    if node.op != "call_function" or node.target in Q_AND_DQ or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if any(source.target in ops.DEQUANTIZE_OPS for source in node.all_input_nodes) and _quantized(node) is None:
        following = sole_reader(node)
        return following is None or following.target not in FUSED or _quantized(following) is None
    return bool(node.all_input_nodes)


def _quantized(node: Node) -> Node | None:
    """Returns the quantize that is the node's only reader."""
    reader = sole_reader(node)
    return reader if reader is not None and reader.target is ops.QUANTIZE_PER_TENSOR else None


def _begins_well(converted: GraphModule, place: Node, inputs: tuple[Any, ...], lower: Lower) -> bool:
    part = beginning(converted, place.name)
    try:
        outputs = run_in_child(lower(part, inputs), [inputs])[0]
    except (RuntimeFailure, AssertionError, RuntimeError):
        return False
    return _sqnr(part, inputs, outputs) >= FLOOR_DB


def beginning(converted: GraphModule, name: str) -> GraphModule:
    """Returns a copy of the model that ends with the node of that name; with its q/dq where it has one."""
    part = copy.deepcopy(converted)
    graph = part.graph
    result = next(node for node in graph.nodes if node.name == name)
    output = next(node for node in graph.nodes if node.op == "output")
    quantize = _quantized(result)
    if quantize is not None:
        with graph.inserting_before(output):
            dequantized = graph.call_function(ops.DEQUANTIZE_PER_TENSOR, (quantize, *quantize.args[1:]))
        dequantized.meta["val"] = result.meta["val"]
        result = dequantized
    output.args = ((result,),)
    remove_dead_code(graph)
    _one_output(part)
    return GraphModule(part, graph)


def _one_output(model: GraphModule) -> None:
    """Makes the graph's output convention that of a tuple of one tensor."""
    codegen: Any = model.graph._codegen
    if hasattr(codegen, "pytree_info"):
        leaf = pytree.tree_structure((torch.empty(0),))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=leaf)
