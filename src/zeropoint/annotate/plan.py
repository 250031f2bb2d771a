"""The plan: which sites are quantized by which spec, and the decisions behind it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Node

from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
    constructor_key,
)
from zeropoint.graph.bind import Site
from zeropoint.graph.source import describe

DECISION_KEY = "zeropoint_decision"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a quantizer decided about the nodes of one match.

    Args:
        pattern: name of the row that matched; empty where none did.
        nodes: the nodes it covers, head first.
        refusal: None when they are quantized, else the reason why not, as a sentence.
        refused_by: whose reason that is: the backend's, a rule's that leaves the nodes out, or that no rule selects
            them.
    """

    pattern: str
    nodes: tuple[Node, ...]
    refusal: str | None = None
    refused_by: Literal["backend", "rule", "no rule"] = "backend"


@dataclass
class Plan:
    """``specs`` by site, in the order of the graph, and the decisions behind them."""

    specs: dict[Site, QuantizationSpecBase] = field(default_factory=dict)
    decisions: dict[Node, Decision] = field(default_factory=dict)
    unshared: set[Node] = field(default_factory=set)
    """Nodes whose inputs must not share an observer implicitly."""

    def quantized_nodes(self) -> set[Node]:
        """Returns the nodes that have a quantized input or output."""
        return {site.node for site in self.specs}

    def merge(self, other: Plan) -> Plan:
        """Returns both plans as one.

        Raises:
            AnnotationError: they give one site different specs; the message names both.
        """
        for site, spec in other.specs.items():
            if site in self.specs and self.specs[site] != spec:
                what = f"two specs: {describe_spec(self.specs[site])} and {describe_spec(spec)}"
                raise AnnotationError(what, where=str(site), remedy="Let one quantizer annotate the node.")
        return Plan(
            {**self.specs, **other.specs}, {**self.decisions, **other.decisions}, self.unshared | other.unshared
        )

    def to_json(self) -> str:
        """Returns the plan as JSON: a list of ``{site, spec}`` and a list of decisions."""
        sites = [{"site": str(site), "spec": describe_spec(spec)} for site, spec in self.specs.items()]
        decisions = [
            {"pattern": d.pattern, "nodes": [n.name for n in d.nodes], "refusal": d.refusal}
            for d in dict.fromkeys(self.decisions.values())
        ]
        return json.dumps({"sites": sites, "decisions": decisions}, indent=2)

    def __str__(self) -> str:
        lines = [f"{site}: {describe_spec(spec)}" for site, spec in self.specs.items()]
        refused = (d for d in dict.fromkeys(self.decisions.values()) if d.refusal)
        return "\n".join([*lines, *(f"{describe(d.nodes[0])}: float: {d.refusal}" for d in refused)])


def describe_spec(spec: QuantizationSpecBase) -> str:
    """Returns a spec in a few words: type, range, scheme, observer."""
    match spec:
        case SharedQuantizationSpec(edge_or_node=place):
            return f"as {describe_place(place)}"
        case DerivedQuantizationSpec():
            return f"{_type(spec)} derived from {', '.join(describe_place(p) for p in spec.derived_from)}"
        case FixedQParamsQuantizationSpec():
            return f"{_type(spec)} fixed, scale {spec.scale:g}, zero_point {spec.zero_point}"
        case QuantizationSpec():
            scheme = str(spec.qscheme).removeprefix("torch.") if spec.qscheme is not None else "any scheme"
            axis = f" axis {spec.ch_axis}" if spec.ch_axis is not None and "channel" in scheme else ""
            when = " at run time" if spec.is_dynamic else ""
            return f"{_type(spec)} {scheme}{axis}{when} by {_constructor_name(spec.observer_or_fake_quant_ctr)}"
        case _:
            return type(spec).__name__


def describe_place(place: tuple[Node, Node] | Node) -> str:
    """Returns an edge as ``producer -> consumer``, a node by its name."""
    return " -> ".join(n.name for n in place) if isinstance(place, (tuple, list)) else place.name


def _type(spec: Any) -> str:
    name = str(spec.dtype).removeprefix("torch.")
    if spec.quant_min is None and spec.quant_max is None:
        return name
    return f"{name} [{spec.quant_min}, {spec.quant_max}]"


def _constructor_name(constructor: Any) -> str:
    key = constructor_key(constructor)
    while isinstance(key, tuple):
        key = key[0]
    return getattr(key, "__name__", type(key).__name__)


def decisions_of(nodes: Iterable[Node]) -> dict[Node, Decision]:
    """Returns the decisions that quantizers left in the metadata of the nodes."""
    return {node: node.meta[DECISION_KEY] for node in nodes if DECISION_KEY in node.meta}
