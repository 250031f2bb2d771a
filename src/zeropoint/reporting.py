"""``write_report``: all that is known about a quantized model, as one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from zeropoint.core.errors import CalibrationError, CaptureError, SpecError
from zeropoint.core.extras import require_extra
from zeropoint.core.files import write_atomically
from zeropoint.graph.capture import require_exported
from zeropoint.graph.copies import copy_graph
from zeropoint.graph.inputs import inputs_for
from zeropoint.graph.observers import has_observers
from zeropoint.report.compare.site_table import Comparison
from zeropoint.report.page.page import EXTRA, Facts, page
from zeropoint.report.page.ranges import ActivationRange, activation_ranges
from zeropoint.report.record import record_of
from zeropoint.report.speed.benchmark import Benchmark
from zeropoint.report.summary import decibels
from zeropoint.runtime.verify import Verification

if TYPE_CHECKING:
    from zeropoint.result import QuantizedModel

WHERE = "write_report"
TITLE = "Quantized model"


def write_report(
    result: QuantizedModel | GraphModule,
    path: str | os.PathLike[str],
    *,
    comparison: Comparison | None = None,
    benchmark: Benchmark | None = None,
    data: Iterable[Any] | None = None,
    title: str = TITLE,
) -> Path:
    """Writes one HTML file about a quantized model, whole or not at all, and returns its path.

    It opens without a network, and works on a phone, in dark mode and in print. Extra ``report``.

    Args:
        result: what ``quantize`` returned; or ``convert_pt2e``, of which less is known.
        path: where it is written.
        comparison: what ``compare`` returned: the accuracy of each site.
        benchmark: what ``bench`` returned: time, size and memory on the runtime.
        data: batches on which the ranges of activations are counted, in one pass; by default those on which
            ``quantize`` compared its result with the float model, the first two of the calibration data.
        title: of the page.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed; found before anything is done.
        SpecError: an argument is something else.
        CaptureError: ``result`` is no quantized model; prepared ones included.
        CalibrationError: a batch does not fit the model.
        FileError: the file cannot be written.
    """
    require_packages()
    _check("comparison", comparison, Comparison)
    _check("benchmark", benchmark, Benchmark)
    _check("title", title, str)
    facts = _facts(result, title)
    ranges, words = _known_ranges(result) if data is None else (_ranges_on(facts.model, data), "the data given")
    facts = replace(facts, comparison=comparison, benchmark=benchmark, ranges=ranges, ranges_of=words)
    return write_atomically(path, page(facts).encode())


def require_packages() -> None:
    """Raises where a package that the page needs is missing: before any work.

    Raises:
        MissingExtraError: names it.
    """
    for package in ("jinja2", "plotly"):
        require_extra(package, EXTRA)


def _check(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        remedy = f"Give what zeropoint.{'compare' if kind is Comparison else 'bench'} returned."
        remedy = "Give a text." if kind is str else remedy
        raise SpecError(f"{name} is {type(value).__name__}, not {kind.__name__}", where=WHERE, remedy=remedy)


def _facts(result: QuantizedModel | GraphModule, title: str) -> Facts:
    """Returns what is known of a result; of a converted model, what its graph and its record tell."""
    model = require_exported(getattr(result, "model", result))
    if has_observers(model):
        raise CaptureError("the model is prepared, not converted", where=WHERE, remedy="Give it to convert_pt2e first.")
    if record_of(model).representation == "reference":
        remedy = "Convert a copy with use_reference_representation=False."
        raise CaptureError("the model is in the reference representation", where=WHERE, remedy=remedy)
    if isinstance(result, GraphModule):
        return Facts(model, title)
    verified = result.verification
    return Facts(
        model, title, size=len(result.pte), delegates=result.delegates, outside=result.outside,
        float_sqnr_db=result.float_sqnr_db, file_text="" if verified is None else agreement_text(verified),
        accuracy=result.accuracy, stages_s=dict(result.stages_s),
    )  # fmt: skip


def _known_ranges(result: QuantizedModel | GraphModule) -> tuple[Sequence[ActivationRange], str]:
    """Returns the ranges of activations that ``quantize`` saw, and on what."""
    if isinstance(result, GraphModule):
        return (), ""
    calibrated = "the calibration batch" if result.compared == 1 else f"the first {result.compared} calibration batches"
    return result.ranges, calibrated if "calibrate" in result.stages_s else "the example inputs"


def _ranges_on(model: GraphModule, data: Any) -> list[ActivationRange]:
    """Returns the ranges of activations on a user's batches."""
    if isinstance(data, (str, bytes, torch.Tensor)) or not isinstance(data, Iterable):
        what = f"data is {type(data).__name__}, not an iterable of batches"
        raise CalibrationError(what, where=WHERE, remedy="Give a list of tuples of inputs, or a DataLoader.")
    return activation_ranges(copy_graph(model), _fitting(model, data))


def _fitting(model: GraphModule, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    for i, batch in enumerate(batches):
        yield inputs_for(model, batch, f"batch {i}")


def agreement_text(verification: Verification) -> str:
    """Returns how a file agrees with the converted model, in words."""
    notes = ", no value further than one step" if verification.within_one_step else ""
    if not math.isinf(shaken := verification.shaken_db):
        notes = f", the model against itself with other last bits {decibels(shaken)}"
    ties = "" if verification.integers_equal else ", integers but for ties"
    return f"{decibels(verification.sqnr_db)}{notes}{ties}"
