"""What a model carries with it about its quantization, as plain data in ``model.meta``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY
from zeropoint.core.errors import GraphError
from zeropoint.core.policy import RECORD_KEY, BackendPolicy
from zeropoint.graph.attributes import get_attribute, tensors_of
from zeropoint.graph.bind import argument
from zeropoint.graph.observers import has_observers
from zeropoint.numerics import ops
from zeropoint.passes.round_biases import BiasRounding
from zeropoint.report.coverage import CoverageRow, quantized_count

Representation: TypeAlias = Literal["q/dq", "reference"]
"""Quantize and dequantize operators around float ones, or integer arithmetic."""


@dataclass(frozen=True, slots=True)
class Record:
    """The history of a prepared or converted model.

    Args:
        policy: that of the quantizer's backend; None for a quantizer that states none.
        coverage: one row per compute node.
        float_bytes: size of parameters and buffers before quantization, in bytes.
        converted_bytes: the same after conversion; 0 before.
        biases: how biases were rounded.
        representation: how a converted graph is written.
        is_qat: the model was prepared for training.
        stays_float: the quantizer is composed of none, which asks for a float model.
    """

    policy: BackendPolicy | None
    coverage: tuple[CoverageRow, ...]
    float_bytes: int
    converted_bytes: int = 0
    biases: tuple[BiasRounding, ...] = ()
    representation: Representation = "q/dq"
    is_qat: bool = False
    stays_float: bool = False

    @property
    def rounds_biases(self) -> bool:
        """True when the backend computes float biases on the int32 grid."""
        return self.policy is not None and self.policy.bias == "float on the int32 grid"

    @property
    def halves_tables(self) -> bool:
        """True when embedding tables that stay float are stored as float16."""
        return self.policy is not None and self.policy.tables == "float16"


def start_record(model: GraphModule, rows: tuple[CoverageRow, ...], quantizer: Any, *, is_qat: bool = False) -> None:
    """Puts a new record on a model that is about to get observers, or fake quantizers for training."""
    composed = getattr(quantizer, "quantizers", None)
    stays_float = isinstance(composed, (list, tuple)) and not composed
    size = model_bytes(model)
    model.meta[RECORD_KEY] = Record(policy_of(quantizer), rows, size, is_qat=is_qat, stays_float=stays_float)


def record_of(model: GraphModule) -> Record:
    """Returns the model's record; an empty one for a model of another package."""
    return model.meta.get(RECORD_KEY) or Record(None, (), model_bytes(model))


def require_unprepared(model: GraphModule, where: str) -> None:
    """Raises when the model was prepared, or converted, and not exported again since.

    Raises:
        GraphError: says which, and what to do.
    """
    remedy = "Export the model again to prepare it in another way: its graph was changed."
    if has_observers(model):
        remedy = f"Calibrate it and give it to convert_pt2e. {remedy}"
        raise GraphError("the model is prepared already: it has observers", where=where, remedy=remedy)
    annotated = any(Q_ANNOTATION_KEY in node.meta for node in model.graph.nodes)  # Export drops annotations.
    is_reference = getattr(model.meta.get(RECORD_KEY), "representation", None) == "reference"
    if is_reference or (annotated and any(node.target in ops.DEQUANTIZE_OPS for node in model.graph.nodes)):
        raise GraphError("the model is converted already", where=where, remedy=f"Use it as it is. {remedy}")


def require_prepared(model: GraphModule, where: str) -> None:
    """Raises when the model has no observers, unless its quantizer annotated nothing.

    That is warned of: a program for torchao may quantize each of its models with one configuration, also those that
    hold nothing to quantize. A quantizer that is composed of none asked for it.

    Raises:
        GraphError: says why it has none: it was not prepared, or it was converted before.
    """
    record = model.meta.get(RECORD_KEY)
    if has_observers(model) or getattr(record, "stays_float", False):
        return
    if record is None:
        why, remedy = "it was not prepared", "Give the result of prepare_pt2e."
    elif quantized_count(record.coverage) or any(n.target in ops.DEQUANTIZE_OPS for n in model.graph.nodes):
        why = "it was converted already"
        remedy = "Convert it once, and use the model that convert_pt2e returned."
    else:
        what = "the quantizer annotated nothing when the model was prepared, which stays float"
        remedy = "Give prepare_pt2e a quantizer that annotates operators of the model."
        warnings.warn(f"{where}: {what}. {remedy}", stacklevel=4)  # The caller of convert_pt2e, a pipeline.
        return
    raise GraphError(f"the model has no observers: {why}", where=where, remedy=remedy)


def finish_record(model: GraphModule, biases: tuple[BiasRounding, ...], representation: Representation) -> None:
    """Completes the record of a converted model."""
    size = model_bytes(model)
    model.meta[RECORD_KEY] = replace(
        record_of(model), converted_bytes=size, biases=biases, representation=representation
    )


def refresh_biases(model: GraphModule) -> None:
    """Takes channels off the record of biases that round to 0 which a later correction has lifted off it."""
    layers = {node.name: node for node in model.graph.nodes}
    kept: list[BiasRounding] = []
    for bias in record_of(model).biases:
        read = argument(layers[bias.node], "bias") if bias.node in layers else None
        if isinstance(read, Node) and read.op == "get_attr":
            values = get_attribute(model, str(read.target)).detach().flatten()
            bias = replace(bias, to_zero=tuple(c for c in bias.to_zero if values[c] == 0))
        kept.append(bias)
    model.meta[RECORD_KEY] = replace(record_of(model), biases=tuple(kept))


def model_bytes(model: GraphModule) -> int:
    """Returns the size of all parameters and buffers in bytes, a tied tensor once."""
    storages = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_of(model).values()}
    return sum(storages.values())


def policy_of(quantizer: Any) -> BackendPolicy | None:
    """Returns the policy of a quantizer, or the one that all the quantizers it is composed of agree on.

    One that fits any backend has no say.
    """
    policy = getattr(quantizer, "policy", None)
    if policy is not None:
        return policy
    composed = getattr(quantizer, "quantizers", ())
    children = {policy_of(child) for child in composed if not getattr(child, "fits_any_backend", False)}
    return children.pop() if len(children) == 1 else None
