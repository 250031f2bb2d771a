"""The error of each quantized operator, split by where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node, map_arg

from zeropoint.graph.compat import OpOverload
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, LINEAR, TRANSPOSED
from zeropoint.graph.schema import schema_of
from zeropoint.report.compared_sites import Seen, Site, Sums, decibels, difference, is_float, power
from zeropoint.report.lockstep import Lockstep

SHARE_OF_ROWS = 4
"""Layers are computed anew on one of so many samples of a batch."""


@dataclass(slots=True)
class ErrorSums:
    """Powers of an operator's output and of the three parts of its error, and of all of it."""

    signal: float = 0.0
    weight: float = 0.0
    activation: float = 0.0
    carried: float = 0.0
    total: Sums = field(default_factory=Sums)


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
        self._behind = {each: site for site in sites for each in site.dequantizes if site.kind == "activation"}
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

    @torch.no_grad()
    def see_node(
        self, node: Node, reference: Any, actual: Any, floats: dict[Node, Any], quantized: dict[Node, Any]
    ) -> None:
        """Adds the errors of a node when it reads integers and returns one tensor of real values."""
        if not (_is_pure(node) and is_float(reference) and any(self._is_quantized(n) for n in node.all_input_nodes)):
            return
        sums = self.sums.setdefault(node, ErrorSums())
        sums.total.add(reference, actual)
        part = _part_of(node, reference)
        expected = _rows(reference.detach(), part)
        sums.signal += power(expected)
        sums.weight += self._off(node, expected, part, floats, lambda n: self._constant(n, floats, quantized))
        sums.activation += self._off(node, expected, part, floats, self._own_rounding)
        sums.carried += self._off(node, expected, part, floats, lambda n: self._arriving(n, floats, quantized))

    def _is_quantized(self, node: Node) -> bool:
        return node in self._behind or node in self.run.known

    def _off(self, node: Node, expected: torch.Tensor, part: int, floats: dict[Node, Any], change: Any) -> float:
        """Returns the power of the error with other inputs; ``change`` gives those, None for one that is not."""
        changed = {n: change(n) for n in node.all_input_nodes}
        if all(value is None for value in changed.values()):
            return 0.0
        first = node.all_input_nodes[0]
        values = {n: floats[n] if value is None else value for n, value in changed.items()}
        values = {n: value.detach() if isinstance(value, torch.Tensor) else value for n, value in values.items()}
        values[first] = _rows(values[first], part)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        assert callable(node.target)
        return power(difference(node.target(*args, **kwargs), expected))

    def _constant(self, node: Node, floats: dict[Node, Any], quantized: dict[Node, Any]) -> Any:
        is_bias = node.op == "get_attr" and floats[node] is not quantized[node] and node in self.run.constants
        return quantized[node] if is_bias or node in self.run.known else None

    def _own_rounding(self, node: Node) -> Any:
        site = self._behind.get(node)
        return None if site is None else self._rounded[site]

    def _arriving(self, node: Node, floats: dict[Node, Any], quantized: dict[Node, Any]) -> Any:
        if node.op == "get_attr" or node in self.run.known or not is_float(floats[node]):
            return None
        site = self._behind.get(node)
        return quantized[node] if site is None else self._before[site]


def _is_pure(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload) and schema_of(node.target).is_pure


def _part_of(node: Node, reference: torch.Tensor) -> int:
    """Returns how many rows of a layer's batch are computed anew; 0: all."""
    if node.target not in LAYERS:
        return 0
    is_batched = node.target in LINEAR or reference.dim() == _weight_dimensions(node)
    return -(-reference.shape[0] // SHARE_OF_ROWS) if is_batched and reference.dim() > 1 else 0


def _weight_dimensions(node: Node) -> int:
    return node.all_input_nodes[1].meta["val"].dim() if node.target in (*CONVOLUTIONS, *TRANSPOSED) else 0


def _rows(value: Any, part: int) -> Any:
    return value[:part] if part else value


def parts_db(sums: ErrorSums) -> tuple[float, float, float]:
    """Returns the SQNR in dB of an output with each part of its error alone: weight, activation, carried."""
    return tuple(decibels(sums.signal, each) for each in (sums.weight, sums.activation, sums.carried))  # type: ignore[return-value]
