"""Groups: the sites that share one scale and zero point, found by union-find in near-linear time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch.fx import Graph, Node

from zeropoint.annotate.plan import Plan, describe_place
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import EdgeOrNode, QuantizationSpec, QuantizationSpecBase, SharedQuantizationSpec
from zeropoint.graph.bind import Site, reads
from zeropoint.graph.recurrent import STEP_KEY

Tensor: TypeAlias = Node | tuple[Graph, str]
"""What one scale may belong to: what a node returns; or what a recurrent layer makes at each step of time."""


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """The sites that share one observer, in the order of the plan, and the spec that it is made from."""

    spec: QuantizationSpecBase
    sites: tuple[Site, ...]


class _UnionFind:
    """Disjoint sets with union by size and path halving; no recursion."""

    def __init__(self, items: Iterable[Site]) -> None:
        self._parent = {item: item for item in items}
        self._size = dict.fromkeys(self._parent, 1)

    def find(self, item: Site) -> Site:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, one: Site, other: Site) -> None:
        one, other = self.find(one), self.find(other)
        if one == other:
            return
        if self._size[one] < self._size[other]:
            one, other = other, one
        self._parent[other] = one
        self._size[one] += self._size[other]


def resolve(plan: Plan) -> dict[Site, Group]:
    """Returns the group of each site of the plan.

    Sites share a group when a shared spec says so, when they are reads of one node by another, or implicitly: reads of
    one tensor whose specs are equal, and with the tensor itself where it has the same integers, whatever measures them,
    unless the readers forbid it. The order in which annotations were made does not matter.

    Raises:
        AnnotationError: a shared spec names a place that is not quantized, or shared specs form a circle.
    """
    sets = _UnionFind(plan.specs)
    for site, spec in plan.specs.items():
        if isinstance(spec, SharedQuantizationSpec):
            sets.union(site, shared_site(plan, site, spec.edge_or_node))
    _share_implicitly(plan, sets, _roots(plan, sets))
    members: dict[Site, list[Site]] = defaultdict(list)
    for site in plan.specs:
        members[sets.find(site)].append(site)
    roots = _roots(plan, sets)
    groups = [Group(roots[head], tuple(sites)) for head, sites in members.items()]
    return {site: group for group in groups for site in group.sites}


def shared_site(plan: Plan, site: Site, place: EdgeOrNode) -> Site:
    """Returns the site that an edge or node names in a shared or derived spec of ``site``.

    Raises:
        AnnotationError: that place is not quantized.
    """
    candidates: list[Site]
    if isinstance(place, Node):
        candidates = [Site(place)]
    else:
        producer, consumer = place
        candidates = [read for read, source in reads(consumer) if source is producer]
    for candidate in candidates:
        if candidate in plan.specs:
            return candidate
    what = f"its spec refers to {describe_place(place)}, which is not quantized"
    raise AnnotationError(what, where=str(site), remedy="Annotate that place, or give this one a spec of its own.")


def _roots(plan: Plan, sets: _UnionFind) -> dict[Site, QuantizationSpecBase]:
    """Returns the spec of each set: that of its first member, in plan order, which is not itself shared."""
    roots: dict[Site, QuantizationSpecBase] = {}
    for site, spec in plan.specs.items():
        if not isinstance(spec, SharedQuantizationSpec):
            roots.setdefault(sets.find(site), spec)
    for site in plan.specs:
        if sets.find(site) not in roots:
            circle = [str(s) for s in plan.specs if sets.find(s) == sets.find(site)]
            what = f"shared specs form a circle: {', '.join(circle[:8])}"
            raise AnnotationError(what, where=str(site), remedy="Give one of them a spec of its own.")
    return roots


def _share_implicitly(plan: Plan, sets: _UnionFind, roots: dict[Site, QuantizationSpecBase]) -> None:
    """Unites, tensor by tensor, the reads whose specs are equal, and the tensor itself where it has the same integers.

    Then the observer of the tensor counts, that of the reads does not: to measure again is to quantize twice. What a
    recurrent layer makes at each step of time counts as one tensor.
    """
    kind_of = _kinds(roots.values())
    roots_of = {site: roots[sets.find(site)] for site in plan.specs}
    kinds = {site: kind_of[id(root)] for site, root in roots_of.items()}
    alike: dict[tuple[Tensor, int], list[Site]] = defaultdict(list)
    made: dict[tuple[Tensor, int], list[Site]] = defaultdict(list)
    for node in dict.fromkeys(site.node for site in plan.specs):
        for site, source in reads(node):
            if site in kinds:
                alike[_tensor(source), kinds[site]].append(site)
        if STEP_KEY in node.meta and Site(node) in kinds:
            made[_tensor(node), kinds[Site(node)]].append(Site(node))
    for sites in made.values():
        _unite(sets, sites)
    for (tensor, kind), sites in alike.items():
        _unite_repeated_reads(sets, sites)
        if all(site.node in plan.unshared for site in sites):
            continue
        _unite(sets, sites)
        own = Site(tensor) if isinstance(tensor, Node) else next(iter(made.get((tensor, kind), ())), None)
        if own is None or own not in kinds:
            continue
        if kinds[own] == kind or _same_integers(roots_of[own], roots_of[sites[0]]):
            sets.union(own, sites[0])


def _same_integers(one: QuantizationSpecBase, other: QuantizationSpecBase) -> bool:
    """True when both specs are measured, and differ in their observers only."""
    if not isinstance(one, QuantizationSpec) or not isinstance(other, QuantizationSpec):
        return False
    return replace(other, observer_or_fake_quant_ctr=one.observer_or_fake_quant_ctr) == one


def _tensor(node: Node) -> Tensor:
    """Returns what is the same for the nodes that count as one tensor."""
    return (node.graph, node.meta[STEP_KEY]) if STEP_KEY in node.meta else node


def _unite(sets: _UnionFind, sites: list[Site]) -> None:
    for site in sites[1:]:
        sets.union(sites[0], site)


def _kinds(specs: Iterable[QuantizationSpecBase]) -> dict[int, int]:
    """Returns a number for each spec, by its id: the same for equal ones. Numbers are compared in no time."""
    numbers: dict[QuantizationSpecBase, int] = {}
    distinct = {id(spec): spec for spec in specs}
    return {key: numbers.setdefault(spec, len(numbers)) for key, spec in distinct.items()}


def _unite_repeated_reads(sets: _UnionFind, sites: list[Site]) -> None:
    """``add(x, x)`` reads one tensor twice: that is one edge."""
    first: dict[Node, Site] = {}
    for site in sites:
        sets.union(first.setdefault(site.node, site), site)
