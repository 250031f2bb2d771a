"""Annotating by a table: one walk over the graph, each node looked up by its operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import annotation_of, is_annotated
from zeropoint.annotate.patterns import (
    Activation,
    Bias,
    Context,
    Follow,
    Input,
    Match,
    Pattern,
    Shared,
    Table,
    Weight,
    is_float32,
)
from zeropoint.annotate.plan import DECISION_KEY, Decision
from zeropoint.annotate.rules import Rules
from zeropoint.annotate.stock import unwrapped
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.specs import (
    PER_CHANNEL,
    DerivedQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from zeropoint.graph.batch_norms import BATCH_NORMS, STAYS, keeps_statistics
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.compat import is_tensor_list, is_tensor_value
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.layers import LAYERS
from zeropoint.graph.memory import Memory
from zeropoint.numerics.granularity import PerTensor
from zeropoint.numerics.observers import PlaceholderObserver


def annotate_by_table(model: GraphModule, table: Table, rules: Rules) -> None:
    """Annotates every node of the graph that a row of the table and a rule of the user select.

    Each call of an operator gets a decision: quantized by a row, or float with the reason.
    """
    context = Context(model, constant_nodes(model), set(), Memory(model.graph))
    for node in model.graph.nodes:
        if node.op != "call_function" or is_annotated(node):
            _note_foreign_output(node, context)
            continue
        if node in context.constants:
            continue
        if not is_tensor_value(node.meta.get("val")):
            _refuse_list(node, table)
            continue
        decision = _decide(node, table, rules, context)
        for covered in decision.nodes:
            if _rank(decision) > _rank(covered.meta.get(DECISION_KEY)):
                covered.meta[DECISION_KEY] = decision


def _refuse_list(node: Node, table: Table) -> None:
    """Gives an operator that returns several tensors the reason why it stays float; taking them apart needs none."""
    if is_tensor_list(node.meta.get("val")):
        node.meta.setdefault(DECISION_KEY, Decision("", (node,), table.float_reason(node)))


def _rank(decision: Decision | None) -> int:
    """Returns how much a decision tells: of two quantizers' decisions about a node the higher is kept."""
    match decision:
        case None:
            return 0
        case Decision(refusal=None):
            return 4
        case Decision(refused_by="no rule"):
            return 1
        case Decision(pattern=""):
            return 2
        case _:
            return 3


def _note_foreign_output(node: Node, context: Context) -> None:
    if is_annotated(node) and annotation_of(node).output_qspec is not None:
        context.quantized.add(node)


def _decide(node: Node, table: Table, rules: Rules, context: Context) -> Decision:
    pattern = table.pattern_of(node)
    name = pattern.name if pattern is not None else ""
    if not is_float32(node):
        return Decision(name, (node,), f"it returns {node.meta['val'].dtype}; only float32 arithmetic is quantized")
    if pattern is None:
        return Decision(name, (node,), table.float_reason(node))
    config, excluded = rules.choose(node)
    if config is None:
        return Decision(name, (node,), excluded, "rule" if rules.leaves_out(node) else "no rule")
    match = Match(pattern, node, _before(pattern, node), _fused(pattern, node, rules, config), config, context)
    refusal = _refusal(match)
    if refusal is not None:
        return Decision(name, (node,), refusal)
    _annotate(match)
    return Decision(name, match.nodes)


def _before(pattern: Pattern, head: Node) -> Node | None:
    """Returns the node that is fused before the head: it has no other reader and the row's conditions hold."""
    first = head.args[0] if head.args else None
    if not isinstance(first, Node) or first.target not in pattern.before or sole_reader(first) is not head:
        return None
    return first if all(condition(first) for condition in pattern.before_when) else None


def _fused(pattern: Pattern, head: Node, rules: Rules, config: QuantizationConfig) -> tuple[Node, ...]:
    """Returns the nodes after the head that are computed with it: each the only reader of the one before."""
    norm = _batch_norm_after(head, rules) if config.is_qat else None
    fused: list[Node] = [] if norm is None else [norm]
    current = head if norm is None else norm
    for operators in pattern.chain[1:]:
        following = sole_reader(current)
        if following is None or following.target not in operators:
            continue
        if is_annotated(following) or rules.leaves_out(following):
            continue
        fused.append(following)
        current = following
    return tuple(fused)


def _batch_norm_after(head: Node, rules: Rules) -> Node | None:
    """Returns the batch norm that will be folded into a layer once the two are trained."""
    norm = sole_reader(head)
    if norm is None or norm.target not in BATCH_NORMS or head.target not in LAYERS:
        return None
    decision = norm.meta.get(DECISION_KEY)
    stays = decision is not None and decision.pattern == STAYS
    return None if stays or not keeps_statistics(norm) or is_annotated(norm) or rules.leaves_out(norm) else norm


