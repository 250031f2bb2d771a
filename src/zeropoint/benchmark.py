"""``bench``: is the quantized file faster than the float one, and if not, why?"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from zeropoint.api import QuantizedModel
from zeropoint.backends import xnnpack
from zeropoint.backends.xnnpack import LoweredProgram
from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import SpecError
from zeropoint.core.processor import integer_dot_product
from zeropoint.graph.capture import capture_in_eval_mode, is_exported, require_exported
from zeropoint.graph.inputs import free_sizes, inputs_for, with_free_sizes
from zeropoint.report.record import require_unprepared
from zeropoint.report.speed.benchmark import Benchmark, FileFigures
from zeropoint.report.speed.borders import borders_of
from zeropoint.report.speed.work import node_work
from zeropoint.runtime.measure import Measurement, measure

WHERE = "bench"
FLOAT, QUANTIZED = "float", "quantized"


def bench(
    float_model: nn.Module | ExportedProgram | GraphModule,
    quantized: QuantizedModel | GraphModule,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    runs: int = 31,
    warmup: int = 5,
    threads: int | None = None,
) -> Benchmark:
    """Returns what the float and the quantized file take on the ExecuTorch runtime, and why it is not less.

    Both run in one child process in turn; memory is measured in a process for each. Sizes that are free in the
    quantized model are free in the float file.

    Args:
        float_model: the model that was quantized: a module, an exported program or its ``.module()``.
        quantized: what ``quantize`` or ``convert_pt2e`` returned; the latter is lowered here.
        example_inputs: positional inputs to run on; by default those that ``quantize`` was given.
        runs: how often each file is run and timed.
        warmup: how often each is run before.
        threads: of the runtime; None: as many as it chooses.

    Raises:
        SpecError: a number that cannot be, or no inputs for a converted model.
        CaptureError, GraphError: the float model cannot be exported, or is quantized; or ``quantized`` is not.
        CalibrationError: the inputs do not fit the model.
        LoweringError, RuntimeFailure: ExecuTorch does not take the model, or a file does not run.
        MissingExtraError: executorch is not installed.
    """
    runs, warmup = _at_least("runs", runs, 1), _at_least("warmup", warmup, 0)
    threads = None if threads is None else _at_least("threads", threads, 1)
    model = quantized.model if isinstance(quantized, QuantizedModel) else require_exported(quantized)
    inputs = _inputs(quantized, model, example_inputs)
    floats = _lower_float(float_model, model, inputs)
    ours = _lowered(quantized, inputs)
    measured = measure({FLOAT: floats.pte, QUANTIZED: ours.pte}, inputs, runs=runs, warmup=warmup, threads=threads)
    return Benchmark(
        _figures(FLOAT, floats, measured), _figures(QUANTIZED, ours, measured), warmup, measured.threads,
        integer_dot_product() or "", node_work(model), borders_of(model),
    )  # fmt: skip


def _at_least(name: str, value: Any, least: int) -> int:
    number = require_integer(name, value, WHERE)
    if number < least:
        raise SpecError(f"{name}={number} is below {least}", where=WHERE, remedy=f"Give {least} or more.")
    return number


def _inputs(quantized: Any, model: GraphModule, given: tuple[Any, ...] | None) -> tuple[Any, ...]:
    if given is None and not isinstance(quantized, QuantizedModel):
        remedy = "Give example_inputs, or the result of quantize, which has its own."
        raise SpecError("a converted model has no example inputs", where=WHERE, remedy=remedy)
    return inputs_for(model, quantized.example_inputs if given is None else given, "example_inputs")


def _lower_float(float_model: Any, model: GraphModule, inputs: tuple[Any, ...]) -> LoweredProgram:
    """Returns the float file, with the sizes free that are free in the quantized model."""
    if isinstance(float_model, ExportedProgram) or is_exported(float_model):
        captured = capture_in_eval_mode(float_model, inputs)
        require_unprepared(captured, WHERE)
        return xnnpack.lower_float(captured, inputs)
    return xnnpack.lower_float(float_model, with_free_sizes(model, inputs), dynamic_shapes=free_sizes(model, inputs))


def _lowered(quantized: QuantizedModel | GraphModule, inputs: tuple[Any, ...]) -> LoweredProgram:
    if isinstance(quantized, QuantizedModel):
        return LoweredProgram(quantized.pte, quantized.delegates, quantized.outside)
    return xnnpack.lower_program(quantized, inputs)


def _figures(name: str, lowered: LoweredProgram, measured: Measurement) -> FileFigures:
    seconds, peak = measured.seconds[name], measured.peak_bytes[name]
    return FileFigures(len(lowered.pte), tuple(seconds), peak, lowered.delegates, lowered.outside)
