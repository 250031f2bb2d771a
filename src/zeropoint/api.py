"""``quantize``: from a model and data to a verified file, in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.algorithms.correct_biases import Correction, channel_means, correct_biases
from zeropoint.algorithms.equalize import Pair, equalize
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.backends import xnnpack
from zeropoint.calibration import CalibrationData
from zeropoint.core.arguments import require_bool
from zeropoint.core.errors import CalibrationError, NothingQuantizedError, SpecError
from zeropoint.core.extras import require_extra
from zeropoint.core.files import write_atomically
from zeropoint.graph.attributes import get_attribute, set_parameter
from zeropoint.graph.capture import capture
from zeropoint.graph.constants import mutated_attributes, with_own_buffers
from zeropoint.graph.observers import has_observers
from zeropoint.numerics.quantized_tensor import QuantizedTensor
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.fold_batch_norm import fold_batch_norm
from zeropoint.report.accuracy import AccuracyWork, accuracy_line
from zeropoint.report.coverage import CoverageRow, quantized_count
from zeropoint.report.record import Record, record_of, refresh_biases, require_unprepared
from zeropoint.report.speed import speed_note, work_of
from zeropoint.report.stages import Stages
from zeropoint.report.summary import bias_lines, coverage_lines, decibels, size_line
from zeropoint.report.tensors import float_weight_lines, quantized_tensors
from zeropoint.reporting import agreement_text, write_report
from zeropoint.runtime.verify import Verification
from zeropoint.runtime.verify import verify as verify_file
from zeropoint.workflow import convert_pt2e, prepare_pt2e

COMPARED_BATCHES = 2
"""Calibration batches on which file, converted and float model are compared."""
ACCURACY = ("equalize", "correct_biases")
"""What ``quantize`` does for accuracy unless told otherwise."""
NOT_ASKED_FOR = "not asked for"


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What ``quantize`` made. Printing it gives the summary.

    Args:
        model: the converted graph module, which runs in PyTorch.
        pte: the bytes of the file.
        record: coverage, sizes and biases.
        delegates: pieces of the model that run on the backend; one is best.
        outside: operators left outside of it, with how often.
        float_sqnr_db: lowest SQNR of a float output of the converted model against the float model, in dB, on the
            first two calibration batches; NaN where all outputs are integers.
        verification: how the file compares with the converted model on the runtime, on the same batches; None: not
            verified.
        accuracy: what was done for accuracy beyond rounding, and why not more.
        stages_s: seconds that each stage took.
        free: the largest size of each axis of an input that is free in the file, by ``input[axis]``.
        example_inputs: the positional inputs that ``quantize`` was given.
        compared: the batches of the comparison with the float model.
    """

    model: GraphModule = field(repr=False)
    pte: bytes = field(repr=False)
    record: Record
    delegates: int
    outside: tuple[tuple[str, int], ...]
    float_sqnr_db: float
    verification: Verification | None
    accuracy: AccuracyWork
    stages_s: dict[str, float]
    free: tuple[tuple[str, int], ...] = ()
    example_inputs: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    compared: tuple[tuple[Any, ...], ...] = field(default=(), repr=False, compare=False)

    @property
    def coverage(self) -> tuple[CoverageRow, ...]:
        """One row per compute node: integer, or float with the reason."""
        return self.record.coverage

    @property
    def runtime_sqnr_db(self) -> float | None:
        """Lowest SQNR of a float output of the file against the converted model, in dB; None: not verified."""
        return None if self.verification is None else self.verification.sqnr_db

    def speed_note(self) -> str:
        """Returns why int8 may not be faster than float on this processor; empty where nothing speaks against it."""
        return speed_note(work_of(self.model))

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Returns the weights that are stored as integers with whole zero points, by their path in the float model."""
        return quantized_tensors(self.model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file, whole or not at all, and returns its path.

        Raises:
            FileError: it cannot be written there.
        """
        return write_atomically(path, self.pte)

    def report(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Writes an HTML file that shows all of this, and returns its path; options as of ``write_report``."""
        return write_report(self, path, **options)

    def __str__(self) -> str:
        left = ", ".join(f"{name} {count}" for name, count in self.outside) or "nothing"
        file = "not verified" if self.verification is None else f"{agreement_text(self.verification)} on the runtime"
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages_s.items())
        speed = [f"speed     {note}"] if (note := self.speed_note()) else []
        data = "calibration data" if "calibrate" in self.stages_s else "the example inputs"
        free = [f"sizes     free up to {', '.join(f'{axis} {end}' for axis, end in self.free)}"] if self.free else []
        return "\n".join(
            [
                *coverage_lines(self.coverage),
                accuracy_line(self.accuracy),
                *bias_lines(self.record.biases),
                size_line(self.record.float_bytes, self.record.converted_bytes, "weights"),
                *float_weight_lines(self.model, self.record.converted_bytes),
                f"file      {len(self.pte):,} bytes; {self.delegates} delegate(s); left outside: {left}",
                f"outputs   against float {decibels(self.float_sqnr_db)} on {data}",
                f"          file against converted model: {file}",
                *free,
                *speed,
                f"stages    {times}",
            ]
        )


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
    progress: bool | None = None,
) -> QuantizedModel:
    """Returns the model quantized to int8, as a converted graph and as a file that was run and compared.

    Args:
        model: a module, an exported program or its ``.module()``. A module is left as it was.
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
        progress: write progress to standard error; by default when that is a terminal.

    Raises:
        SpecError: a choice that does not exist, or ``dynamic_shapes`` of a model that is exported already.
        CaptureError: the model cannot be exported.
        GraphError: it is prepared or converted already.
        CalibrationError: there is no data, or it does not fit the model.
        NothingQuantizedError: no operator would be quantized.
        AnnotationError, RuleError: the quantizer's annotations contradict the graph, or a rule matches nothing.
        LoweringError: the backend would refuse the converted model, or compute it wrongly.
        RuntimeFailure: the file does not run; names the first operator with which it does not.
        VerificationError: the file computes something else; names the first operator that differs.
        MissingExtraError: the backend's package is not installed; found before anything is done.
    """
    _check_backend(backend)
    _check_accuracy(accuracy)
    require_bool("verify", verify, "quantize")
    if progress is not None:
        require_bool("progress", progress, "quantize")
    stages = Stages(progress)
    with stages.stage("export"):
        captured = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
        require_unprepared(captured, "quantize")
        float_model = with_own_buffers(captured)
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
    if is_calibrated:
        with stages.stage("calibrate"), torch.no_grad():
            for inputs in stages.count(data, data.count, "calibrate"):
                prepared(*inputs)
    with stages.stage("convert"):
        converted = _convert(prepared, is_calibrated)
    correction = _correct(converted, data, reference, stages)
    _restart(converted, float_model)
    with stages.stage("lower"):
        lowered = xnnpack.lower_program(converted, example_inputs)
    compared = data.kept[:COMPARED_BATCHES]
    verification = None
    if verify:
        with stages.stage("verify"):
            verification = verify_file(lowered.pte, converted, compared, xnnpack.lower)
            _restart(converted, float_model)
    with stages.stage("compare"):
        float_sqnr = _float_sqnr(float_model, converted, compared)
    unasked = NOT_ASKED_FOR if is_calibrated else "no calibration data"
    work = _accuracy_work(accuracy, equalized, correction, unasked)
    return QuantizedModel(
        converted, lowered.pte, record_of(converted), lowered.delegates, lowered.outside, float_sqnr, verification,
        work, dict(stages.seconds), lowered.free, example_inputs, tuple(compared),
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


def _restart(model: GraphModule, beginning: GraphModule) -> None:
    """Gives the buffers that the model writes to the values that they have in another one, which was not run yet."""
    for path in mutated_attributes(model.graph):
        set_parameter(model, path, get_attribute(beginning, path).detach().clone())


def _float_sqnr(float_model: GraphModule, converted: GraphModule, batches: Sequence[tuple[Any, ...]]) -> float:
    """Returns the lowest SQNR of the converted model against the float one, both run on copies of their buffers."""
    models = with_own_buffers(float_model), with_own_buffers(converted)
    return min(_compare(*models, inputs) for inputs in batches)


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
        working = with_own_buffers(float_model)
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
    _restart(working, float_model)
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


def _default_quantizer() -> Quantizer:
    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_default_quantization_config())


def _require_quantized(prepared: GraphModule) -> None:
    rows = record_of(prepared).coverage
    if quantized_count(rows) == 0 and not has_observers(prepared):
        reasons = "; ".join(dict.fromkeys(f"{row.operator}: {row.reason}" for row in rows[:6]))
        reasons = reasons if rows else "the model has no operator that computes anything"
        raise NothingQuantizedError(f"no operator is quantized: {reasons}", where="quantize")


@torch.no_grad()
def _compare(reference: GraphModule, model: GraphModule, inputs: tuple[Any, ...]) -> float:
    pairs = zip(pytree.tree_leaves(reference(*inputs)), pytree.tree_leaves(model(*inputs)), strict=True)
    return min((sqnr_db(e, a) for e, a in pairs if _is_float(e)), default=math.nan)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
