"""Replace observers by quantize and dequantize operators, and constants by their integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.core.dtypes import FLOAT8_DTYPES, INTEGER_DTYPES, check_dtype, plain_dtype
from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.compat import created_from
from zeropoint.graph.constants import FLOAT_PATH_KEY, constant_nodes, evaluate, path_behind
from zeropoint.graph.emit import Fakes, complete_values, inherit, inherit_place
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.observers import observer_of
from zeropoint.graph.source import describe
from zeropoint.numerics.affine_fake_quantize import AffineFakeQuantize
from zeropoint.numerics.observers import AffineQuantizedObserverBase
from zeropoint.numerics.observers.histogram import histograms_in, search_together
from zeropoint.numerics.scratch import LateWrites
from zeropoint.passes.affine_blocks import affine_of, check_layout
from zeropoint.passes.qparams_of import QParams, affine_saw_nothing, observe_constant, qparams_of
from zeropoint.passes.run_time import PASS, check_run_time, quantize_at_run_time, to_half_and_back, value_dtype
from zeropoint.passes.tags import asking, asks_for_output, give_tag

Known = Callable[[GraphModule], dict[int, QParams]]
SITE_KEY = "zeropoint_site"
"""Metadata of what stands where an observer was called: the name of that call in the prepared graph."""


def nothing(model: GraphModule) -> dict[int, QParams]:
    """Returns no scale and zero point: every observer is asked."""
    del model
    return {}


@graph_pass
def convert(
    model: GraphModule, fold_constants: Callable[[Node], bool], writes: LateWrites, known: Known = nothing
) -> None:
    """Replaces each observer by quantize and dequantize operators of its scale and zero point.

    Each annotated reader gets a dequantize of its own, the others share one. A constant is quantized here, to an
    integer buffer ``_frozen_paramN``, where ``fold_constants(node)`` says so; its integers are written when ``writes``
    ends. An observer of a float dtype disappears.
    ``known`` gives the scale and zero point of some observers, by id; the others are asked.

    Raises:
        CalibrationError: an observer saw no data.
        SpecError: nothing can be quantized as an observer says.
    """
    _Converter(model, fold_constants, writes).run(known)


class _Converter:
    def __init__(self, model: GraphModule, fold_constants: Callable[[Node], bool], writes: LateWrites) -> None:
        self.model, self.fold_constants, self.writes = model, fold_constants, writes
        self.constants = constant_nodes(model)
        self.names = Names(model)
        self.qparams: dict[int, QParams] = {}
        self.buffers: dict[tuple[int, str], str] = {}
        self.fakes = Fakes()
        self.frozen: dict[tuple[Node, int], Node] = {}
        self.integers: dict[tuple[Node, int], torch.Tensor] = {}
        """What is not written yet: the integers of parameters, by node and id of the observer."""

    def run(self, known: Known) -> None:
        calls = self._calls()
        own = [(node, observer) for node, observer in calls if _converts_itself(observer)]
        others = [(node, observer) for node, observer in calls if not _converts_itself(observer)]
        search_together(histograms_in(observer for _, observer in others))
        for node, observer in others:
            check_dtype(observer.dtype, describe(_observed(node)))
            self._allocate(node, observer)
        self.writes.touch()
        self.qparams |= known(self.model)
        for node, observer in others:  # What cannot be converted is found before the graph is changed.
            self._ask(node, observer)
        if own:
            self._let_convert(own)
            others = self._calls()
        for node, observer in others:
            with self.model.graph.inserting_before(node):
                self._convert(node, observer)
            self.model.graph.erase_node(node)
        for path in [name for name, module in self.model._modules.items() if hasattr(module, "calculate_qparams")]:
            delattr(self.model, path)

    def _calls(self) -> list[tuple[Node, Any]]:
        """Returns the nodes that call an observer, with that."""
        calls = [(node, observer_of(self.model, node)) for node in self.model.graph.nodes]
        return [(node, observer) for node, observer in calls if observer is not None]

    def _allocate(self, node: Node, observer: Any) -> None:
        """Makes the tensor of a parameter's integers, early, so that its memory is there when it is written to."""
        source = _observed(node)
        if _kind(observer) != "static" or source.op != "get_attr" or source not in self.constants:
            return
        value = get_attribute(self.model, str(source.target))
        if self.fold_constants(node) and value.device.type == "cpu":
            self.integers[source, id(observer)] = self.writes.empty(value.shape, plain_dtype(observer.dtype))

    def _let_convert(self, own: list[tuple[Node, Any]]) -> None:
        """Lets the observers that have a ``convert`` of their own replace the nodes that call them.

        One that saw nothing is shown its constant. A node that calls an observer of ours afterwards, which was around
        the one that had a ``convert``, is left to us.
        """
        for node, observer in own:
            source = _observed(node)
            if source in self.constants and affine_saw_nothing(observer):
                observer(evaluate(self.model, source))
            name, readers = node.name, list(node.users)
            observer.convert(self.model, node)
            _mark(name, source, readers)
        for node, observer in self._calls():
            self._ask(node, observer)
        complete_values(self.model)

    def _ask(self, node: Node, observer: Any) -> None:
        source = _observed(node)
        if (affine := affine_of(observer)) is not None:
            check_layout(affine, source, describe(source), is_constant=source in self.constants)
        match _kind(observer):
            case "static":
                self._qparams(source, observer)
            case "run time":
                check_run_time(source, observer)
            case _:
                pass

    def _convert(self, node: Node, observer: Any) -> None:
        """Puts what the observer becomes where the graph inserts nodes: before its call."""
        source = _observed(node)
        match _kind(observer):
            case "half":
                to_half_and_back(node, source).meta[SITE_KEY] = node.name
            case "float":
                node.replace_all_uses_with(source)
            case "run time":
                give_tag(node, asking(node.users, source))
                quantize_at_run_time(node, source, observer).meta[SITE_KEY] = node.name
            case "static":
                self._static(node, source, observer)

    def _static(self, node: Node, source: Node, observer: Any) -> None:
        qparams = self._qparams(source, observer)
        give_tag(node, None)
        if source in self.constants and self.fold_constants(node):
            quantized = self._freeze(node, source, observer, qparams)
        else:
            quantized = self._quantize(node, source, qparams)
        self._dequantize_for_readers(node, source, quantized, qparams)

    def _qparams(self, source: Node, observer: Any) -> QParams:
        """Returns scale and zero point, from the constant's present value where nothing ran; once per observer."""
        if id(observer) not in self.qparams:
            if source in self.constants:
                observe_constant(observer, lambda: evaluate(self.model, source))
            self.qparams[id(observer)] = qparams_of(observer, source, is_constant=source in self.constants)
        return self.qparams[id(observer)]

    def _arguments(self, node: Node, qparams: QParams) -> tuple[Any, ...]:
        """Returns the arguments after the tensor: scale and zero point are literals per tensor, buffers else."""
        if qparams.is_per_tensor:
            return qparams.arguments(qparams.scale.item(), int(qparams.zero_point.item()))
        scale = self._buffer(node, "_scale_", qparams.scale)
        return qparams.arguments(scale, self._buffer(node, "_zero_point_", qparams.zero_point))

    def _buffer(self, node: Node, prefix: str, value: torch.Tensor) -> Node:
        key = (id(value), prefix)
        if key not in self.buffers:
            self.buffers[key] = self.names.new(prefix)
            self.model.register_buffer(self.buffers[key], value)
        read = node.graph.create_node("get_attr", self.buffers[key])
        like = node.meta.get("val")
        read.meta["val"] = value if like is None else self.fakes.like(like, value.shape, value.dtype)
        inherit(read, node, PASS)
        return read

    def _quantize(self, node: Node, source: Node, qparams: QParams) -> Node:
        target, _ = qparams.operators()
        quantized = node.graph.call_function(target, (source, *self._arguments(node, qparams)))
        self._set_value(quantized, source, qparams.dtype)
        inherit_place(quantized, source, PASS)
        give_tag(quantized, source if source in self.constants or asks_for_output(source) else None)
        return quantized

    def _freeze(self, node: Node, source: Node, observer: Any, qparams: QParams) -> Node:
        """Returns the node of the integer buffer that a constant becomes; one for all equal readings of it."""
        key = (source, id(observer))
        if key in self.frozen:
            return self.frozen[key]
        path = self.names.new("_frozen_param")
        self.model.register_buffer(path, self._integers(key, qparams))
        frozen = node.graph.create_node("get_attr", path)
        frozen.meta = {**source.meta}
        self._set_value(frozen, source, qparams.dtype)
        frozen.meta["from_node"] = created_from(source, PASS)
        frozen.meta[FLOAT_PATH_KEY] = path_behind(source)
        self.frozen[key] = frozen
        return frozen

    def _integers(self, key: tuple[Node, int], qparams: QParams) -> torch.Tensor:
        """Returns the integers of a constant, to be written later."""
        value = evaluate(self.model, key[0])
        integers = self.integers.get(key)
        if integers is None:
            integers = torch.empty(value.shape, dtype=qparams.dtype, device=value.device)
        self.writes.write(lambda: qparams.quantize(value, integers))
        return integers

    def _dequantize_for_readers(self, node: Node, source: Node, quantized: Node, qparams: QParams) -> None:
        _, target = qparams.operators()
        last, named = qparams.result(value_dtype(source))
        others: Node | None = None
        for reader in list(node.users):
            annotated = is_valid_annotation(reader.meta.get(Q_ANNOTATION_KEY))
            dequantized = None if annotated else others
            if dequantized is None:
                arguments = (quantized, *self._arguments(node, qparams), *last)
                dequantized = node.graph.call_function(target, arguments, named)
                self._set_value(dequantized, source, None)
                dequantized.meta[SITE_KEY] = node.name
                dequantized.meta["from_node"] = created_from(source, PASS)  # That is what it computes.
                inherit_place(dequantized, reader if annotated else source, PASS)
                give_tag(dequantized, asking((reader,), source) if annotated else None)
            others = others if annotated else dequantized
            reader.replace_input_with(node, dequantized)

    def _set_value(self, node: Node, source: Node, dtype: torch.dtype | None) -> None:
        """Gives a node the ``val`` of its source, of another dtype where one is given."""
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.meta["val"] = value if dtype is None else self.fakes.like(value, dtype=dtype)


