"""What ``quantize`` returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from zeropoint.core.files import write_atomically
from zeropoint.numerics.quantized_tensor import QuantizedTensor
from zeropoint.report.accuracy import AccuracyWork, accuracy_line
from zeropoint.report.coverage import CoverageRow
from zeropoint.report.page.ranges import ActivationRange
from zeropoint.report.record import Record
from zeropoint.report.speed.speed import speed_note, work_of
from zeropoint.report.summary import bias_lines, coverage_lines, decibels, size_line
from zeropoint.report.tensors import float_weight_lines, quantized_tensors
from zeropoint.report.trained.training import Training
from zeropoint.reporting import agreement_text, write_report
from zeropoint.runtime.verify import Verification


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
        ranges: what activations held before they were quantized, on those batches.
        compared: how many batches those are.
        training: which of the trained model and the one before is kept, and how both were measured; None: not trained.
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
    ranges: Sequence[ActivationRange] = field(default=(), repr=False, compare=False)
    compared: int = 0
    training: Training | None = None

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
                *([] if self.training is None else self.training.lines()),
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
