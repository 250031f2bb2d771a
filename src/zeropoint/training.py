"""Training inside of ``quantize``: a model with fake quantizers, the user's loop, and a check of what it became."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from zeropoint.annotate.quantizer import Quantizer
from zeropoint.core.errors import GraphError, NonFiniteError, SpecError, VerificationError
from zeropoint.graph.capture import capture_for_training
from zeropoint.graph.copies import deep_copy, restart
from zeropoint.graph.devices import device_of
from zeropoint.graph.observers import is_fake_quantizer
from zeropoint.graph.within import graphs_within
from zeropoint.numerics.observers.state import MARK
from zeropoint.report.accuracy import AccuracyWork
from zeropoint.report.record import record_of
from zeropoint.report.stages import Stages
from zeropoint.report.trained.check_convert import ConvertCheck, check_convert
from zeropoint.report.trained.training import EVALUATE, FIT, Training, decide, fit_to
from zeropoint.result import QuantizedModel
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

WHERE = "quantize"
TRAINED = "the model was trained"
Train = Callable[[GraphModule], Any]
Evaluate = Callable[[GraphModule], Any]


def check_functions(train: Any, evaluate: Any) -> None:
    """Raises unless both are functions, or None, and the second comes with the first.

    Raises:
        SpecError: says which is wrong.
    """
    for name, value in (("train", train), ("evaluate", evaluate)):
        if value is not None and (not callable(value) or isinstance(value, nn.Module)):
            remedy = f"Give a function of the model, {name}(model)."
            raise SpecError(f"{name} is {type(value).__name__}, not a function", where=WHERE, remedy=remedy)
    if evaluate is not None and train is None:
        remedy = "Leave it out, and evaluate result.model; or give train= too."
        raise SpecError("evaluate= says whether training made the model better, and there is no train=", where=WHERE,
                        remedy=remedy)  # fmt: skip


def prepare_training(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any,
    quantizer: Quantizer,
) -> GraphModule:
    """Returns a copy of the model with fake quantizers, in train mode.

    Raises:
        GraphError: it has none, as the quantizer's specs name observers.
    """
    prepared = prepare_qat_pt2e(capture_for_training(model, example_inputs, dynamic_shapes=dynamic_shapes), quantizer)
    if not _has_fake_quantizers(prepared):
        what = "train= needs fake quantizers, and the quantizer puts none into this model"
        remedy = "Its specs name observers: use a configuration for training, such as is_qat=True gives, or leave "
        remedy += "quantizer out."
        raise GraphError(what, where=WHERE, remedy=remedy)
    return prepared


def run_training(prepared: GraphModule, train: Train) -> GraphModule:
    """Returns what the user's function trained: the model that it was given, or the one that it returned; on the CPU.

    Raises:
        SpecError: it returned something else than None or a module with one exported graph.
        GraphError: there are no fake quantizers in that any longer.
        NonFiniteError: a parameter or statistic holds NaN or infinity; names the first.
    """
    device = device_of(prepared)
    with torch.enable_grad():
        returned = train(prepared)
    trained = prepared if returned is None else _graph_in(returned)
    if not _has_fake_quantizers(trained) or not record_of(trained).is_qat:
        what = "the model has no fake quantizers after training"
        remedy = "Let train= change weights only; quantize converts the model itself."
        raise GraphError(what, where="train", remedy=remedy)
    _require_finite(trained)
    if device is not None and device_of(trained) != device:
        trained.to(device)
    return trained


def _graph_in(returned: Any) -> GraphModule:
    found = graphs_within(returned) if isinstance(returned, nn.Module) else []
    if len(found) == 1:
        return found[0]
    what = f"it returned {type(returned).__name__}"
    if isinstance(returned, nn.Module):
        what = f"{what}, which holds {len(found)} exported graphs, not the one that it was given"
    remedy = "Train the given model in place and return None, or return that model, or a copy or wrapper of it."
    raise SpecError(what, where="train", remedy=remedy)


def _has_fake_quantizers(model: GraphModule) -> bool:
    return any(is_fake_quantizer(each) for each in model.modules())


def _require_finite(model: GraphModule) -> None:
    statistics = [(name, tensor) for name, tensor in model.named_buffers() if MARK not in name]
    for name, tensor in [*model.named_parameters(), *statistics]:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found = "NaN" if bool(tensor.isnan().any()) else "infinity"
            remedy = "Look at the loss: a smaller learning rate, or clipped gradients, usually help."
            raise NonFiniteError(f"{found} in the model after training", where=name, remedy=remedy)


def convert_checked(trained: GraphModule, inputs: tuple[Any, ...]) -> tuple[GraphModule, ConvertCheck]:
    """Returns what a trained model converts to, and the check that it is what was trained.

    Each site may differ by one step of its scale from what the values before it give (``check_convert``): a value
    halfway between two integers may be rounded to either, as the sums of the two graphs are not added up alike. A
    wrong scale, weight, bias or statistic shows as more.

    Raises:
        VerificationError: a site differs by more; names the first.
        ComparisonError: the fake quantizers are switched off.
    """
    converted = convert_pt2e(deep_copy(trained))
    check = check_convert(trained, converted, inputs)
    first = check.first
    if first is not None:
        apart = f"by {first.own_steps:.2f} steps" if first.converted else "in that it has no such site"
        what = f"the converted model differs {apart} from what was trained, where one step is rounding"
        remedy = "What train= did to the graph, or zeropoint, is at fault: train with prepare_qat_pt2e and look at "
        remedy += "check_convert, which lists all sites."
        raise VerificationError(what, where=first.site, remedy=remedy)
    return converted, check


def train_from(
    before: QuantizedModel,
    trainable: GraphModule,
    train: Train,
    evaluate: Evaluate | None,
    reference: tuple[GraphModule, Sequence[tuple[Any, ...]]],
    finish: Callable[[GraphModule, AccuracyWork], QuantizedModel],
    stages: Stages,
) -> QuantizedModel:
    """Trains, and returns the better one of what that gave and the model before it.

    Args:
        before: what post-training quantization gave.
        trainable: what ``prepare_training`` gave, its ranges started.
        reference: the float model, and batches of its inputs.
        finish: makes the result of a converted model.
    """
    float_model, batches = reference
    with stages.stage("evaluate"):
        ptq = _measure_before(evaluate, before.model, reference)
    with stages.stage("train"):
        trained = run_training(trainable, train)
    with stages.stage("convert"):
        converted, check = convert_checked(trained, batches[0])
        restart(converted, float_model)
    with stages.stage("evaluate"):
        qat = _measure(evaluate, converted, reference)
    metric = FIT if evaluate is None else EVALUATE
    kept, warning = decide(metric, ptq, qat)
    training = Training(kept, metric, ptq, qat, check, warning, before.model, converted)
    result = finish(converted, AccuracyWork((), (), TRAINED, TRAINED)) if kept == "qat" else before
    return replace(result, training=training, stages_s=dict(stages.seconds))


def _measure_before(
    evaluate: Evaluate | None, model: GraphModule, reference: tuple[GraphModule, Sequence[tuple[Any, ...]]]
) -> float:
    value = _measure(evaluate, model, reference)
    return _refuse(value) if evaluate is not None and math.isnan(value) else value


def _measure(
    evaluate: Evaluate | None, model: GraphModule, reference: tuple[GraphModule, Sequence[tuple[Any, ...]]]
) -> float:
    """Returns what the user's function says of a copy of a converted model, without gradients; else the fit."""
    if evaluate is None:
        float_model, batches = reference
        return fit_to(float_model, model, batches)
    with torch.no_grad():
        value = evaluate(deep_copy(model))
    if isinstance(value, (str, bytes)):
        return _refuse(value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # The last is of a tensor with several values.
        return _refuse(value)


def _refuse(value: Any) -> float:
    remedy = "Let it return a number of which higher is better, such as an accuracy, or a loss times -1."
    raise SpecError(f"it returned {value!r}, not a number"[:200], where="evaluate", remedy=remedy)
