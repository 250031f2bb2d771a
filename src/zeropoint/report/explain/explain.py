"""``explain``: what a quantizer makes of a model, operator by operator, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from zeropoint.annotate.groups import resolve
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.annotate.read import read_plan
from zeropoint.core.errors import NothingQuantizedError, SpecError
from zeropoint.graph.capture import capture_given, is_exported
from zeropoint.graph.copies import copy_graph
from zeropoint.graph.graph_pass import pipeline
from zeropoint.graph.observers import has_observers
from zeropoint.passes.annotate import annotate_only
from zeropoint.passes.body_parameters import bring_in_parameters
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.fold_batch_norm import fold_batch_norm
from zeropoint.report.coverage import coverage
from zeropoint.report.explain.explain_plan import explained, gone_nodes, matched_rules, shared_tensors, snapshot
from zeropoint.report.explain.explain_prepared import PreparedSites, explain_prepared
from zeropoint.report.explain.explanation import Explanation
from zeropoint.report.explain.member_ranges import measure
from zeropoint.report.record import require_unprepared

WHERE = "explain"


def explain(
    model: nn.Module | ExportedProgram | GraphModule,
    quantizer: Quantizer | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    strict: Sequence[str] = (),
    calibration_data: Iterable[Any] | None = None,
) -> Explanation:
    """Returns every compute node of a model: quantized by which row and specs, or float and why. Changes nothing.

    Args:
        model: a module, an exported program, its ``.module()``, or what ``prepare_pt2e`` returned, calibrated or not.
        quantizer: any quantizer of PT2E, as for ``prepare_pt2e``; none for a model that is prepared.
        example_inputs: positional inputs, for a module that is not exported.
        strict: paths of modules, with ``*`` and ``?`` as in file names, in which no operator may stay float.
        calibration_data: batches, as for ``quantize``; with them, the float values of each tensor that shares its scale
            are measured, and groups say which tensors made their range as wide as it is.

    Raises:
        StaysFloatError: an operator of a ``strict`` module stays float; names each with its reason.
        RuleError: a path of ``strict``, or a rule of the quantizer, matches nothing.
        CaptureError: the model cannot be exported, or there are no example inputs for that.
        GraphError: the model is converted.
        SpecError: a quantizer is missing, or is given for a prepared model.
        AnnotationError: the quantizer's annotations contradict the graph or one another.
        CalibrationError: the data does not fit the model.
    """
    if isinstance(model, GraphModule) and is_exported(model) and has_observers(model):
        if quantizer is not None:
            remedy = "Leave the quantizer out; or give the model as it was exported."
            raise SpecError("the model is prepared already, by its own quantizer", where=WHERE, remedy=remedy)
        explanation = _explain_prepared(model, calibration_data)
    else:
        captured = capture_given(model, example_inputs, WHERE)
        require_unprepared(captured, WHERE)
        explanation = _explain_plan(captured, quantizer, calibration_data)
    explanation.require_quantized(strict)
    return explanation


@pipeline
def _explain_plan(model: GraphModule, quantizer: Quantizer | None, data: Iterable[Any] | None) -> Explanation:
    """Does to a copy what ``prepare_pt2e`` does before it inserts observers."""
    if quantizer is None:
        raise SpecError(
            "no quantizer is given", where=WHERE, remedy="Give one, e.g. XNNPACKQuantizer().set_global(...)."
        )
    model = copy_graph(model)
    before = snapshot(model)
    bring_in_parameters(model)
    canonicalize(model)
    fold_batch_norm(model)
    model = annotate_only(model, quantizer)
    rules, gone = matched_rules(model, quantizer), gone_nodes(before, model)
    with contextlib.suppress(NothingQuantizedError):  # Then the reasons are what is asked for.
        quantizer.validate(model)
    plan = read_plan(model)
    groups = resolve(plan)
    ranges = {} if data is None else measure(model, shared_tensors(groups), data)
    nodes, described = explained(model, plan, groups, coverage(model, plan), ranges)
    return Explanation(nodes, gone, described, rules)


def _explain_prepared(model: GraphModule, data: Iterable[Any] | None) -> Explanation:
    sites = PreparedSites(model)
    ranges = {} if data is None else measure(model, sites.shared_tensors(), data)
    return Explanation(explain_prepared(model, sites), (), sites.groups(ranges))
