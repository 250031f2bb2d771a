"""Integers computed from floats: where those of a file differ, do values a step away explain it?"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from zeropoint.core.dtypes import is_float
from zeropoint.graph.attributes import get_attribute, set_parameter
from zeropoint.graph.bind import argument
from zeropoint.graph.constants import mutated_attributes
from zeropoint.graph.layers import VIEWS
from zeropoint.graph.no_ops import ALIASES, CONVERSIONS, COPIES
from zeropoint.numerics import ops
from zeropoint.runtime.agreement import FLOOR_DB, STEP

aten = torch.ops.aten
Values = Mapping[Node, torch.Tensor]

POSITIONS = (
    aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable, aten.max.dim, aten.min.dim,
    aten.median.dim, aten.kthvalue.default, aten.topk.default, aten.sort.default, aten.sort.stable,
)  # fmt: skip
"""Operators that return positions along ``dim`` by the values there; without ``dim``, in the flattened tensor."""
AS_THEY_ARE = (*VIEWS, *ALIASES, *COPIES, *CONVERSIONS, aten._to_copy.default)
"""Operators that return the integers that they read, in the same order."""
SHARE = 10 ** (-FLOOR_DB / 20)
"""By how much of itself a value may be off in an output that is just right."""


def float_sources(node: Node) -> list[Node]:
    """Returns the float tensors that integers are computed from, inputs and constants left out."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        current = waiting.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if is_float(current.meta.get("val")):
            found[current] = None
        else:
            waiting.extend(current.all_input_nodes)
    return list(found)


def explained(model: GraphModule, node: Node, inputs: tuple[Any, ...], integers: torch.Tensor, values: Values) -> bool:
    """True where each integer follows from the model's floats, from a file's, or from some a step away from a file's.

    The position of a largest, smallest or sorted value may be that of another value within one step; other integers
    may be any between those that values one step lower and one step higher give.

    Args:
        model: the converted model.
        node: what returns the integers in it.
        inputs: those of the model.
        integers: what the file returned.
        values: what a file returned for each of ``float_sources(node)``.
    """
    (*own, expected), (given,) = _computed(model, inputs, {}, [*values, node]), _computed(model, inputs, values, [node])
    if not integers.shape == given.shape == expected.shape:
        return False
    steps = {s: _step(s, mine, value) for mine, (s, value) in zip(own, values.items(), strict=True)}
    same = (integers == given) | (integers == expected)
    found = _first(node, values)
    operation = found.args[0] if found.target is operator.getitem else found
    if isinstance(operation, Node) and operation.target in POSITIONS and (s := argument(operation, "self")) in values:
        (positions,) = _computed(model, inputs, values, [found])
        near = _near(values[s], steps[s], positions, integers.reshape(positions.shape), argument(operation, "dim"))
        return bool((same | near.reshape(same.shape)).all())
    others = [_computed(model, inputs, nudged, [node])[0] for nudged in _nudged(values, steps)]
    candidates = [given, expected, *(other for other in others if other.shape == given.shape)]
    low, high = functools.reduce(torch.minimum, candidates), functools.reduce(torch.maximum, candidates)
    return bool((same | (low <= integers) & (integers <= high)).all())


def _step(source: Node, expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Returns how far each value of a source may be off: by a step where it is dequantized.

    Else by what the file's value differs from the model's, and at least by what an output that is just right leaves of
    a value of middle size.
    """
    scale = source.args[1] if source.target is ops.DEQUANTIZE_PER_TENSOR else None
    if isinstance(scale, float):
        return torch.full_like(actual, STEP * scale)
    sizes = actual[actual.isfinite()].abs()
    least = SHARE * float(sizes.median()) if sizes.numel() else 0.0
    return torch.nan_to_num((expected - actual).abs(), 0.0, 0.0).clamp(min=least)


def _first(node: Node, values: Values) -> Node:
    """Returns the node that made the integers which a node returns as they are."""
    while node.target in AS_THEY_ARE and isinstance(source := node.args[0], Node) and source not in values:
        node = source
    return node


def _near(
    value: torch.Tensor, step: torch.Tensor, right: torch.Tensor, positions: torch.Tensor, dim: int | None
) -> torch.Tensor:
    """Returns where the value at a position is within one step of that at the right one."""
    if dim is None or value.dim() == 0:
        value, step, right, positions, dim = value.flatten(), step.flatten(), right.flatten(), positions.flatten(), 0
    elif right.dim() < value.dim():
        right, positions = right.unsqueeze(dim), positions.unsqueeze(dim)
    exists = (positions >= 0) & (positions < value.shape[dim])
    positions = positions.long().clamp(0, value.shape[dim] - 1)
    one, other = value.gather(dim, positions), value.gather(dim, right)
    reach = torch.maximum(step.gather(dim, positions), step.gather(dim, right))
    return exists & ((one == other) | ((one - other).abs() <= reach))


def _nudged(values: Values, steps: Values) -> Iterator[Values]:
    """Yields the values one step higher and lower: all of them, and each against the others."""
    lower = {source: value - steps[source] for source, value in values.items()}
    higher = {source: value + steps[source] for source, value in values.items()}
    yield lower
    yield higher
    for source in values if len(values) > 1 else ():
        yield {**lower, source: higher[source]}
        yield {**higher, source: lower[source]}


class _Given(Interpreter):
    """Runs a graph with the values of some nodes given, and keeps those of others."""

    def __init__(self, model: GraphModule, given: Values, wanted: Sequence[Node]) -> None:
        super().__init__(model)
        self._given, self._wanted = given, set(wanted)
        self.kept: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = self._given[n] if n in self._given else super().run_node(n)
        if n in self._wanted:
            self.kept[n] = result
        return result


@torch.no_grad()
def _computed(model: GraphModule, inputs: tuple[Any, ...], given: Values, wanted: Sequence[Node]) -> list[torch.Tensor]:
    """Returns what nodes of the model give where the values of some others are given; its buffers stay as they are."""
    buffers = {path: get_attribute(model, path).detach().clone() for path in mutated_attributes(model.graph)}
    runs = _Given(model, given, wanted)
    runs.run(*pytree.tree_leaves(inputs), enable_io_processing=False)
    for path, before in buffers.items():
        set_parameter(model, path, before)
    return [torch.as_tensor(runs.kept[node]) for node in wanted]
