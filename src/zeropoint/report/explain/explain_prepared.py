"""An explanation of a prepared model, read off its observers."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.graph.bind import Site, reads
from zeropoint.graph.graph_pass import graphs_of
from zeropoint.graph.observers import observer_of
from zeropoint.graph.source import module_path, operator_name, source_line
from zeropoint.passes.affine_blocks import observer_in
from zeropoint.report.coverage import NOT_ANNOTATED, CoverageRow, compute_nodes
from zeropoint.report.explain.explain_plan import Graph, explained_node
from zeropoint.report.explain.explanation import ExplainedNode, Member, ScaleGroup, Tensor
from zeropoint.report.explain.member_ranges import Ranges
from zeropoint.report.record import record_of


class PreparedSites:
    """Where a prepared model has observers: each place by the observer that it has, shared ones the same.

    Args:
        model: what ``prepare_pt2e`` returned, ours or torchao's.
    """

    def __init__(self, model: GraphModule) -> None:
        self.graph = Graph(model)
        self.observers: list[Any] = []
        """One for each group."""
        self.numbers: dict[int, int] = {}
        self.called: dict[Node, int] = {}
        """The number of the group, by the node that calls its observer."""
        self.places: dict[int, dict[Node, list[str]]] = defaultdict(lambda: defaultdict(list))
        for each in graphs_of(model):
            self._find(each)

    def _find(self, model: GraphModule) -> None:
        for node in model.graph.nodes:
            observer = observer_of(model, node)
            if observer is None:
                continue
            observer = getattr(observer, "_answers", [observer])[0]
            if id(observer) not in self.numbers:
                self.numbers[id(observer)] = len(self.observers)
                self.observers.append(observer)
            self.called[node] = self.numbers[id(observer)]
        for node in model.graph.nodes:
            if node in self.called:
                source: Any = node.args[0]
                if source.op == "call_function" and source not in self.called and len(source.users) == 1:
                    self.places[self.called[node]][source].append(source.name)
            else:
                for site, read in reads(node):
                    if read in self.called:
                        self.places[self.called[read]][self.made(read)].append(str(site))

    def made(self, read: Node) -> Node:
        """Returns the node that makes what is read, past observers."""
        while read in self.called:
            read = read.args[0]  # type: ignore[assignment]
        return read

    def read(self, site: Site, read: Node) -> Tensor:
        """Returns what is read at a site."""
        source = self.made(read)
        return self._tensor(str(site), source, self.called.get(read))

    def output(self, node: Node) -> Tensor:
        """Returns what a node returns: quantized, where all its readers read it from one observer."""
        readers = list(node.users)
        of_all = self.called.get(readers[0]) if len(readers) == 1 else None
        return self._tensor(node.name, node, of_all)

    def _tensor(self, site: str, source: Node, number: int | None) -> Tensor:
        spec = "" if number is None else describe_observer(self.observers[number])
        return Tensor(site, self.graph.name(source), self.graph.dtype(source), spec, number)

    def shared_tensors(self) -> set[Node]:
        """Returns the nodes that make the tensors of groups that have several."""
        return {node for places in self.places.values() if len(places) > 1 for node in places}

    def groups(self, ranges: Ranges) -> tuple[ScaleGroup, ...]:
        """Returns the groups with their members, and the ranges that their observers have."""
        return tuple(self._group(number, ranges) for number in range(len(self.observers)))

    def _group(self, number: int, ranges: Ranges) -> ScaleGroup:
        observer, places = self.observers[number], self.places[number]
        members = tuple(
            Member(self.graph.name(node), tuple(sites), *ranges.get(node, (None, None)))
            for node, sites in places.items()
        )
        return ScaleGroup(number, describe_observer(observer), members, *_range_of(observer))


def explain_prepared(model: GraphModule, sites: PreparedSites) -> tuple[ExplainedNode, ...]:
    """Returns the compute nodes of a prepared model: those that its record knows, else those of its graph."""
    rows = {(row.node, row.operator, row.module): row for row in record_of(model).coverage}
    nodes: list[ExplainedNode] = []
    for node in compute_nodes(model):
        inputs = [sites.read(site, read) for site, read in reads(node)]
        output = sites.output(node)
        row = rows.get((node.name, operator_name(node), module_path(node)))
        if row is None:
            row = _row(node, is_quantized=is_valid_annotation(node.meta.get(Q_ANNOTATION_KEY)))
        others = [other.name for other in getattr(node.meta.get(DECISION_KEY), "nodes", ()) if other.name != node.name]
        inputs = [tensor for tensor in inputs if tensor.dtype]
        nodes.append(explained_node(node, row, inputs, output, tuple(others)))
    return tuple(nodes)


def _row(node: Node, *, is_quantized: bool) -> CoverageRow:
    reason = "" if is_quantized else NOT_ANNOTATED
    return CoverageRow(node.name, operator_name(node), module_path(node), source_line(node), "", reason)


def describe_observer(observer: Any) -> str:
    """Returns an observer or fake quantizer in a few words: type, range, scheme, its class."""
    inner = observer_in(observer)
    dtype = str(getattr(observer, "dtype", None) or getattr(inner, "dtype", "")).removeprefix("torch.")
    low, high = (getattr(observer, name, getattr(inner, name, None)) for name in ("quant_min", "quant_max"))
    limits = "" if low is None or high is None else f" [{low}, {high}]"
    scheme = getattr(observer, "qscheme", getattr(inner, "qscheme", None))
    scheme = "" if scheme is None else f" {str(scheme).removeprefix('torch.')}"
    axis = f" axis {inner.ch_axis}" if "channel" in scheme and hasattr(inner, "ch_axis") else ""
    when = " at run time" if getattr(inner, "is_dynamic", False) else ""
    return f"{dtype}{limits}{scheme}{axis}{when} by {type(inner).__name__}"


def _range_of(observer: Any) -> tuple[float | None, float | None]:
    """Returns the smallest and largest value that an observer keeps; None, None where it keeps none, or saw none."""
    inner = observer_in(observer)
    ends = [getattr(inner, name, None) for name in ("min_val", "max_val")]
    if not all(isinstance(end, torch.Tensor) and end.numel() for end in ends):
        return None, None
    low, high = float(ends[0].detach().min()), float(ends[1].detach().max())  # type: ignore[union-attr]
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
