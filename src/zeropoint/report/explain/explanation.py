"""What ``explain`` returns: every compute node of a model, what it reads and returns, and which scales are shared."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from zeropoint.annotate.rules import matches
from zeropoint.core.errors import RuleError, StaysFloatError, UnknownNameError
from zeropoint.core.plain import plain
from zeropoint.report.explain import explain_text

SHOWN = 20
"""Nodes that an error names."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a node reads or returns.

    Args:
        site: the place, e.g. ``conv2d.weight``, ``cat.tensors[1]``; for what a node returns, its name.
        tensor: the node that makes it, or the path of the parameter.
        dtype: of the float model, e.g. ``float32``.
        spec: how it is quantized, in words; empty: it stays as it is.
        group: number of the group of tensors that share its scale; None where it has none.
    """

    site: str
    tensor: str
    dtype: str
    spec: str = ""
    group: int | None = None

    def __str__(self) -> str:
        shared = f", group {self.group}" if self.group is not None else ""
        return f"{self.site} = {self.tensor}: {self.spec or self.dtype}{shared}"


@dataclass(frozen=True, slots=True)
class ExplainedNode:
    """One compute node.

    Args:
        name: in the graph that is quantized.
        operator: e.g. ``conv2d``.
        modules: paths of the modules around it, the innermost first.
        source: ``file:line`` of the user's program.
        pattern: the row of the backend's table that it belongs to; empty where there is none.
        reason: why it stays float; empty when it is quantized.
        inputs: the tensors that it reads, constants too.
        output: what it returns.
        computed_with: the other nodes of its pattern.
        exported_as: the node of the exported program that it comes from, where that has another name.
    """

    name: str
    operator: str
    modules: tuple[str, ...]
    source: str
    pattern: str
    reason: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    computed_with: tuple[str, ...] = ()
    exported_as: str = ""

    @property
    def module(self) -> str:
        """Path of the innermost module around it; empty for the model itself."""
        return self.modules[0] if self.modules else ""

    @property
    def is_quantized(self) -> bool:
        """True when the node's inputs or output are quantized."""
        return not self.reason

    @property
    def computes_floats(self) -> bool:
        """True when it returns floats, which could be quantized; integers and bools cannot."""
        return "int" not in self.output.dtype and "bool" not in self.output.dtype

    def __str__(self) -> str:
        return "\n".join(explain_text.node_lines(self))


@dataclass(frozen=True, slots=True)
class GoneNode:
    """A node of the exported program that nothing computes by itself any more.

    Args:
        name, operator, modules, source: as of ``ExplainedNode``.
        became: the nodes that compute it; empty where it did nothing.
        how: in words.
    """

    name: str
    operator: str
    modules: tuple[str, ...]
    source: str
    became: tuple[str, ...]
    how: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.modules[0] if self.modules else "", self.source) if part)
        return f"{self.name} ({self.operator}){f' [{place}]' if place else ''}: {self.how}"


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of a group.

    Args:
        tensor: the node that makes it, or the path of the parameter.
        sites: where it is quantized.
        low, high: smallest and largest value in the data; None where it was not looked at.
    """

    tensor: str
    sites: tuple[str, ...]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Tensors that share one scale and zero point.

    Args:
        number: as ``Tensor.group`` has it.
        spec: how they are quantized, in words.
        members: in the order of the graph.
        low, high: the range that the observer has, of all its channels; None: not calibrated, or it keeps none.
    """

    number: int
    spec: str
    members: tuple[Member, ...]
    low: float | None = None
    high: float | None = None

    @property
    def is_shared(self) -> bool:
        """True when it has more than one tensor."""
        return len(self.members) > 1

    def widened_by(self) -> tuple[str, ...]:
        """Returns the tensors with the smallest and the largest value, where ``explain`` had data."""
        seen = [member for member in self.members if member.low is not None and member.high is not None]
        if not seen:
            return ()
        lowest = min(seen, key=lambda member: member.low or 0.0)
        highest = max(seen, key=lambda member: member.high or 0.0)
        return tuple(dict.fromkeys((lowest.tensor, highest.tensor)))

    def __str__(self) -> str:
        return "\n".join(explain_text.group_lines(self))


