"""Annotations: the interchange format between quantizers and prepare, in ``node.meta``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.fx import Node

from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.core.specs import PER_CHANNEL, PER_TENSOR, SYMMETRIC, QuantizationSpec, QuantizationSpecBase

Q_ANNOTATION_KEY = "quantization_annotation"


@dataclass
class QuantizationAnnotation:
    """What a quantizer wants of one node.

    Args:
        input_qspec_map: for each node read, the spec of what is read; None: explicitly not quantized.
        output_qspec: the spec of what the node returns.
        allow_implicit_sharing: what this node reads may share one observer with other readers and with the producer,
            where their specs are equal.
    """

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False


def annotation_of(node: Node) -> QuantizationAnnotation:
    """Returns the node's annotation, made empty where there was none."""
    return node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())


def annotate_input_qspec_map(node: Node, input_node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Annotates what ``node`` reads from ``input_node``."""
    annotation_of(node).input_qspec_map[input_node] = qspec


def annotate_output_qspec(node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Annotates what ``node`` returns."""
    annotation_of(node).output_qspec = qspec


def is_annotated(node: Node) -> bool:
    """True when a quantizer has dealt with the node, whichever class its annotation is of."""
    return bool(getattr(node.meta.get(Q_ANNOTATION_KEY), "_annotated", False))


def is_valid_annotation(annotation: QuantizationAnnotation | None) -> bool:
    """True when the annotation quantizes something: an input map that is not empty, or an output spec."""
    return annotation is not None and (bool(annotation.input_qspec_map) or annotation.output_qspec is not None)


def get_module_name_filter(module_name: str) -> Callable[[Node], bool]:
    """Returns a function that is True for nodes of the module at a path, or of one inside of it.

    Parameters are in no module. ``set_module_name`` of a quantizer knows more: theirs, and globs.
    """

    def module_name_filter(n: Node) -> bool:
        stack = n.meta.get("nn_module_stack") or {}
        return module_name in [path.removeprefix("L['self'].") for path, _ in stack.values()]

    return module_name_filter


def get_input_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Returns the configuration's spec of input activations."""
    return _per_tensor(quantization_config.input_activation if quantization_config else None)


def get_output_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Returns the configuration's spec of output activations."""
    return _per_tensor(quantization_config.output_activation if quantization_config else None)


def get_weight_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Returns the configuration's spec of weights.

    Raises:
        SpecError: the scheme is not symmetric.
    """
    spec = quantization_config.weight if quantization_config else None
    if spec is not None and spec.qscheme not in (*SYMMETRIC, None):
        allowed = ", ".join(str(s) for s in SYMMETRIC)
        raise SpecError(f"qscheme={spec.qscheme} of the weight", where="configuration", remedy=f"Use one of {allowed}.")
    return spec


def get_bias_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Returns the configuration's spec of biases."""
    return quantization_config.bias if quantization_config else None


def _per_tensor(spec: QuantizationSpec | None) -> QuantizationSpec | None:
    if spec is not None and spec.qscheme in PER_CHANNEL:
        allowed = ", ".join(str(s) for s in PER_TENSOR)
        what = f"qscheme={spec.qscheme} of an activation"
        raise SpecError(what, where="configuration", remedy=f"Use one of {allowed}.")
    return spec


def require_node(value: object, where: str) -> Node:
    """Returns the value when it is a node of a graph.

    Raises:
        AnnotationError: it is a literal, which cannot be quantized.
    """
    if isinstance(value, Node):
        return value
    what = f"{value!r} is annotated as an input, but it is a literal"
    raise AnnotationError(what, where=where, remedy="Annotate inputs that are nodes of the graph.")
