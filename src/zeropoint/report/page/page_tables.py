"""The tables of the HTML report, as rows of cells that sort by number or by text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.core.policy import BackendPolicy
from zeropoint.graph.bind import bind
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.source import module_path, operator_name, source_line
from zeropoint.report.accuracy import AccuracyWork
from zeropoint.report.compare.site_table import Comparison, SiteRow
from zeropoint.report.conversions import is_conversion, is_dequantize, is_quantize
from zeropoint.report.coverage import CoverageRow, compute_nodes
from zeropoint.report.operator_table import integer_nodes
from zeropoint.report.page.environment import environment
from zeropoint.report.record import record_of
from zeropoint.report.speed.work import NodeWork

SITES = (
    "site", "kind", "gain (dB)", "noise", "SQNR (dB)", "own (dB)", "why", "clipped", "unused codes", "cosine", "scale",
    "zero point", "operator", "module", "source",
)  # fmt: skip
DTYPES = ("dtype", "input_dtype", "output_dtype")
GRANULARITIES = (
    ("per_channel_group", "per group"), ("per_channel", "per channel"), ("per_token", "per token"),
    ("per_tensor", "per tensor"),
)  # fmt: skip
OPERATORS = ("node", "operator", "runs in", "multiply-accumulates", "module", "source", "reason")


def site_table(comparison: Comparison) -> dict[str, Any]:
    """Returns columns and rows of the sites of a comparison, that which costs most first."""
    return {"columns": SITES, "rows": [{"kind": "", "cells": _site_cells(row)} for row in comparison.sites]}


def _site_cells(row: SiteRow) -> list[dict[str, Any]]:
    return [
        _text(row.site), _text(row.kind), _number(row.gain_db, ".2f"), _number(row.noise, ".2%"),
        _number(row.sqnr_db, ".1f"), _number(row.own_sqnr_db, ".1f"), _sentence(row.why), _number(row.clipped, ".3%"),
        _number(row.unused_codes, ".0%"), _number(row.cosine, ".4f"), _some(row.scale, ".4g"),
        _some(row.zero_point, "d"), _text(row.operator), _text(row.module), _text(row.source),
    ]  # fmt: skip


def operator_table(model: GraphModule, work: Sequence[NodeWork]) -> dict[str, Any]:
    """Returns columns and rows of what computes: in integers or in float, and why."""
    amounts = {node.node: node.multiply_accumulates for node in work}
    rows = record_of(model).coverage or _uncovered(model)
    return {"columns": OPERATORS, "rows": [_operator(row, amounts.get(row.node, 0)) for row in rows]}


def _operator(row: CoverageRow, amount: int) -> dict[str, Any]:
    kind = "integer" if row.is_quantized else "float"
    texts = [_text(each) for each in (row.node, row.operator, kind, row.module, row.source)]
    return {"kind": kind, "cells": [*texts[:3], _number(amount, ",d"), *texts[3:], _sentence(row.reason)]}


def _uncovered(model: GraphModule) -> list[CoverageRow]:
    """Returns rows of a model that another package converted, which has no record."""
    integer = set(integer_nodes(model, model))
    return [
        CoverageRow(
            n.name, operator_name(n), module_path(n), source_line(n), "", "" if n in integer else "not quantized"
        )
        for n in compute_nodes(model)
        if not is_conversion(n)
    ]


def _text(value: str) -> dict[str, Any]:
    return {"text": value, "key": None, "kind": ""}


def _sentence(value: str) -> dict[str, Any]:
    return {"text": value, "key": None, "kind": "sentence"}


def _number(value: float, form: str) -> dict[str, Any]:
    """Returns a cell that sorts by its number; one that is none sorts last."""
    if math.isnan(value):
        return {"text": "–", "key": "", "kind": "number"}
    text = "exact" if value == math.inf else format(value, form)
    return {"text": text, "key": "Infinity" if value == math.inf else value, "kind": "number"}


def _some(values: Sequence[float], form: str) -> dict[str, Any]:
    """Returns a cell of one value, or of the smallest and the largest of several; sorted by the largest."""
    if not values:
        return {"text": "at run time", "key": "", "kind": "number"}
    low, high = min(values), max(values)
    text = format(high, form) if low == high else f"{format(low, form)} … {format(high, form)}"
    return {"text": text, "key": high, "kind": "number"}


# -- times, configuration, environment -------------------------------------------------------------------------------


def about(
    model: GraphModule,
    accuracy: AccuracyWork | None,
    stages_s: Mapping[str, float],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns lists of names and values with their titles; those that are empty left out."""
    stages = [(name, f"{seconds:.2f} s") for name, seconds in stages_s.items()]
    stages += [("in all", f"{sum(stages_s.values()):.2f} s")] if stages else []
    found = [("Times", stages), ("Configuration", _configuration(model, accuracy)), ("Environment", [*environment()])]
    return [(name, rows) for name, rows in found if rows]


def _configuration(model: GraphModule, accuracy: AccuracyWork | None) -> list[tuple[str, str]]:
    record = record_of(model)
    policy = record.policy
    rows = [("backend", "any" if not isinstance(policy, BackendPolicy) else policy.name)]
    rows += [("biases", policy.bias)] if isinstance(policy, BackendPolicy) else []
    rows.append(("made by", "training" if record.is_qat else "calibration"))
    rows += _types(model)
    if accuracy is not None:
        rows.append(("equalized", f"{len(accuracy.equalized)} pairs" if accuracy.equalized else accuracy.not_equalized))
        corrected = f"{len(accuracy.corrected)} layers" if accuracy.corrected else accuracy.not_corrected
        rows.append(("biases corrected", corrected))
    return rows


def _types(model: GraphModule) -> list[tuple[str, str]]:
    """Returns the kinds of quantization of the graph, with how often each occurs."""
    constants = constant_nodes(model)
    weights = Counter(_kind(node) for node in constants if is_dequantize(node))
    others = Counter(_kind(node) for node in model.graph.nodes if is_quantize(node) and node not in constants)
    return [
        (name, ", ".join(f"{kind} ({count})" for kind, count in found.most_common()))
        for name, found in (("activations", others), ("weights", weights))
        if found
    ]


def _kind(conversion: Node) -> str:
    """Returns the type, the integers and the granularity of a quantize or dequantize operator."""
    given, name = bind(conversion), operator_name(conversion)
    dtype = next((given[key] for key in DTYPES if given.get(key) is not None), None)
    low, high = given.get("quant_min"), given.get("quant_max")
    integers = "" if low is None or high is None else f" {low} to {high}"
    granularity = next((words for part, words in GRANULARITIES if part in name), "")
    at_run_time = ", scale at run time" if isinstance(given.get("scale"), Node) and granularity == "per tensor" else ""
    return f"{str(dtype).removeprefix('torch.')}{integers} {granularity}{at_run_time}".strip()
