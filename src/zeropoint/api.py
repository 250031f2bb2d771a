"""``quantize``: from a model and data to a verified file, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.algorithms.correct_biases import Correction, channel_means, correct_biases
from zeropoint.algorithms.equalize import Pair, equalize
from zeropoint.algorithms.start_ranges import start_ranges
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.backends import xnnpack
from zeropoint.calibration import CalibrationData
from zeropoint.core.arguments import require_bool
from zeropoint.core.dtypes import is_float
from zeropoint.core.errors import CalibrationError, NothingQuantizedError, SpecError
from zeropoint.core.extras import require_extra
from zeropoint.graph.capture import capture_in_eval_mode
from zeropoint.graph.constants import mutated_attributes
from zeropoint.graph.copies import copy_graph, restart
from zeropoint.graph.observers import has_observers
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.fold_batch_norm import fold_batch_norm
from zeropoint.report.accuracy import AccuracyWork
from zeropoint.report.coverage import quantized_count
from zeropoint.report.page.ranges import ActivationRange, WatchedRun
from zeropoint.report.record import record_of, refresh_biases, require_unprepared
from zeropoint.report.stages import Progress, Stages
from zeropoint.result import QuantizedModel
from zeropoint.runtime.child import expect_children
from zeropoint.runtime.verify import verify as verify_file
from zeropoint.training import Evaluate, Train, check_functions, prepare_training, train_from
from zeropoint.workflow import convert_pt2e, prepare_pt2e

COMPARED_BATCHES = 2
"""Calibration batches on which file, converted and float model are compared."""
ACCURACY = ("equalize", "correct_biases")
"""What ``quantize`` does for accuracy unless told otherwise."""
NOT_ASKED_FOR = "not asked for"


def quantize(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: tuple[Any, ...],
    calibration_data: Iterable[Any] | None = None,
    backend: Literal["xnnpack"] = "xnnpack",
    *,
    quantizer: Quantizer | None = None,
    dynamic_shapes: Any = None,
    accuracy: Sequence[Literal["equalize", "correct_biases"]] = ACCURACY,
    verify: bool = True,
    progress: bool | Progress | None = None,
    train: Train | None = None,
    evaluate: Evaluate | None = None,
) -> QuantizedModel:
    """Returns the model quantized to int8, as a converted graph and as a file that was run and compared.

    Args:
        model: a module, an exported program or its ``.module()``, which is left as it was. The result is of its eval
            mode.
        example_inputs: positional inputs; shapes and dtypes as in use.
        calibration_data: batches, each a tuple of positional inputs or one tensor; real data, as in use. None for a
            quantizer that measures nothing, of weights alone or with activations quantized at run time: the file is
            then compared on the example inputs.
        backend: where the file will run.
        quantizer: annotates the graph; by default the backend's, int8 with per-channel weights.
        dynamic_shapes: which sizes are free, as in ``torch.export.export``; for a module that is not exported yet.
        accuracy: what is done beyond rounding: ``"equalize"`` the channels of activations between two layers,
            ``"correct_biases"`` for the shift that rounding gives to the mean of each channel, unless the model writes
            to buffers. The first leaves what the float model computes as it is; the second changes the biases of the
            quantized model only.
        verify: run the file in a child process and compare it with the converted model, on the first two batches.
        progress: write progress to standard error; by default when that is a terminal. Or a function that is told the
            stage, how many of its items are done, and their number or None.
        train: trains the model it is called with, in place, by a loop of your own: a copy of yours with fake
            quantizers (``prepare_qat_pt2e``), whose ranges cover the calibration data, in train mode. It returns None,
            or the model to take, which may be a copy or wrapped. What it became is converted, and checked site by site
            to compute what was trained; the result is the better one of it and the model before training. A
            ``quantizer`` is then one whose specs name fake quantizers.
        evaluate: measures a converted model by a number of which higher is better; it decides which is kept. Without
            it both are measured by their fit to the float model, which training for labels leaves: then the trained
            one is kept, with a warning in the summary where it fits less than the other, unless it fits no better than
            the mean of the outputs would.

    Raises:
        SpecError: a choice that does not exist, or ``dynamic_shapes`` of a model that is exported already.
        CaptureError: the model cannot be exported.
        GraphError: it is prepared or converted already.
        CalibrationError: there is no data, or it does not fit the model.
        NonFiniteError: a value of the model, or a parameter after training, is NaN or infinite.
        NothingQuantizedError: no operator would be quantized.
        AnnotationError, RuleError: the quantizer's annotations contradict the graph, or a rule matches nothing.
        LoweringError: the backend would refuse the converted model, or compute it wrongly.
        RuntimeFailure: the file does not run; names the first operator with which it does not.
        VerificationError: the file computes something else; names the first operator that differs. Or what was trained
            is not what was converted; names the first site.
        MissingExtraError: the backend's package is not installed; found before anything is done.
    """
    _check_backend(backend)
    _check_accuracy(accuracy)
    check_functions(train, evaluate)
    require_bool("verify", verify, "quantize")
    if progress is not None and not callable(progress):
        require_bool("progress", progress, "quantize")
    stages = Stages(progress)
    with stages.stage("export"):
        float_model = capture_in_eval_mode(model, example_inputs, dynamic_shapes=dynamic_shapes)
        require_unprepared(float_model, "quantize")
    trainable = None
    if train is not None:
        with stages.stage("prepare training"):
            used = _default_quantizer(is_qat=True) if quantizer is None else quantizer
            trainable = prepare_training(model, example_inputs, dynamic_shapes, used)
    with stages.stage("read data"):
        data = _data(calibration_data, example_inputs, float_model)
        is_calibrated = calibration_data is not None
        accuracy = accuracy if is_calibrated else ()
    working, equalized = _improve(float_model, data, accuracy, stages)
    reference = _float_means(working, float_model, data, accuracy, stages)
    with stages.stage("prepare"):
        prepared = prepare_pt2e(working, quantizer if quantizer is not None else _default_quantizer())
        _require_quantized(prepared)
        xnnpack.check_prepared(prepared)
    _calibrate(prepared, trainable, data if is_calibrated else None, stages)
    with stages.stage("convert"):
        converted = _convert(prepared, is_calibrated)
    correction = _correct(converted, data, reference, stages)
    unasked = NOT_ASKED_FOR if is_calibrated else "no calibration data"
    work = _accuracy_work(accuracy, equalized, correction, unasked)
    finish = partial(_finish, float_model, example_inputs, data.kept[:COMPARED_BATCHES], verify, stages)
    result = finish(converted, work)
    if trainable is None or train is None:
        return result
    return train_from(result, trainable, train, evaluate, (float_model, data.kept), finish, stages)


def _calibrate(
    prepared: GraphModule, trainable: GraphModule | None, data: CalibrationData | None, stages: Stages
) -> None:
    """Shows the data to the observers, and to the fake quantizers of a model that will be trained."""
    if data is not None:
        with stages.stage("calibrate"), torch.no_grad():
            watched = nullcontext() if trainable is None else start_ranges(trainable)
            with watched:
                for inputs in stages.count(data, data.count, "calibrate"):
                    prepared(*inputs)
                    if trainable is not None:
                        trainable(*inputs)
    elif trainable is not None:
        trainable.train()


def _finish(
    float_model: GraphModule,
    example_inputs: tuple[Any, ...],
    compared: Sequence[tuple[Any, ...]],
    verify: bool,
    stages: Stages,
    converted: GraphModule,
    work: AccuracyWork,
) -> QuantizedModel:
    """Lowers a converted model, runs the file and compares all three."""
    restart(converted, float_model)
    if verify:
        expect_children()
    with stages.stage("lower"):
        lowered = xnnpack.lower_program(converted, example_inputs)
    verification = None
    if verify:
        with stages.stage("verify"):
            verification = verify_file(lowered.pte, converted, compared, xnnpack.lower)
            restart(converted, float_model)
    with stages.stage("compare"):
        float_sqnr, ranges = _float_sqnr(float_model, converted, compared)
    return QuantizedModel(
        converted, lowered.pte, record_of(converted), lowered.delegates, lowered.outside, float_sqnr, verification,
        work, dict(stages.seconds), lowered.free, example_inputs, ranges, len(compared),
    )  # fmt: skip


def _data(calibration_data: Any, example_inputs: tuple[Any, ...], model: GraphModule) -> CalibrationData:
    """Returns the user's data; the example inputs, to compare on, where there is none."""
    if calibration_data is None:
        return CalibrationData([example_inputs], model, "example inputs")
    return CalibrationData(calibration_data, model)


