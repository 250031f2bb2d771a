"""One HTML file that holds what is known about a quantized model; it opens without a network."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from torch.fx import GraphModule

from zeropoint.core.extras import import_extra
from zeropoint.core.plain import plain
from zeropoint.report.accuracy import AccuracyWork
from zeropoint.report.compare.site_table import Comparison
from zeropoint.report.coverage import quantized_count
from zeropoint.report.page.drawing import drawing_of
from zeropoint.report.page.page_tables import about, operator_table, site_table
from zeropoint.report.page.ranges import ActivationRange, weight_channels
from zeropoint.report.record import record_of
from zeropoint.report.speed.benchmark import Benchmark
from zeropoint.report.speed.speed import speed_note, work_of
from zeropoint.report.speed.work import NodeWork, node_work
from zeropoint.report.summary import bias_lines, decibels
from zeropoint.report.tensors import float_weight_lines, quantized_tensors

EXTRA = "report"
UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What could end a script or its text, as JSON may write it as well."""
TAG = len("warning   ")
"""Letters before the text in lines of the summary."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a page is made of; what is not known is left out of it.

    Args:
        model: the converted graph module.
        title: of the page.
        size: bytes of the file.
        delegates, outside: as in ``QuantizedModel``.
        float_sqnr_db: lowest SQNR of an output against the float model, in dB.
        file_text: how the file compares with the converted model.
        accuracy: what was done for accuracy.
        stages_s: seconds of each stage.
        comparison, benchmark: what ``compare`` and ``bench`` returned.
        ranges: what activations hold before they are quantized.
        ranges_of: on what data that was.
    """

    model: GraphModule
    title: str
    size: int | None = None
    delegates: int | None = None
    outside: tuple[tuple[str, int], ...] = ()
    float_sqnr_db: float | None = None
    file_text: str = ""
    accuracy: AccuracyWork | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    comparison: Comparison | None = None
    benchmark: Benchmark | None = None
    ranges: Sequence[ActivationRange] = ()
    ranges_of: str = ""


