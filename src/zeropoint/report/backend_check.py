"""What a backend makes of a converted graph: integer operators, islands in float, conversions at the boundary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.backends.xnnpack.fold import folded
from zeropoint.backends.xnnpack.lower import repaired
from zeropoint.backends.xnnpack.sound import RULES, VALUE_RULES, unsound
from zeropoint.core.errors import LoweringError
from zeropoint.graph.bind import argument, reads
from zeropoint.graph.source import describe, operator_name
from zeropoint.numerics import ops
from zeropoint.report.speed.borders import FloatGroup, float_groups

SHOWN = 20
"""Lines of each kind in the text; the data has all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An operator that is not computed as the graph says.

    Args:
        node, operator: its name in the graph that is lowered, and e.g. ``conv2d``.
        place: the node with its module and source line.
        what: what is wrong, or why the backend computes it in float.
        remedy: what to do; empty where nothing is known.
    """

    node: str
    operator: str
    place: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.what}{f'. {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """An input or output of the model.

    Args:
        name: of the input; outputs are counted.
        dtype: as the caller sees it, e.g. ``float32``.
        conversion: what is done with it at once; empty: nothing.
    """

    name: str
    dtype: str
    conversion: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{f', {self.conversion}' if self.conversion else ''}"


@dataclass(frozen=True, slots=True)
class BackendCheck:
    """What a backend makes of a quantized model. Printing it gives it in words.

    Args:
        backend: its name.
        refused: operators that it would compute wrongly, or that keep the file from loading; ``lower`` raises for them.
        unfolded: operators that the graph quantizes, and that it computes in float: their q/dq pairs cost time.
        integer: how many operators it computes in integers.
        islands: groups of float operators between integer ones.
        ends: groups of float operators with integer ones on one side only: before the first, or after the last.
        inputs, outputs: of the model.
        conversions: quantize operators at run time.
        ranges_are_known: the model is calibrated; else what depends on ranges is not checked.
    """

    backend: str
    refused: tuple[Finding, ...]
    unfolded: tuple[Finding, ...]
    integer: int
    islands: tuple[FloatGroup, ...]
    ends: tuple[FloatGroup, ...]
    inputs: tuple[Boundary, ...]
    outputs: tuple[Boundary, ...]
    conversions: int
    ranges_are_known: bool

    @property
    def is_as_meant(self) -> bool:
        """True when all that the graph quantizes is computed in integers, and rightly."""
        return not self.refused and not self.unfolded

    def require(self) -> None:
        """Raises unless the backend computes the graph as it is meant.

        Raises:
            LoweringError: names each operator, and the reason.
        """
        if not self.is_as_meant:
            lines = [str(finding) for finding in (*self.refused, *self.unfolded)]
            shown = "\n  ".join(_some(lines))
            raise LoweringError(f"{len(lines)} operators are not computed as meant:\n  {shown}", where=self.backend)

    def as_dict(self) -> dict[str, Any]:
        """Returns it as dictionaries and lists."""
        return {**dataclasses.asdict(self), "is_as_meant": self.is_as_meant}

    def __str__(self) -> str:
        floats = sum(len(group.nodes) for group in (*self.islands, *self.ends))
        unknown = [] if self.ranges_are_known else ["note      not calibrated: what depends on ranges is not checked"]
        counts = f"{self.integer} operators in integers, {floats} in float next to them"
        return "\n".join(
            [
                f"{self.backend}   {counts}; {self.conversions} quantize operators at run time",
                *(f"refused   {line}" for line in _some(map(str, self.refused))),
                *(f"unfolded  {line}" for line in _some(_alike(self.unfolded, lambda f: (f.operator, f.what)))),
                *(f"island    {line}" for line in _some(_alike(self.islands, _kind_of_group))),
                *(f"end       {line}" for line in _some(_alike(self.ends, _kind_of_group))),
                *(f"input     {each}" for each in self.inputs),
                *(f"output    {each}" for each in self.outputs),
                *unknown,
            ]
        )


def _alike(items: Iterable[Any], key: Callable[[Any], Any]) -> list[str]:
    """Returns a line for each kind of items, that of its first, with how many more there are."""
    kinds: dict[Any, list[Any]] = {}
    for item in items:
        kinds.setdefault(key(item), []).append(item)
    return [f"{alike[0]}{f' (and {len(alike) - 1} like it)' if len(alike) > 1 else ''}" for alike in kinds.values()]


def _kind_of_group(group: FloatGroup) -> tuple[tuple[str, ...], int]:
    return group.operators, group.dequantized


def _some(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more"]


def examine(converted: GraphModule, *, ranges_are_known: bool) -> BackendCheck:
    """Returns what the XNNPACK delegate makes of a converted model.

    Raises:
        LoweringError: the model was annotated for another backend, or is in the reference representation.
    """
    model = repaired(converted)
    rules = tuple(rule for rule in RULES if ranges_are_known or rule not in VALUE_RULES)
    refused = [_finding(each.node, each.what, each.remedy) for each in unsound(model, rules)]
    integer, refusals = folded(model)
    groups = list(float_groups(model, integer))
    wrong = {finding.node for finding in refused}
    unfolded = [_finding(node, reason) for node, reason in refusals.items() if node.name not in wrong]
    return BackendCheck(
        "xnnpack",
        tuple(refused),
        tuple(unfolded),
        len(integer),
        tuple(group for group in groups if group.is_island),
        tuple(group for group in groups if not group.is_island),
        tuple(_input(node) for node in model.graph.nodes if node.op == "placeholder"),
        tuple(_output(number, node) for number, node in enumerate(_returned(model))),
        sum(node.target in ops.QUANTIZE_OPS for node in model.graph.nodes),
        ranges_are_known,
    )


def _finding(node: Node, what: str, remedy: str = "") -> Finding:
    return Finding(node.name, operator_name(node), describe(node), what.rstrip("."), remedy)


def _input(node: Node) -> Boundary:
    converted = [reader for reader in node.users if reader.target in ops.QUANTIZE_OPS]
    what = f"quantized to {_integers(converted[0])}" if converted and len(converted) == len(node.users) else ""
    return Boundary(str(node.target), _dtype(node), what)


def _returned(model: GraphModule) -> list[Node]:
    return [source for node in model.graph.nodes if node.op == "output" for _, source in reads(node)]


def _output(number: int, node: Node) -> Boundary:
    is_last = node.target in ops.DEQUANTIZE_OPS
    return Boundary(f"output {number}", _dtype(node), f"dequantized from {_integers(node)}" if is_last else "")


def _integers(conversion: Node) -> str:
    dtype = argument(conversion, "dtype")
    return str(dtype).removeprefix("torch.")


def _dtype(node: Node) -> str:
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
