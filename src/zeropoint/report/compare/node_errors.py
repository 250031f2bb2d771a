"""The error of each quantized operator, split by where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node, map_arg

from zeropoint.core.dtypes import is_float
from zeropoint.graph.compat import OpOverload
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, LINEAR, TRANSPOSED
from zeropoint.graph.schema import schema_of
from zeropoint.report.compare.compared_sites import Seen, Site, Sums, decibels, power, some_of
from zeropoint.report.compare.lockstep import Lockstep

MOST_VALUES = 2**14
"""So many values of what an operator returns are compared in each batch."""
SHARE_OF_ROWS = 4
"""Layers and operators on single values are computed anew on one of so many samples of a batch."""


@dataclass(slots=True)
class ErrorSums:
    """Powers of an operator's output and of the three parts of its error, and of all of it."""

    signal: float = 0.0
    weight: float = 0.0
    activation: float = 0.0
    carried: float = 0.0
    total: Sums = field(default_factory=Sums)


@dataclass(frozen=True, eq=False, slots=True)
class OwnError:
    """What rounding one site does to what a node returns, all else in float.

    Args:
        site: what is rounded.
        error: of the first rows of the batch, or of all.
        factor: by how much more there is of it in the whole batch.
    """

    site: Site
    error: torch.Tensor
    factor: float


class NodeErrors:
    """Computes each quantized operator anew on mixed inputs, and sums up how far that is from its float output.

    With the float inputs ``x`` and constants ``w``, ``Q`` for quantize and dequantize, and the values ``x'`` that
    arrive in the quantized model before the operator's own inputs are rounded:

    * weight: ``f(x, Q(w)) - f(x, w)``
    * activation: ``f(Q(x), w) - f(x, w)``
    * carried from upstream: ``f(x', w) - f(x, w)``
    """

    def __init__(self, run: Lockstep, sites: list[Site]) -> None:
        self.run = run
        self.sums: dict[Node, ErrorSums] = {}
        self._behind = {each: site for site in sites for each in site.dequantizes}
        self._last_of = _last_readers(run, sites)
        self.own: dict[Node, list[OwnError]] = {}
        """By node, what each site that it reads does to what it returns, in the present batch."""
        self._rounded: dict[Site, torch.Tensor] = {}
        self._before: dict[Site, torch.Tensor] = {}

    def see_site(self, site: Site, seen: Seen) -> None:
        """Keeps what operators that read a site are computed on, until the batch ends."""
        assert seen.rounded is not None
        self._rounded[site], self._before[site] = seen.rounded, seen.before

    def forget(self) -> None:
        """Ends a batch."""
        self._rounded.clear()
        self._before.clear()
        self.own.clear()

    @torch.no_grad()
    def see_node(
        self, node: Node, reference: Any, actual: Any, floats: dict[Node, Any], quantized: dict[Node, Any]
    ) -> None:
        """Adds the errors of a node when it reads integers and returns one tensor of real values."""
        if is_float(reference) and is_computed_anew(node) and any(n in self._behind for n in node.all_input_nodes):
            self._add(node, reference, actual, floats, quantized)
        for site in self._last_of.get(node, ()):
            self._rounded.pop(site, None)
            self._before.pop(site, None)

    def _add(
        self, node: Node, reference: torch.Tensor, actual: Any, floats: dict[Node, Any], quantized: dict[Node, Any]
    ) -> None:
        sums = self.sums.setdefault(node, ErrorSums())
        (some, factor), (others, _) = some_of(reference, MOST_VALUES), some_of(actual, MOST_VALUES)
        sums.total.add(some, others, factor)
        part = _part_of(node, reference)
        expected = _rows(reference.detach(), part)
        sums.signal += power(expected)
        inputs = node.all_input_nodes
        weights = {n: quantized[n] for n in inputs if self._is_constant(n, floats, quantized)}
        rounded = {n: self._rounded[site] for n in inputs if (site := self._behind.get(n)) in self._rounded}
        arriving = {n: self._arriving(n, quantized) for n in inputs if n not in weights and is_float(floats[n])}
        own = [self._off(node, expected, part, floats, {n: value}) for n, value in rounded.items()]
        by_weights = self._off(node, expected, part, floats, weights)
        sums.weight += power(by_weights)
        together = own[0] if len(own) == 1 else self._off(node, expected, part, floats, rounded)
        sums.activation += power(together)
        sums.carried += power(self._off(node, expected, part, floats, arriving))
        share = reference.shape[0] / part if part else 1.0
        self.own[node] = [OwnError(self._behind[n], each, share) for n, each in zip(rounded, own, strict=True)]
        self.own[node] += [OwnError(self._behind[n], by_weights, share) for n in weights if n in self._behind]

    def _off(
        self, node: Node, expected: torch.Tensor, part: int, floats: dict[Node, Any], changed: dict[Node, Any]
    ) -> torch.Tensor:
        """Returns the error of what a node returns with other inputs."""
        if not changed:
            return torch.zeros(1)
        cut = _batched(node, floats) if part else ()
        values = {n: changed.get(n, floats[n]) for n in node.all_input_nodes}
        values = {n: _rows(value, part) if n in cut else value for n, value in values.items()}
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        assert callable(node.target)
        return node.target(*args, **kwargs).detach() - expected

    def _is_constant(self, node: Node, floats: dict[Node, Any], quantized: dict[Node, Any]) -> bool:
        is_other = node.op == "get_attr" and node in self.run.constants and floats[node] is not quantized[node]
        return node in self.run.known or is_other

    def _arriving(self, node: Node, quantized: dict[Node, Any]) -> Any:
        site = self._behind.get(node)
        return self._before[site] if site in self._before else quantized[node]


