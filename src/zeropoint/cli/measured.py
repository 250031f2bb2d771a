"""A job's model quantized, compared site by site and timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zeropoint.api import QuantizedModel
from zeropoint.api import quantize as quantize_model
from zeropoint.benchmark import bench
from zeropoint.cli.exits import UsageError
from zeropoint.cli.job import Job
from zeropoint.cli.output import StageBar, note
from zeropoint.cli.settings import Settings
from zeropoint.core.errors import ComparisonError
from zeropoint.report.compare.compare import compare
from zeropoint.report.compare.site_table import Comparison
from zeropoint.report.speed.benchmark import Benchmark
from zeropoint.reporting import write_report

KINDS = "a folder of pictures, an .npz or .safetensors file, package.module:callable, or the word random"
RUNS, CURES = 31, 3
"""How often files are timed, and how many cures are looked for, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a page shows beside a result.

    Args:
        comparison: site by site; None where there is no data, or nothing that can be compared.
        benchmark: beside the float file.
    """

    comparison: Comparison | None
    benchmark: Benchmark

    def write(self, result: QuantizedModel, file: Path, title: str) -> None:
        """Writes the page."""
        write_report(result, file, comparison=self.comparison, benchmark=self.benchmark, title=title)


def require_data(data: str | None, settings: Settings, where: str) -> None:
    """Raises where there is no data and the scheme needs some.

    Raises:
        UsageError: so it is.
    """
    if data is None and settings.scheme != "dynamic":
        remedy = f"Give --data: {KINDS}; or --scheme dynamic, which measures nothing."
        raise UsageError("there is no data to measure activations on", where=where, remedy=remedy)


def require_samples(data: object) -> None:
    """Raises where there is no data, which a comparison needs.

    Raises:
        UsageError: so it is.
    """
    if data is None:
        raise UsageError("there is no data to compare on", where="compare", remedy=f"Give --data: {KINDS}.")


def quantized(job: Job, bar: StageBar, *, verify: bool | None = None) -> QuantizedModel:
    """Returns the model quantized as its settings say; ``verify`` goes before theirs."""
    settings, data = job.settings, job.data
    return quantize_model(
        job.graph,
        job.example_inputs,
        None if data is None else data.calibration,
        settings.backend,
        quantizer=job.quantizer,
        accuracy=settings.accuracy,
        verify=settings.verify if verify is None else verify,
        progress=bar,
    )


def compared(job: Job, result: QuantizedModel, bar: StageBar, measure: int = CURES) -> Comparison:
    """Returns how the result compares with float, site by site, on what activations are measured on.

    Raises:
        UsageError: there is no data.
        ComparisonError: the models cannot be compared; says why.
    """
    require_samples(job.data)
    assert job.data is not None
    batches = bar.each(job.data.calibration, len(job.data.calibration), "compare site by site")
    return compare(job.graph, result, batches, measure=measure)


def timed(job: Job, result: QuantizedModel, bar: StageBar, runs: int = RUNS, **options: int | None) -> Benchmark:
    """Returns what the result takes on the runtime beside the float file."""
    bar("run and time", 0, None)
    return bench(job.graph, result, runs=runs, **options)  # type: ignore[arg-type]


def measured(job: Job, result: QuantizedModel, bar: StageBar, *, measure: int = CURES, runs: int = RUNS) -> Measured:
    """Returns what a page shows beside the result; why it has no comparison is said on standard error."""
    comparison = None
    try:
        comparison = None if job.data is None else compared(job, result, bar, measure)
    except ComparisonError as error:
        note(f"zeropoint: warning: the page does not compare site by site: {error}")
    return Measured(comparison, timed(job, result, bar, runs))