def _missing_spec(match: Match) -> str | None:
    """Returns which spec the operator needs, and the configuration does not have.

    A layer of a configuration for weights alone is computed in float, with its weight stored as integers.
    """
    config, roles = match.config, [read.role for read in match.inputs()]
    has_weight = any(isinstance(role, Weight) for role in roles)
    if has_weight and config.weight is None:
        return "its configuration has no spec for weights"
    weight_only = has_weight and config.output_activation is None
    measured = any(isinstance(role, (Activation, Shared)) for role in roles)
    if measured and config.input_activation is None and not weight_only:
        return "its configuration has no spec for input activations"
    return None


def _refusal(match: Match) -> str | None:
    if (missing := _missing_spec(match)) is not None:
        return missing
    writer = next((w for n in (match.head, match.last) if (w := match.context.memory.write_from(n)) is not None), None)
    if writer is not None:
        return f"{writer.name} writes to its memory in place, and that change would be lost"
    for read in match.inputs():
        if not is_float32(read.source) and not isinstance(read.role, Bias):
            value = read.source.meta.get("val")
            return f"its input {read.source.name} is {getattr(value, 'dtype', type(value).__name__)}, not float32"
        if isinstance(read.role, Follow) and read.source not in match.context.quantized:
            return f"its input {read.source.name} is float: quantizing here would only add conversions"
    conditions = match.pattern.when
    if match.config.is_dynamic:
        if match.pattern.dynamic is None:
            return "activations quantized at run time: the backend has no such kernel for this operator"
        conditions += match.pattern.dynamic
    return next((reason for condition in conditions if (reason := condition(match)) is not None), None)


def _annotate(match: Match) -> None:
    """Writes the annotations of a match: inputs on their readers, the output on the last node."""
    inputs = match.inputs()
    for read in inputs:
        annotation_of(read.reader).input_qspec_map.setdefault(read.source, _input_spec(match, read, inputs[0]))
    output = _output_spec(match, inputs[0])
    annotation_of(match.last).output_qspec = output
    if output is not None:
        match.context.quantized.add(match.last)
    for node in match.nodes:
        annotation_of(node)._annotated = True


def _input_spec(match: Match, read: Input, first: Input) -> QuantizationSpecBase | None:
    match read.role:
        case Activation():
            return _at_run_time(match)
        case Weight(axis=axis):
            spec = match.config.weight
            if spec is None or spec.qscheme not in PER_CHANNEL or spec.ch_axis == axis:
                return spec
            return replace(spec, ch_axis=axis)
        case Bias(integer=True) if match.config.bias is None:
            return _int32_bias(match)
        case Bias():
            return match.config.bias
        case Follow():
            return SharedQuantizationSpec(read.source)
        case Shared() if read.source is first.source:
            return match.config.input_activation
        case _:
            return SharedQuantizationSpec((first.source, first.reader))


def _at_run_time(match: Match) -> QuantizationSpecBase | None:
    """Returns the spec of input activations; one at run time is of the granularity that the backend has."""
    spec, granularity = match.config.input_activation, match.pattern.dynamic_granularity
    if not match.config.is_dynamic or isinstance(granularity, PerTensor) or not isinstance(spec, QuantizationSpec):
        return spec
    if getattr(unwrapped(spec.observer_or_fake_quant_ctr)[0], "__name__", "") != PlaceholderObserver.__name__:
        return spec
    return replace(spec, observer_or_fake_quant_ctr=PlaceholderObserver.with_args(granularity=granularity))


def _int32_bias(match: Match) -> QuantizationSpecBase | None:
    """Returns the spec of an int32 bias in steps of ``s_x * s_w``; None where one of them is none."""
    activation, weight = match.config.input_activation, match.config.weight
    if activation is None or match.config.is_dynamic or not isinstance(weight, QuantizationSpec):
        return None
    by_role = {type(read.role): (read.source, read.reader) for read in match.inputs()}
    is_per_channel = weight.qscheme in PER_CHANNEL
    return DerivedQuantizationSpec(
        derived_from=(by_role[Activation], by_role[Weight]),
        derive_qparams_fn=product_of_scales,
        dtype=torch.int32,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if is_per_channel else None,
    )


def product_of_scales(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of sums of products of what two observers saw, and so of a bias added to them."""
    first, second = (observer.calculate_qparams()[0] for observer in observers)
    scale = first * second
    return scale, torch.zeros_like(scale, dtype=torch.int64)


def _output_spec(match: Match, first: Input) -> QuantizationSpecBase | None:
    if match.config.output_activation is None:
        return None
    if isinstance(match.pattern.output, Shared):
        return SharedQuantizationSpec((first.source, first.reader))
    return match.config.output_activation