@dataclass(frozen=True, slots=True)
class MatchedRule:
    """A rule of the user.

    Args:
        rule: the call that set it, e.g. ``set_module_name('head', None)``.
        matched: how many nodes it selects.
        decided: of how many of these no other rule decides.
    """

    rule: str
    matched: int
    decided: int

    def __str__(self) -> str:
        others = f", of which others decide {self.matched - self.decided}" if self.decided < self.matched else ""
        return f"{self.rule} matched {self.matched} operators{others}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every compute node of a model, quantized or not and why. Printing it gives it grouped, with totals.

    ``explanation["conv2d"]`` is one node, ``explanation["encoder.layers.0"]`` all of a module.

    Args:
        nodes: those that are computed, in the order of the graph, the bodies of control flow first.
        gone: nodes of the exported program that others compute, or that do nothing.
        groups: tensors that share a scale, each quantized tensor in one of them.
        rules: the user's, and what they match.
    """

    nodes: tuple[ExplainedNode, ...]
    gone: tuple[GoneNode, ...] = ()
    groups: tuple[ScaleGroup, ...] = ()
    rules: tuple[MatchedRule, ...] = ()

    def __iter__(self) -> Iterator[ExplainedNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def quantized(self) -> tuple[ExplainedNode, ...]:
        """The nodes that are quantized."""
        return tuple(node for node in self.nodes if node.is_quantized)

    @property
    def stays_float(self) -> tuple[ExplainedNode, ...]:
        """The nodes that are not quantized."""
        return tuple(node for node in self.nodes if not node.is_quantized)

    def group(self, number: int) -> ScaleGroup:
        """Returns the group of a number, as ``Tensor.group`` has it.

        Raises:
            UnknownNameError: none of its tensors is quantized in this group.
        """
        found = next((group for group in self.groups if group.number == number), None)
        if found is None:
            remedy = f"Groups here: {', '.join(str(group.number) for group in self.groups) or 'none'}."
            raise UnknownNameError(f"there is no group {number}", where="explanation", remedy=remedy)
        return found

    def __getitem__(self, name: str) -> ExplainedNode | GoneNode | Explanation:
        """Returns one node, by its name here or in the exported program; or the part in a module, by path or glob.

        Raises:
            UnknownNameError: nothing has that name.
        """
        found = [node for node in self.nodes if node.name == name]
        gone = [node for node in self.gone if node.name == name]
        made = [node for node in self.nodes if node.exported_as == name]
        for several in (found, gone, made):
            if len(several) == 1:
                return several[0]
        if found or made:
            return self._of(found or made, gone)
        in_module = [node for node in self.nodes if _is_in(node, name)]
        gone = [node for node in self.gone if _is_in(node, name)]
        if in_module or gone:
            return self._of(in_module, gone)
        known = {*(n.name for n in (*self.nodes, *self.gone)), *self._modules()}
        close = difflib.get_close_matches(name, known, 5)
        remedy = f"Did you mean {', '.join(close)}?" if close else "Print the explanation: it lists them."
        raise UnknownNameError(f"no node and no module is called {name!r}", where="explanation", remedy=remedy)

    def _of(self, nodes: Iterable[ExplainedNode], gone: Iterable[GoneNode]) -> Explanation:
        nodes = tuple(nodes)
        numbers = {tensor.group for node in nodes for tensor in (*node.inputs, node.output)}
        groups = tuple(group for group in self.groups if group.number in numbers)
        return Explanation(nodes, tuple(gone), groups)

    def _modules(self) -> set[str]:
        return {path for node in (*self.nodes, *self.gone) for path in node.modules if path}

    def require_quantized(self, modules: Sequence[str]) -> None:
        """Raises when an operator stays float in a module of these paths, in which ``*`` and ``?`` match as in files.

        Operators that return integers or bools, such as those that compute positions, do not count.

        Raises:
            RuleError: a path matches no module with operators.
            StaysFloatError: names the operators, and the reason of each.
        """
        if isinstance(modules, str):
            modules = (modules,)
        found: list[ExplainedNode] = []
        for pattern in modules:
            if not any(_is_in(node, pattern) for node in (*self.nodes, *self.gone)):
                some = sorted(self._modules())
                remedy = f"The model's modules: {', '.join(some[:12])}{', ...' if len(some) > 12 else ''}."
                raise RuleError("it matches no module of the model", where=f"strict={pattern!r}", remedy=remedy)
            found += [n for n in self.nodes if not n.is_quantized and n.computes_floats and _is_in(n, pattern)]
        if not found:
            return
        names = list(dict.fromkeys(f"{explain_text.headline(node)}: {node.reason}" for node in found))
        more = [f"... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        what = f"{len(names)} operators stay float:\n  " + "\n  ".join(names[:SHOWN] + more)
        raise StaysFloatError(what, where=f"strict={list(modules)}")

    def to_json(self) -> str:
        """Returns all of it as JSON: ``nodes``, ``gone``, ``groups``, ``rules`` with the names of their fields."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def as_dict(self) -> dict[str, object]:
        """Returns all of it as dictionaries and lists; a range without an end, as that of masked scores, as None."""
        return {**plain(dataclasses.asdict(self)), "quantized": len(self.quantized), "float": len(self.stays_float)}

    def __str__(self) -> str:
        return "\n".join(explain_text.lines(self))


def _is_in(node: ExplainedNode | GoneNode, pattern: str) -> bool:
    return any(matches(path, pattern) for path in node.modules)
