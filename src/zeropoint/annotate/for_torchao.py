"""Our quantizers in programs that call torchao's ``prepare_pt2e``, such as ExecuTorch's export recipes.

torchao tells specs, quantizers and observers by their classes. So an adapted quantizer is of torchao's class, it
writes annotations of torchao's classes, and ours count among torchao's observers from then on.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.annotate.read import read_spec
from zeropoint.annotate.stock import unwrapped
from zeropoint.core.extras import import_extra
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from zeropoint.graph.graph_pass import bodies
from zeropoint.numerics.fake_quantize import FakeQuantizeBase
from zeropoint.numerics.observers import ObserverBase


def for_torchao(quantizer: Quantizer) -> Any:
    """Returns a quantizer of torchao's class that annotates as ours does.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    theirs = import_extra("torchao.quantization.pt2e", "executorch")
    theirs.ObserverBase.register(ObserverBase)
    theirs.FakeQuantizeBase.register(FakeQuantizeBase)
    return _adapted_class()(quantizer)


@functools.cache
def _adapted_class() -> type[Any]:
    """Returns the class of adapted quantizers; torchao is needed to make it."""
    theirs: Any = import_extra("torchao.quantization.pt2e.quantizer", "executorch")

    class AdaptedQuantizer(theirs.Quantizer):
        """Calls one of our quantizers, and hands its annotations on."""

        def __init__(self, quantizer: Quantizer) -> None:
            super().__init__()
            self.quantizer = quantizer

        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            return self.quantizer.transform_for_annotation(model)

        def annotate(self, model: GraphModule) -> GraphModule:
            before = {id(annotation) for annotation in _annotations(model).values()}
            self.quantizer.annotate(model)
            for node, annotation in _annotations(model).items():
                if id(annotation) not in before:
                    node.meta[Q_ANNOTATION_KEY] = _their_annotation(theirs, node, annotation)
            self.quantizer.validate(model)  # torchao's ComposableQuantizer, which a recipe makes, does not ask.
            return model

        def validate(self, model: GraphModule) -> None:
            """``annotate`` did this."""

        def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
            self.quantizer.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)

    return AdaptedQuantizer


def _annotations(model: GraphModule) -> dict[Node, Any]:
    found = {node: node.meta[Q_ANNOTATION_KEY] for node in model.graph.nodes if Q_ANNOTATION_KEY in node.meta}
    for _, body in bodies(model):
        found |= _annotations(body)
    return found


def _their_annotation(theirs: Any, node: Node, annotation: Any) -> Any:
    inputs = {
        source: None if spec is None else _their_spec(theirs, node, spec)
        for source, spec in annotation.input_qspec_map.items()
    }
    output = None if annotation.output_qspec is None else _their_spec(theirs, node, annotation.output_qspec)
    return theirs.QuantizationAnnotation(
        input_qspec_map=inputs,
        output_qspec=output,
        allow_implicit_sharing=annotation.allow_implicit_sharing,
        _annotated=True,
    )


def _their_spec(theirs: Any, node: Node, spec: Any) -> Any:
    match read_spec(spec, node):
        case SharedQuantizationSpec(edge_or_node=place):
            return theirs.SharedQuantizationSpec(place)
        case QuantizationSpec() as ours:
            constructor = _their_constructor(ours.observer_or_fake_quant_ctr, ours.ch_axis)
            return theirs.QuantizationSpec(**_fields(replace(ours, observer_or_fake_quant_ctr=constructor)))
        case DerivedQuantizationSpec() as ours:
            return theirs.DerivedQuantizationSpec(**_fields(ours))
        case FixedQParamsQuantizationSpec() as ours:
            return theirs.FixedQParamsQuantizationSpec(**_fields(ours))
        case other:
            raise TypeError(type(other))


def _fields(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def _their_constructor(constructor: Any, ch_axis: int | None) -> Any:
    """Returns a wrapper of torchao's class: of others it asks for ``__name__``.

    It gives ``ch_axis`` to classes with PerChannel in their name only, so that of a fake quantizer is given here.
    """
    kind, arguments, late = unwrapped(constructor)
    wrapper = import_extra("torchao.quantization.pt2e", "executorch").PartialWrapper
    if ch_axis is not None and "PerChannel" in getattr(unwrapped(arguments.get("observer"))[0], "__name__", ""):
        arguments["ch_axis"] = ch_axis
    made = wrapper(functools.partial(kind, **arguments))
    return made.with_callable_args(**late) if late else made