def page(facts: Facts) -> str:
    """Returns the HTML of a report, with all that it needs inside.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    jinja = import_extra("jinja2", EXTRA)
    plotly = import_extra("plotly.offline", EXTRA)
    work = node_work(facts.model)
    environment = jinja.Environment(
        loader=jinja.PackageLoader("zeropoint.report.page"), autoescape=True, undefined=jinja.StrictUndefined
    )
    return environment.get_template("page.html").render(
        _context(facts, work),
        data=jinja.utils.markupsafe.Markup(_json(_data(facts, work))),
        plotly=jinja.utils.markupsafe.Markup(plotly.get_plotlyjs()),
    )


def _context(facts: Facts, work: Sequence[NodeWork]) -> dict[str, Any]:
    comparison, benchmark = facts.comparison, facts.benchmark
    weights = bool(quantized_tensors(facts.model))
    shown = {"accuracy": comparison is not None, "ranges": bool(facts.ranges), "weights": weights}
    names = {
        "accuracy": "Accuracy", "ranges": "Ranges", "weights": "Weights", "speed": "Speed", "graph": "Graph",
        "about": "Configuration",
    }  # fmt: skip
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "title": facts.title,
        "subtitle": f"zeropoint report, {now}",
        "sections": [(name, words) for name, words in names.items() if shown.get(name, True)],
        "tiles": _tiles(facts),
        "notes": _notes(facts),
        "comparison": None if comparison is None else site_table(comparison),
        "benchmark": "" if benchmark is None else str(benchmark),
        "has_ranges": bool(facts.ranges),
        "ranges_of": facts.ranges_of,
        "has_weights": weights,
        "has_work": any(node.multiply_accumulates for node in work),
        "drawing": drawing_of(facts.model),
        "operators": operator_table(facts.model, work),
        "about": about(facts.model, facts.accuracy, facts.stages_s),
    }


# -- what is said at the top -----------------------------------------------------------------------------------------


def _tiles(facts: Facts) -> list[dict[str, Any]]:
    made = (_accuracy_tile(facts), _size_tile(facts), _speed_tile(facts), _integer_tile(facts))
    return [{"name": name, "value": value, "lines": lines} for name, value, lines in made]


def _accuracy_tile(facts: Facts) -> tuple[str, str, list[str]]:
    file = [f"file against converted model: {facts.file_text}"] if facts.file_text else []
    if facts.comparison is not None:
        where = f"SQNR of the outputs against float, {facts.comparison.batches} batches"
        return "Accuracy", decibels(facts.comparison.sqnr_db), [where, *file]
    if facts.float_sqnr_db is None:
        return "Accuracy", "not measured", ["give the result of zeropoint.compare"]
    return "Accuracy", decibels(facts.float_sqnr_db), ["SQNR of the outputs against float", *file]


def _size_tile(facts: Facts) -> tuple[str, str, list[str]]:
    record, lines = record_of(facts.model), list[str]()
    before, after = record.float_bytes, record.converted_bytes
    if before and after:
        lines.append(f"weights {before:,} → {after:,} bytes")
    if facts.benchmark is not None:
        before, after = facts.benchmark.float_file.size, facts.benchmark.quantized_file.size
        return "Size", f"{after / before:.2f} ×", [f"file {before:,} → {after:,} bytes", *lines]
    if facts.size is not None:
        lines.append(f"file {facts.size:,} bytes")
    return "Size", f"{after / before:.2f} ×" if before and after else "not known", lines


def _speed_tile(facts: Facts) -> tuple[str, str, list[str]]:
    found = facts.benchmark
    if found is None:
        return "Speed", "not measured", ["give the result of zeropoint.bench"]
    times = f"the float time: {found.float_file.median_ms:.3g} → {found.quantized_file.median_ms:.3g} ms"
    return "Speed", f"{found.ratio:.2f} ×", [times, f"medians of {found.runs} runs, threads: {found.threads}"]


def _integer_tile(facts: Facts) -> tuple[str, str, list[str]]:
    rows, work = record_of(facts.model).coverage, work_of(facts.model)
    operators = [f"{quantized_count(rows)} of {len(rows)} operators"] if rows else []
    if facts.delegates is not None:
        left = ", ".join(f"{name} {count}" for name, count in facts.outside) or "nothing"
        operators.append(f"delegates: {facts.delegates}, left outside: {left}")
    whole = work.integer + work.floating
    if not whole:
        return "In integers", "no products", operators
    return "In integers", f"{work.integer / whole:.1%}", [f"of {whole:,} multiply-accumulates", *operators]


def _notes(facts: Facts) -> list[tuple[str, str]]:
    """Returns what a reader should know first: pairs of a word and a sentence."""
    record = record_of(facts.model)
    notes: list[tuple[str, str]] = []
    if facts.comparison is not None:
        verdict = itertools.takewhile(str.strip, str(facts.comparison).splitlines())  # An empty line ends it.
        notes += [_split(line) for line in verdict]
    lines = [*bias_lines(record.biases), *float_weight_lines(facts.model, record.converted_bytes)]
    notes += [_split(line) for line in lines]
    slow = facts.benchmark.why if facts.benchmark is not None else (speed_note(work_of(facts.model)),)
    return [*notes, *(("speed", sentence) for sentence in slow if sentence)]


def _split(line: str) -> tuple[str, str]:
    return line[:TAG].strip(), line[TAG:].strip()


# -- what the charts draw --------------------------------------------------------------------------------------------


def _data(facts: Facts, work: Sequence[NodeWork]) -> dict[str, Any]:
    found, weights = facts.benchmark, quantized_tensors(facts.model)
    return {
        "sites": [] if facts.comparison is None else _sites(facts.model, facts.comparison),
        "ranges": [_range(each) for each in facts.ranges],
        "weights": [_fields(weight_channels(name, weight)) for name, weight in weights.items()],
        "work": [
            {"node": n.node, "module": n.module, "macs": n.multiply_accumulates, "integer": n.is_integer} for n in work
        ],
        "times": {}
        if found is None
        else {"float": found.float_file.seconds, "quantized": found.quantized_file.seconds},
    }


def _sites(model: GraphModule, comparison: Comparison) -> list[dict[str, Any]]:
    order = {node.name: i for i, node in enumerate(model.graph.nodes)}
    rows = [
        {"name": row.site, "kind": row.kind, "module": row.module, "sqnr": row.sqnr_db, "own": row.own_sqnr_db,
         "noise": row.noise, "why": row.why, "order": order.get(row.site.partition(".")[0], 0)}
        for row in comparison.sites
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["order"])


def _range(found: ActivationRange) -> dict[str, Any]:
    return {
        **_fields(found),
        "name": found.site,
        "start": found.start,
        "step": found.step,
        "counts": found.counts.tolist(),
    }


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _json(value: Any) -> str:
    """Returns JSON that a script element may hold: no text in it ends the element. What is not finite is null."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    for letter, escaped in UNSAFE.items():
        text = text.replace(letter, escaped)
    return text
