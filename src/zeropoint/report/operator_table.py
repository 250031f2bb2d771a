"""``summary``: the integer operators of a converted graph, one a line, with types, scales and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.errors import GraphError
from zeropoint.graph.attributes import get_attribute, tensors_of
from zeropoint.graph.bind import bind, reads
from zeropoint.graph.capture import require_exported
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.graph_pass import bodies, graphs_of
from zeropoint.graph.layers import CLAMPS
from zeropoint.graph.observers import has_observers
from zeropoint.graph.source import module_path, operator_name
from zeropoint.passes.body_parameters import bring_in_parameters
from zeropoint.report.conversions import is_dequantize, is_quantize
from zeropoint.report.record import record_of

HEADER = ("name", "module", "operator", "inputs", "weight", "output", "weight bytes")
NARROW = 0.5
"""A range of less than this share of its type is shown: 4-bit values in int8."""
DTYPES = ("dtype", "input_dtype", "output_dtype")
AT_RUN_TIME = "at run time"
WHERE = "summary"


@dataclass(slots=True)
class _Operator:
    """Nodes that are computed as one: what they read in integers, what they return, their stored weights."""

    nodes: list[Node]
    inputs: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        """The node that reads the weight; else the first."""
        with_weight = (node for node in self.nodes if any(source in self.weights for _, source in reads(node)))
        return next(with_weight, self.nodes[0])


def summary(converted: GraphModule) -> str:
    """Returns a table of the integer operators of a converted model: a line each, then totals.

    A line gives the operator with the activation that is fused into it, its module, and for inputs, weight and output
    the type with its scale and, unless that is 0, its zero point (``zp``). A weight of many scales shows the smallest
    and the largest. ``same`` is an output of the scale and zero point of the first input. Bytes are those of the
    integers of the weight; ``shared`` where a line above has them already.

    Args:
        converted: what ``convert_pt2e`` returned, in q/dq form.

    Raises:
        GraphError: the model has observers, or is in the reference representation.
    """
    _check_form(converted)
    if any(bodies(converted)):  # What bodies read is among the operands of their call, where it is hard to find.
        converted = deep_copy(converted)
        bring_in_parameters(converted)
    seen: set[int] = set()
    rows = [row for model in graphs_of(converted) for row in _rows(model, converted, seen)]
    lines = _aligned([HEADER, *rows]) if rows else ["no operator is integer"]
    return "\n".join([*lines, *_totals(converted, len(rows))])


def _check_form(converted: GraphModule) -> None:
    require_exported(converted)
    if has_observers(converted):
        raise GraphError("the model still has observers", where=WHERE, remedy="Give what convert_pt2e returned.")
    if record_of(converted).representation == "reference":
        what, remedy = (
            "the model is in the reference representation",
            "Convert with use_reference_representation=False.",
        )
        raise GraphError(what, where=WHERE, remedy=remedy)


def _rows(model: GraphModule, whole: GraphModule, seen: set[int]) -> Iterator[tuple[str, ...]]:
    for each in _operators(model, whole):
        head, first = each.head, _text(model, each.inputs[0]) if each.inputs else ""
        outputs = [_text(model, node) for node in each.outputs] or [_float_text(each.nodes[-1])]
        yield (
            head.name,
            module_path(head),
            "+".join(operator_name(node) for node in each.nodes),
            _listed(_text(model, node) for node in each.inputs),
            _listed(_text(model, node) for node in each.weights),
            _listed("same" if text == first and AT_RUN_TIME not in text else text for text in outputs),
            _bytes_text(model, each.weights, seen),
        )


def _operators(model: GraphModule, whole: GraphModule) -> list[_Operator]:
    """Returns the integer operators of one graph: nodes without a quantize between them are computed as one."""
    constants = constant_nodes(model)
    found: dict[Node, _Operator] = {}
    for node in integer_nodes(model, whole):
        sources = [source for _, source in reads(node)]
        fused = next((found[source] for source in sources if source in found), None)
        operator = found[node] = fused if fused is not None else _Operator([])
        operator.nodes.append(node)
        for source in filter(is_dequantize, sources):
            (operator.weights if source in constants else operator.inputs).append(source)
        operator.outputs += [reader for reader in node.users if is_quantize(reader)]
    distinct = {id(operator): operator for operator in found.values()}.values()
    return [operator for operator in distinct if operator.inputs]


def integer_nodes(model: GraphModule, whole: GraphModule) -> Iterator[Node]:
    """Yields what prepare recorded as integer; of a model of another package, what reads and returns integers."""
    rows = record_of(whole).coverage
    integer = {(row.node, row.operator, row.module) for row in rows if row.is_quantized}
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        if node.op != "call_function" or node in constants or is_quantize(node) or is_dequantize(node):
            continue
        named = (node.name, operator_name(node), module_path(node))  # Names alone come again in bodies.
        if named in integer if rows else _between_integers(node):
            yield node


def _between_integers(node: Node) -> bool:
    """True for what reads integers and returns some, itself or through the activation that is fused into it."""
    if node.target in CLAMPS and not _reads_integers(node):
        before = node.all_input_nodes[0]
        return any(map(is_quantize, node.users)) and sole_reader(before) is node and _reads_integers(before)
    last = sole_reader(node)
    last = last if last is not None and last.target in CLAMPS else node
    return _reads_integers(node) and any(map(is_quantize, last.users))


def _reads_integers(node: Node) -> bool:
    return any(is_dequantize(source) for _, source in reads(node))


def _text(model: GraphModule, node: Node) -> str:
    """Returns type, range where it is narrow, scale and zero point of a quantize or dequantize."""
    passed = bind(node)
    integers: Any = node if is_quantize(node) else node.args[0]
    scale, zero_point = (passed.get(name, passed.get(f"{name}s")) for name in ("scale", "zero_point"))
    dtype = next((passed[name] for name in DTYPES if name in passed), None) or integers.meta["val"].dtype
    parts = [_type_text(dtype, passed.get("quant_min"), passed.get("quant_max")), *_scale_parts(model, scale, passed)]
    if isinstance(zero_point, int) and zero_point:
        parts.append(f"zp {zero_point}")
    return " ".join(parts)


def _float_text(node: Node) -> str:
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "float"


def _type_text(dtype: torch.dtype, low: Any, high: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if low is None or high is None or dtype.is_floating_point:
        return name
    info = torch.iinfo(dtype)
    return name if high - low >= NARROW * (info.max - info.min) else f"{name} {low}..{high}"


def _scale_parts(model: GraphModule, scale: Any, passed: dict[str, Any]) -> list[str]:
    if isinstance(scale, (int, float)):
        return [f"{scale:.4g}"]
    if not isinstance(scale, Node) or scale.op != "get_attr":
        return [AT_RUN_TIME]
    values = get_attribute(model, str(scale.target)).detach()
    low, high = f"{float(values.min()):.4g}", f"{float(values.max()):.4g}"
    if values.numel() == 1:
        return [low]
    per = f"per group of {passed['group_size']}" if "group_size" in passed else "per channel"
    return [f"{'per block' if 'block_size' in passed else per} {low}..{high}"]


def _listed(texts: Iterable[str]) -> str:
    counts = Counter(texts)
    return ", ".join(text if count == 1 else f"{count} x {text}" for text, count in counts.items())


def _bytes_text(model: GraphModule, weights: list[Node], seen: set[int]) -> str:
    stored = [node.args[0] for node in weights]
    paths = {str(node.target) for node in stored if isinstance(node, Node) and node.op == "get_attr"}
    tensors = {tensor.data_ptr(): tensor for tensor in (get_attribute(model, path) for path in paths)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    is_new = not tensors.keys() <= seen
    seen.update(tensors)
    return "" if not tensors else f"{size:,}" if is_new else f"{size:,} shared"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _totals(converted: GraphModule, count: int) -> list[str]:
    rows = record_of(converted).coverage
    floating = f", {sum(not row.is_quantized for row in rows)} in float" if rows else ""
    conversions = sum(is_quantize(node) for model in graphs_of(converted) for node in model.graph.nodes)
    tensors = tensors_of(converted).values()
    integers, floats = (
        sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.is_floating_point() is kind}.values())
        for kind in (False, True)
    )
    return [
        f"{count} integer operators{floating}; {conversions} quantize operators at run time",
        f"{integers + floats:,} bytes of tensors: {integers:,} of integers, {floats:,} of floats",
    ]