def _last_readers(run: Lockstep, sites: list[Site]) -> dict[Node, list[Site]]:
    """Returns the sites that no node reads after a node."""
    place = {node: index for index, node in enumerate(run.nodes)}
    found: dict[Node, list[Site]] = {}
    for site in sites:
        found.setdefault(max(site.readers, key=lambda each: place[each]), []).append(site)
    return found


def is_computed_anew(node: Node) -> bool:
    """True for an operator that can be computed on mixed inputs, and returns one tensor of real values."""
    return _is_pure(node) and is_float(node.meta.get("val"))


def _is_pure(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload) and schema_of(node.target).is_pure


def _part_of(node: Node, reference: torch.Tensor) -> int:
    """Returns how many rows of a batch are computed anew; 0: all."""
    if reference.dim() < 2:
        return 0
    is_batched = _is_pointwise(node)
    if node.target in LAYERS:
        is_batched = node.target in LINEAR or reference.dim() == _weight_dimensions(node)
    return -(-reference.shape[0] // SHARE_OF_ROWS) if is_batched else 0


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _batched(node: Node, floats: dict[Node, Any]) -> tuple[Node, ...]:
    """Returns what of the inputs of a node goes along its batch: of layers the first, otherwise what is as large."""
    inputs = node.all_input_nodes
    if node.target in LAYERS:
        return (inputs[0],)
    shapes = {n: value.shape for n in inputs if isinstance(value := floats[n], torch.Tensor)}
    most = torch.broadcast_shapes(*shapes.values())
    return tuple(n for n, shape in shapes.items() if len(shape) == len(most) and shape[0] == most[0])


def _weight_dimensions(node: Node) -> int:
    return node.all_input_nodes[1].meta["val"].dim() if node.target in (*CONVOLUTIONS, *TRANSPOSED) else 0


def _rows(value: Any, part: int) -> Any:
    return value[:part] if part else value


def parts_db(sums: ErrorSums) -> tuple[float, float, float]:
    """Returns the SQNR in dB of an output with each part of its error alone: weight, activation, carried."""
    return tuple(decibels(sums.signal, each) for each in (sums.weight, sums.activation, sums.carried))  # type: ignore[return-value]
