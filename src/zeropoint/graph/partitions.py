"""Partitions of a graph by the module or function that its nodes come from, one after the other."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.utils.source_matcher_utils import SourcePartition, get_source_partitions
from torch.nn import functional as F

from zeropoint.core.errors import SpecError

__all__ = [
    "SourcePartition",
    "find_sequential_partitions",
    "get_equivalent_types",
    "get_source_partitions",
    "update_equivalent_types_dict",
]

_equivalent_types: list[set[Any]] = [
    {nn.Conv1d, F.conv1d},
    {nn.Conv2d, F.conv2d},
    {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d},
    {nn.ReLU, F.relu, F.relu_},
    {nn.BatchNorm2d, F.batch_norm},
    {nn.Hardtanh, F.hardtanh, F.hardtanh_},
    {torch.add, operator.add, operator.iadd, "add", "add_"},
    {torch.mul, operator.mul, operator.imul, "mul", "mul_"},
]
"""Modules and functions that compute the same. The table is one for the whole process, as programs expect it."""


def get_equivalent_types() -> list[set[Any]]:
    """Returns the table of modules and functions that ``find_sequential_partitions`` takes for one another."""
    return _equivalent_types


def update_equivalent_types_dict(customized_equivalent_types: list[set[Any]] | None = None) -> None:
    """Replaces the table of equivalent types, for all that follows in this process.

    To add to the table, give ``get_equivalent_types() + [{MyModule, my_function}]``; give back the former when done.

    Raises:
        SpecError: there is no new table.
    """
    global _equivalent_types
    if customized_equivalent_types is None:
        remedy = "Give a list of sets of types, e.g. get_equivalent_types() + [{MyModule, my_function}]."
        raise SpecError("customized_equivalent_types is None", where="update_equivalent_types_dict", remedy=remedy)
    _equivalent_types = customized_equivalent_types


def find_sequential_partitions(
    gm: GraphModule,
    partition_types: list[Any],
    include_functional_equivalent: bool = True,
    filter_fn: Callable[[Node], bool] | None = None,
) -> list[tuple[SourcePartition, ...]]:
    """Returns the partitions of these types of which each reads the one before it, in the order of the graph.

    Only such partitions are looked at: the time grows with the graph and what is found, not with all combinations.

    Args:
        partition_types: modules, functions or names of functions, e.g. ``[nn.Conv2d, nn.ReLU]``.
        include_functional_equivalent: find what the table of equivalent types has with a type, too.
        filter_fn: leave out partitions that have a node for which it is false.

    Raises:
        SpecError: two of the types are equivalent.
    """
    wanted = [_equivalents(kind) if include_functional_equivalent else [kind] for kind in partition_types]
    _check_distinct(wanted)
    if not wanted:
        return [()]
    found = [get_source_partitions(gm.graph, kinds, filter_fn) for kinds in wanted]
    levels = [[partition for each in kinds.values() for partition in each] for kinds in found]
    readers = _readers(levels)
    chains = [(place,) for place in range(len(levels[0])) if len(levels) == 1 or readers[0][place]]
    for level in readers:
        chains = [(*chain, place) for chain in chains for place in level[chain[-1]]]
    return [tuple(levels[i][place] for i, place in enumerate(chain)) for chain in chains]


def _equivalents(kind: Any) -> list[Any]:
    return [kind, *next((list(each) for each in reversed(_equivalent_types) if kind in each), [])]


def _check_distinct(wanted: list[list[Any]]) -> None:
    seen: dict[Any, Any] = {}
    for kinds in wanted:
        for kind in kinds:
            if seen.setdefault(kind, kinds) is not kinds:
                what = f"{kinds[0]} and {seen[kind][0]} are equivalent, and each type of a sequence must be another"
                remedy = "Look for a shorter sequence, or change the table: update_equivalent_types_dict."
                raise SpecError(what, where="find_sequential_partitions", remedy=remedy)


def _readers(levels: list[list[SourcePartition]]) -> list[list[list[int]]]:
    """Returns, for each partition but those of the last level, the places of those of the next level that read it.

    One that has no chain to the last level is left out.
    """
    found: list[list[list[int]]] = []
    is_complete = [True] * len(levels[-1])
    for level, following in reversed(list(pairwise(levels))):
        places = _places(following)
        read = [
            sorted({p for node in each.nodes for user in node.users for p in places.get(user, ()) if is_complete[p]})
            for each in level
        ]
        is_complete = [bool(each) for each in read]
        found.insert(0, read)
    return found


def _places(partitions: Sequence[SourcePartition]) -> dict[Node, list[int]]:
    """Returns the places of the partitions that a node is part of."""
    places: dict[Node, list[int]] = defaultdict(list)
    for place, partition in enumerate(partitions):
        for node in partition.nodes:
            places[node].append(place)
    return places
