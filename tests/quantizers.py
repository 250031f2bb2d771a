"""Quantizers written by hand, for tests of what happens to any quantizer's annotations."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate import annotation
from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.core import specs
from zeropoint.core.specs import QuantizationSpec
from zeropoint.graph.bind import argument, argument_names
from zeropoint.numerics.observers import MinMaxObserver, PerChannelMinMaxObserver

aten = torch.ops.aten
KEY = annotation.Q_ANNOTATION_KEY
OURS = SimpleNamespace(
    **vars(specs),
    QuantizationAnnotation=QuantizationAnnotation,
    MinMaxObserver=MinMaxObserver,
    PerChannelMinMaxObserver=PerChannelMinMaxObserver,
)
"""The classes that an annotation is made of, ours; a test of parity puts torchao's in their place."""

GEMMS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.matmul.default)


def activation(kind=OURS, **changes) -> QuantizationSpec:
    """8 bits, affine, per tensor, by minimum and maximum."""
    fields = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}
    fields = {**fields, "observer_or_fake_quant_ctr": kind.MinMaxObserver, **changes}
    return kind.QuantizationSpec(**fields)


def weight(kind=OURS, ch_axis: int = 0, **changes) -> QuantizationSpec:
    """8 bits, symmetric, per channel."""
    fields = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
    fields = {**fields, "observer_or_fake_quant_ctr": kind.PerChannelMinMaxObserver, "ch_axis": ch_axis, **changes}
    return kind.QuantizationSpec(**fields)


class ByHand:
    """A quantizer that calls a function; no subclass of anything, for either package."""

    def __init__(
        self, function: Callable[[GraphModule], object], callback: Callable[..., object] | None = None
    ) -> None:
        self.function, self.callback = function, callback

    def transform_for_annotation(self, model):
        return model

    def annotate(self, model):
        self.function(model)
        return model

    def validate(self, model):
        pass

    def prepare_obs_or_fq_callback(self, model, edge_or_node_to_obs_or_fq):
        if self.callback is not None:
            self.callback(model, edge_or_node_to_obs_or_fq)


def annotate(node, inputs, output=None, kind=OURS, **fields) -> None:
    """Annotates a node: ``inputs`` by argument name."""
    named = {argument(node, name): spec for name, spec in inputs.items()}
    node.meta[KEY] = kind.QuantizationAnnotation(input_qspec_map=named, output_qspec=output, _annotated=True, **fields)


def static(model: GraphModule, kind=OURS, weight_spec=None, act=None) -> None:
    """Annotates linear layers, convolutions and arithmetic: 8-bit activations and weights."""
    act = activation(kind) if act is None else act
    for node in model.graph.nodes:
        if node.target in (*GEMMS, *TRANSPOSED):
            axis = int(node.target in TRANSPOSED)
            by = weight(kind, axis) if weight_spec is None else weight_spec
            annotate(node, {"input": act, "weight": by}, act, kind)
        elif node.target in BINARY and len(node.args) == sum(isinstance(a, Node) for a in node.args):
            annotate(node, dict.fromkeys(argument_names(node)[:2], act), act, kind)
        elif node.target is aten.cat.default:
            first = argument(node, "tensors")[0]
            shared = kind.SharedQuantizationSpec((first, node))
            inputs = dict.fromkeys(argument(node, "tensors"), shared) | {first: act}
            node.meta[KEY] = kind.QuantizationAnnotation(inputs, shared, _annotated=True)


STATIC = ByHand(static)
