"""An explanation of a graph that a quantizer annotated, before observers are inserted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.groups import Group
from zeropoint.annotate.plan import Plan, describe_spec
from zeropoint.annotate.rules import Origin, Rules, calls, erased, paths_of, targets_of
from zeropoint.core.specs import QuantizationSpecBase
from zeropoint.graph.attributes import owner_and_name
from zeropoint.graph.bind import Site, reads, source_of
from zeropoint.graph.compat import is_tensor_value
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import EXPORTED_KEY, module_stack, operator_name, source_line
from zeropoint.report.coverage import CoverageRow, compute_nodes
from zeropoint.report.explain.explanation import ExplainedNode, GoneNode, MatchedRule, Member, ScaleGroup, Tensor
from zeropoint.report.explain.member_ranges import Ranges

DID_NOTHING = "it changes no value, and is left out"
NOT_NEEDED = "it is part of other operators now, or nothing needs it"


def snapshot(model: GraphModule) -> tuple[GoneNode, ...]:
    """Returns the compute nodes of a graph as they are, and marks them, so that passes over it can be followed."""
    for node in calls(model):
        node.meta[EXPORTED_KEY] = node.name
    return tuple(
        GoneNode(node.name, operator_name(node), paths_of(module_stack(node)), source_line(node), (), "")
        for node in compute_nodes(model)
    )


def gone_nodes(before: Iterable[GoneNode], model: GraphModule) -> tuple[GoneNode, ...]:
    """Returns the nodes of a snapshot that nothing in the graph stands for, with what became of them."""
    present = {str(node.meta[EXPORTED_KEY]) for node in calls(model) if EXPORTED_KEY in node.meta}
    layers = {gone.name: layer for gone, layer in erased(model)}
    return tuple(_gone(node, layers) for node in before if node.name not in present)


def _gone(node: GoneNode, layers: dict[str, Origin | None]) -> GoneNode:
    layer = layers.get(node.name)
    became = () if layer is None else (layer.name,)
    how = DID_NOTHING if node.name in layers else NOT_NEEDED
    how = how if layer is None else f"it is folded into {layer.name}, which computes both"
    return GoneNode(node.name, node.operator, node.modules, node.source, became, how)


def matched_rules(model: GraphModule, quantizer: Any) -> tuple[MatchedRule, ...]:
    """Returns the rules of a quantizer, or of those that it is composed of, with how many operators each selects."""
    found: list[MatchedRule] = []
    for each in getattr(quantizer, "quantizers", None) or (quantizer,):
        rules = getattr(each, "rules", None)
        if isinstance(rules, Rules):
            found += _matched(model, rules)
    return tuple(found)


def _matched(model: GraphModule, rules: Rules) -> list[MatchedRule]:
    matched, decided = Counter[str](), Counter[str]()
    places = [(node.name, module_stack(node), targets_of(node)) for node in calls(model)]
    places += [(gone.name, gone.stack, gone.targets) for gone, _ in erased(model)]
    for place in places:
        selecting = [f"{rule}, {'None' if choice is None else '...'})" for rule, choice in rules.selecting(*place)]
        matched.update(set(selecting))
        decided.update(selecting[:1])
    return [MatchedRule(rule, count, decided[rule]) for rule, count in matched.items()]


class Graph:
    """Descriptions of the tensors of a graph and the bodies of its control flow."""

    def __init__(self, model: GraphModule) -> None:
        self._of: dict[Any, GraphModule] = {}
        self._add(model)

    def _add(self, model: GraphModule) -> None:
        self._of[model.graph] = model
        for _, body in bodies(model):
            self._add(body)

    def name(self, node: Node) -> str:
        """Returns the node's name, or the path of the parameter that it reads."""
        return str(node.target) if node.op == "get_attr" else node.name

    def dtype(self, node: Node) -> str:
        """Returns the type of what a node returns, of a list that of its first tensor; empty: no tensor."""
        value = node.meta.get("val")
        if node.op == "get_attr" and not is_tensor_value(value):
            value = self._attribute(node)
        if isinstance(value, (list, tuple)):
            value = next((item for item in value if isinstance(item, torch.Tensor)), None)
        return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""

    def _attribute(self, node: Node) -> Any:
        """Returns what an attribute is: a tensor, or a body of control flow."""
        owner, name = owner_and_name(self._of[node.graph], str(node.target))
        return getattr(owner, name, None)