def _mark(name: str, source: Node, readers: list[Node]) -> None:
    """Notes on what the readers of an observer read now, and which it put there itself, where it was called."""
    for read in {read for reader in readers for read in reader.all_input_nodes}:
        if read is not source and read.op == "call_function" and "dequantize" in str(read.target):
            read.meta.setdefault(SITE_KEY, name)


def _observed(node: Node) -> Node:
    """Returns what the observer that a node calls looks at."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _kind(observer: Any) -> Literal["static", "run time", "half", "float"]:
    """Returns what an observer becomes."""
    dtype = plain_dtype(observer.dtype)
    if dtype == torch.float16:
        return "half"
    if dtype not in (*INTEGER_DTYPES, *FLOAT8_DTYPES):
        return "float"
    return "run time" if getattr(observer, "is_dynamic", False) else "static"


def every(node: Node) -> bool:
    """Returns True: each constant is folded."""
    del node
    return True


def none(node: Node) -> bool:
    """Returns False: no constant is folded."""
    del node
    return False


def _converts_itself(observer: Any) -> bool:
    """True for an observer of another package, or of a user, whose ``convert(model, node)`` replaces its call."""
    own = getattr(observer, "convert", None)
    ours = (AffineQuantizedObserverBase.convert, AffineFakeQuantize.convert)
    return callable(own) and getattr(own, "__func__", own) not in ours