def _convert(prepared: GraphModule, is_calibrated: bool) -> GraphModule:
    try:
        return convert_pt2e(prepared)
    except CalibrationError as error:
        if is_calibrated:
            raise
        what = "this configuration measures activations, and there is no calibration_data"
        remedy = "Give batches of real data, or a configuration with is_dynamic=True or for weights alone."
        raise CalibrationError(what, where=error.where, remedy=remedy) from error


def _float_sqnr(
    float_model: GraphModule, converted: GraphModule, batches: Sequence[tuple[Any, ...]]
) -> tuple[float, list[ActivationRange]]:
    """Returns the lowest SQNR of the converted model against the float one, both run on copies of their buffers, and
    the values that its activations had.
    """
    reference, watched = copy_graph(float_model), WatchedRun(copy_graph(converted))
    return min(_compare(reference, watched, inputs) for inputs in batches), watched.seen()


def _check_accuracy(accuracy: Sequence[str]) -> None:
    known = isinstance(accuracy, (tuple, list)) and all(name in ACCURACY for name in accuracy)
    if not known:
        remedy = f"Give a tuple of {', '.join(repr(name) for name in ACCURACY)}; () for none."
        raise SpecError(f"accuracy={accuracy!r} is unknown", where="quantize", remedy=remedy)