class _Groups:
    """Numbers of groups, in the order of the plan."""

    def __init__(self, groups: dict[Site, Group]) -> None:
        self._of = groups
        self._numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
        self._texts: dict[int, str] = {}

    def text(self, spec: QuantizationSpecBase) -> str:
        """Returns a spec in words, made once."""
        if id(spec) not in self._texts:
            self._texts[id(spec)] = describe_spec(spec)
        return self._texts[id(spec)]

    def tensor(self, site: Site, name: str, dtype: str) -> Tensor:
        """Returns the tensor at a site."""
        group = self._of.get(site)
        if group is None:
            return Tensor(str(site), name, dtype)
        return Tensor(str(site), name, dtype, self.text(group.spec), self._numbers[group])

    def described(self, graph: Graph, ranges: Ranges) -> tuple[ScaleGroup, ...]:
        """Returns the groups with their members."""
        return tuple(
            ScaleGroup(number, self.text(group.spec), _members(group, graph, ranges))
            for group, number in self._numbers.items()
        )


def _members(group: Group, graph: Graph, ranges: Ranges) -> tuple[Member, ...]:
    sites: dict[str, list[str]] = defaultdict(list)
    makers: dict[str, Node] = {}
    for site in group.sites:
        node = site.node if site.is_output else source_of(site)
        sites[graph.name(node)].append(str(site))
        makers.setdefault(graph.name(node), node)
    return tuple(Member(name, tuple(at), *ranges.get(makers[name], (None, None))) for name, at in sites.items())


def shared_tensors(groups: dict[Site, Group]) -> set[Node]:
    """Returns the nodes that make the tensors of groups that have several."""
    found: set[Node] = set()
    for group in dict.fromkeys(groups.values()):
        nodes = {site.node if site.is_output else source_of(site) for site in group.sites}
        if len(nodes) > 1:
            found |= nodes
    return found


def explained(
    model: GraphModule, plan: Plan, groups: dict[Site, Group], rows: Iterable[CoverageRow], ranges: Ranges
) -> tuple[tuple[ExplainedNode, ...], tuple[ScaleGroup, ...]]:
    """Returns the compute nodes of an annotated graph, and the groups of tensors that share scales."""
    graph, numbered = Graph(model), _Groups(groups)
    nodes: list[ExplainedNode] = []
    for node, row in zip(compute_nodes(model), rows, strict=True):
        inputs = [numbered.tensor(site, graph.name(read), graph.dtype(read)) for site, read in reads(node)]
        output = numbered.tensor(Site(node), node.name, graph.dtype(node))
        decision = plan.decisions.get(node)
        others = () if decision is None else tuple(other.name for other in decision.nodes if other is not node)
        nodes.append(explained_node(node, row, [each for each in inputs if each.dtype], output, others))
    return tuple(nodes), numbered.described(graph, ranges)


def explained_node(
    node: Node, row: CoverageRow, inputs: Iterable[Tensor], output: Tensor, others: tuple[str, ...] = ()
) -> ExplainedNode:
    """Returns a compute node with its row of the coverage."""
    exported = str(node.meta.get(EXPORTED_KEY, node.name))
    return ExplainedNode(
        node.name, row.operator, paths_of(module_stack(node)), row.source, row.pattern, row.reason, tuple(inputs),
        output, others, "" if exported == node.name else exported,
    )  # fmt: skip
