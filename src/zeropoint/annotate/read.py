"""Reading the annotations of a graph into a plan. Specs and annotations are known by their attributes, not classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, require_node
from zeropoint.annotate.plan import Plan, decisions_of, describe_spec
from zeropoint.annotate.stock import replaced
from zeropoint.annotate.tied import check_tied
from zeropoint.core.dtypes import FLOAT_DTYPES, plain_dtype
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from zeropoint.graph.bind import Site, reads
from zeropoint.graph.compat import is_tensor_value
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import describe

Constructor = Callable[[Any], Any]


def read_plan(model: GraphModule, observers: Constructor = replaced) -> Plan:
    """Returns the plan that the annotations of the graph, and of the bodies of its control flow, ask for.

    ``observers`` gives the constructor to use for the one that a spec holds.

    Raises:
        AnnotationError: an annotation names a literal, or a node that is not read, holds no spec that is known, or
            quantizes a tensor of integers; or rules want different things of one parameter.
    """
    plan = Plan()
    for _, body in bodies(model):
        plan = plan.merge(read_plan(body, observers))
    for node in model.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None:
            _read_inputs(plan, node, annotation, observers)
            _read_output(plan, node, annotation, observers)
    plan.decisions.update(decisions_of(model.graph.nodes))
    check_tied(model, plan)
    return plan


def _read_inputs(plan: Plan, node: Node, annotation: Any, observers: Constructor) -> None:
    if not getattr(annotation, "allow_implicit_sharing", True):
        plan.unshared.add(node)
    wanted = getattr(annotation, "input_qspec_map", None) or {}
    for source, spec in wanted.items():
        require_node(source, describe(node))
        sites = [site for site, read in reads(node) if read is source]
        if not sites:
            what = f"its annotation names the input {source.name}, which it does not read"
            remedy = f"It reads {', '.join(n.name for n in node.all_input_nodes) or 'nothing'}."
            raise AnnotationError(what, where=describe(node), remedy=remedy)
        if spec is not None:
            plan.specs.update(dict.fromkeys(sites, _read_spec_of(source, spec, sites[0], observers)))


def _read_output(plan: Plan, node: Node, annotation: Any, observers: Constructor) -> None:
    spec = getattr(annotation, "output_qspec", None)
    if spec is None:
        return
    if "val" in node.meta and not is_tensor_value(node.meta["val"]):
        what = "its output is annotated, but it returns no single tensor"
        raise AnnotationError(what, where=describe(node), remedy="Annotate the getitem nodes that take it apart.")
    plan.specs[Site(node)] = _read_spec_of(node, spec, Site(node), observers)


def _read_spec_of(tensor: Node, spec: Any, site: Site, observers: Constructor) -> QuantizationSpecBase:
    """Returns the spec of a site that reads or makes a tensor; a spec that rounds goes with a float tensor only."""
    found, value = read_spec(spec, site.node), tensor.meta.get("val")
    dtype = getattr(found, "dtype", torch.float32)
    if isinstance(value, torch.Tensor) and not value.is_floating_point() and plain_dtype(dtype) not in FLOAT_DTYPES:
        what = f"{site} is {value.dtype}, and its annotation asks for {describe_spec(found)}"
        raise AnnotationError(what, where=describe(site.node), remedy="Annotate tensors of a float type only.")
    return _built_by(found, observers) if isinstance(found, QuantizationSpec) else found


def _built_by(spec: QuantizationSpec, observers: Constructor) -> QuantizationSpec:
    """Returns the spec with the constructor that ``observers`` gives for its own."""
    constructor = observers(spec.observer_or_fake_quant_ctr)
    if constructor is spec.observer_or_fake_quant_ctr:
        return spec
    return replace(spec, observer_or_fake_quant_ctr=constructor)


def read_spec(spec: Any, node: Node) -> QuantizationSpecBase:
    """Returns a spec of any package as one of our four kinds, told apart by its attributes.

    Raises:
        AnnotationError: it is none of them.
    """
    if isinstance(spec, QuantizationSpecBase):
        return spec
    if hasattr(spec, "edge_or_node"):
        return SharedQuantizationSpec(spec.edge_or_node)
    if hasattr(spec, "derive_qparams_fn"):
        return DerivedQuantizationSpec(**_fields(spec, DerivedQuantizationSpec))
    if hasattr(spec, "observer_or_fake_quant_ctr"):
        return QuantizationSpec(**_fields(spec, QuantizationSpec))
    if hasattr(spec, "scale") and hasattr(spec, "zero_point"):
        return FixedQParamsQuantizationSpec(**_fields(spec, FixedQParamsQuantizationSpec))
    what = f"{type(spec).__name__} is no quantization spec"
    remedy = "A spec has edge_or_node, derive_qparams_fn, observer_or_fake_quant_ctr, or scale and zero_point."
    raise AnnotationError(what, where=describe(node), remedy=remedy)


def _fields(spec: Any, kind: type[Any]) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in kind.__dataclass_fields__ if hasattr(spec, name)}