def _improve(
    float_model: GraphModule, data: CalibrationData, accuracy: Sequence[str], stages: Stages
) -> tuple[GraphModule, list[Pair]]:
    """Returns a copy of the model to be quantized, and the pairs of layers that were equalized in it."""
    with stages.stage("canonicalize"):
        working = copy_graph(float_model)
        canonicalize(working)
        fold_batch_norm(working)
    pairs: list[Pair] = []
    if "equalize" in accuracy:
        with stages.stage("equalize"):
            pairs = equalize(working, data.kept)
    return working, pairs


def _float_means(
    working: GraphModule, float_model: GraphModule, data: CalibrationData, accuracy: Sequence[str], stages: Stages
) -> dict[str, torch.Tensor] | None:
    """Returns what bias correction wants of the model before it is quantized; None where none is to be done.

    So where the model writes to buffers: it corrects layer by layer, each on all batches, and what such a model
    computes depends on the batches before.
    """
    reference = None
    if "correct_biases" in accuracy and not mutated_attributes(working.graph):
        with stages.stage("float means"):
            reference = channel_means(working, data.kept)
    restart(working, float_model)
    return reference


def _correct(
    converted: GraphModule, data: CalibrationData, reference: dict[str, torch.Tensor] | None, stages: Stages
) -> Correction | None:
    if reference is None:
        return None
    with stages.stage("correct biases"):
        correction = correct_biases(converted, data.kept, reference)
        refresh_biases(converted)
    return correction


def _accuracy_work(
    accuracy: Sequence[str], pairs: Sequence[Pair], correction: Correction | None, unasked: str
) -> AccuracyWork:
    """Returns what was done for accuracy, and why what was not."""
    not_equalized = "" if pairs else "no two have only relu, pooling or zero padding between them"
    not_corrected = "the model writes to buffers" if correction is None else correction.reason
    return AccuracyWork(
        tuple((pair.first.name, pair.second.name) for pair in pairs),
        () if correction is None else correction.changed,
        not_equalized if "equalize" in accuracy else unasked,
        not_corrected if "correct_biases" in accuracy else unasked,
    )


def _check_backend(backend: str) -> None:
    if backend != "xnnpack":
        raise SpecError(f"backend={backend!r} is unknown", where="quantize", remedy="Use one of: 'xnnpack'.")
    require_extra("executorch.exir", "executorch")


def _default_quantizer(*, is_qat: bool = False) -> Quantizer:
    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_default_quantization_config(is_qat=is_qat))


def _require_quantized(prepared: GraphModule) -> None:
    rows = record_of(prepared).coverage
    if quantized_count(rows) == 0 and not has_observers(prepared):
        reasons = "; ".join(dict.fromkeys(f"{row.operator}: {row.reason}" for row in rows[:6]))
        reasons = reasons if rows else "the model has no operator that computes anything"
        raise NothingQuantizedError(f"no operator is quantized: {reasons}", where="quantize")


@torch.no_grad()
def _compare(reference: GraphModule, watched: WatchedRun, inputs: tuple[Any, ...]) -> float:
    pairs = zip(pytree.tree_leaves(reference(*inputs)), pytree.tree_leaves(watched.run(*inputs)), strict=True)
    return min((sqnr_db(e, a) for e, a in pairs if is_float(e)), default=math.nan)
