"""``compare``: which sites of a quantized model cost its accuracy, why, and what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import ComparisonError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.observers import has_observers
from zeropoint.graph.within import graphs_within
from zeropoint.report.compare.compare_run import Comparing
from zeropoint.report.compare.site_table import Comparison
from zeropoint.report.compare.twin import WHERE
from zeropoint.report.conversions import is_dequantize
from zeropoint.report.float_state import require_float_state
from zeropoint.report.record import record_of


def compare(
    float_model: nn.Module | ExportedProgram | GraphModule, quantized: Any, data: Iterable[Any], *, measure: int = 3
) -> Comparison:
    """Returns which sites of a quantized model cost its accuracy, why, and what to do.

    Both models run in lock-step over the data; only four batches are kept. One batch in sixteen is also
    differentiated, which tells to first order how much of the noise at the outputs each site makes.

    Args:
        float_model: the model that was quantized: a module, an exported program, or its ``.module()``.
        quantized: what ``convert_pt2e`` returned, or the result of ``quantize``.
        data: batches, each a tuple of positional inputs or one tensor, as in calibration.
        measure: how many cures are looked for, one after the other. Each costs a run of the quantized model on
            four batches for every rule that is tried, of which there are one to three. 0: none.

    Raises:
        ComparisonError: there is no data; the quantized model has no quantize and dequantize operators; the two are
            not of one network, or have no float output.
        CalibrationError: a batch does not fit the model.
        NonFiniteError: a batch, or an output of the float model, holds NaN.
        CaptureError: the float model cannot be exported.
    """
    measure = require_integer("measure", measure, WHERE)
    return Comparing(float_model, _graph(quantized)).compare(_batches(data), measure)


def _graph(quantized: Any) -> GraphModule:
    model = quantized if isinstance(quantized, nn.Module) else getattr(quantized, "model", None)
    graphs = graphs_within(model) if isinstance(model, nn.Module) else []
    if len(graphs) != 1:
        what = f"quantized is {type(quantized).__name__}, with {len(graphs)} exported graphs, not one"
        raise ComparisonError(what, where=WHERE, remedy="Give what convert_pt2e or quantize returned.")
    graph = graphs[0]
    if any(is_dequantize(node) for node in graph.graph.nodes):
        require_float_state(graph, WHERE)
        return graph
    what, remedy = "the quantized model has no dequantize operators", "Give what convert_pt2e or quantize returned."
    if has_observers(graph):
        what, remedy = "the quantized model has observers: it is prepared, not converted", "Give it to convert_pt2e."
    elif record_of(graph).representation == "reference":
        what = "the quantized model is the reference representation, which has no dequantize operators to compare"
        remedy = "Convert a copy without use_reference_representation=True."
    elif any(is_dequantize(n) for _, body in bodies(graph) for n in body.graph.nodes):
        what = "all dequantize operators are inside of control flow, where sites are not compared"
        remedy = "Compare the bodies as models of their own."
    raise ComparisonError(what, where=WHERE, remedy=remedy)


def _batches(data: Any) -> Iterator[Any]:
    if isinstance(data, (str, bytes, torch.Tensor)) or not isinstance(data, Iterable):
        what = f"data is {type(data).__name__}, not an iterable of batches"
        raise ComparisonError(what, where=WHERE, remedy="Give a list of tuples of inputs, or a DataLoader.")
    return itertools.chain(data)
