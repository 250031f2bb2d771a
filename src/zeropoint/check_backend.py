"""``check_backend``: will a backend compute a quantized model as it is meant, found before calibration or after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from zeropoint.annotate.quantizer import Quantizer
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import PER_TENSOR
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.capture import capture_given, is_exported
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.copies import copy_graph, deep_copy
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.observers import has_observers, observer_of
from zeropoint.numerics import ops
from zeropoint.passes.affine_blocks import affine_of
from zeropoint.report.backend_check import BackendCheck, examine
from zeropoint.workflow import convert_pt2e, prepare_pt2e

WHERE = "check_backend"
BACKENDS = ("xnnpack",)


def check_backend(
    model: nn.Module | ExportedProgram | GraphModule,
    quantizer: Quantizer | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    backend: str = "xnnpack",
) -> BackendCheck:
    """Returns what a backend makes of a quantized model: what it refuses, or computes in float. Changes nothing.

    Args:
        model: what ``convert_pt2e`` or ``prepare_pt2e`` returned, calibrated or not; or a float model, as ``explain``
            takes it, with a quantizer. Without calibration no data is needed: ranges are made up, and what depends on
            them is not checked.
        quantizer: of any package; for a float model.
        example_inputs: positional inputs, for a module that is not exported.
        backend: its name.

    Raises:
        SpecError: the backend does not exist; a quantizer is missing, or is given for a model that is quantized.
        CaptureError: the model is not exported, and there are no example inputs.
        LoweringError: the model was annotated for another backend.
    """
    if backend not in BACKENDS:
        remedy = f"Use one of: {', '.join(map(repr, BACKENDS))}."
        raise SpecError(f"backend={backend!r} is unknown", where=WHERE, remedy=remedy)
    graph = model if isinstance(model, GraphModule) and is_exported(model) else None
    is_prepared = graph is not None and has_observers(graph)
    is_converted = graph is not None and any(node.target in ops.DEQUANTIZE_OPS for node in graph.graph.nodes)
    if (is_prepared or is_converted) == (quantizer is not None):
        what = "the model is quantized already" if quantizer is not None else "the model is float"
        remedy = "Leave the quantizer out." if quantizer is not None else "Give a quantizer."
        raise SpecError(what, where=WHERE, remedy=remedy)
    if graph is not None and is_converted:
        return examine(graph, ranges_are_known=True)
    if graph is not None and is_prepared:
        return _examine_prepared(graph)
    assert quantizer is not None
    return _examine_uncalibrated(prepare_pt2e(copy_graph(capture_given(model, example_inputs, WHERE)), quantizer))


def _examine_prepared(prepared: GraphModule) -> BackendCheck:
    try:
        return examine(convert_pt2e(deep_copy(prepared)), ranges_are_known=True)
    except CalibrationError:
        return _examine_uncalibrated(deep_copy(prepared))


def _examine_uncalibrated(prepared: GraphModule) -> BackendCheck:
    """Converts a model, which may be changed, with made-up ranges."""
    with torch.no_grad():
        _make_up_ranges(prepared)
    return examine(convert_pt2e(prepared), ranges_are_known=False)


def _make_up_ranges(model: GraphModule) -> None:
    """Lets each observer see its constant, or the range from -1 to 1."""
    for _, body in bodies(model):
        _make_up_ranges(body)
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        observer = observer_of(model, node)
        if observer is not None:
            observer(_value(model, node.args[0], constants, observer))


def _value(model: GraphModule, read: Any, constants: set[Node], observer: Any) -> torch.Tensor:
    if read in constants and read.op == "get_attr":
        return get_attribute(model, str(read.target))
    value = read.meta["val"]
    shape = [size if isinstance(size, int) else 2 for size in value.shape]
    if shape and getattr(observer, "qscheme", None) in PER_TENSOR and affine_of(observer) is None:
        shape = [1] * (len(shape) - 1) + [2]  # Its range is that of any two values.
    made_up = torch.zeros(shape, dtype=value.dtype)
    made_up.view(-1)[:1], made_up.view(-1)[-1:] = -1, 1
    return made_up
