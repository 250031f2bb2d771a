"""The rows of a backend's table: what may be quantized, what it reads, what may be fused after it, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import SpecError
from zeropoint.graph.bind import argument, bind
from zeropoint.graph.memory import Memory
from zeropoint.numerics.granularity import Granularity, PerTensor

T = TypeVar("T")
Operators: TypeAlias = tuple[Any, ...]
"""Operator overloads that mean the same, in-place forms included."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor that gets the configuration's activation spec."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant that gets the configuration's weight spec, per-channel along ``axis``."""

    axis: int = 0


@dataclass(frozen=True, slots=True)
class Bias:
    """A constant that gets the configuration's bias spec; none: it stays float.

    Args:
        integer: where the configuration has none, int32 in steps of ``s_x * s_w``, the scales of activation and weight.
    """

    integer: bool = False


@dataclass(frozen=True, slots=True)
class Follow:
    """A tensor that has the scale of its producer: the row applies where the producer is quantized."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that has the scale of the first input."""


ACT, BIAS, BIAS_INT32, FOLLOW, SHARED = Activation(), Bias(), Bias(integer=True), Follow(), Shared()
ONE_SCALE = PerTensor()
Role: TypeAlias = Activation | Weight | Bias | Follow | Shared


@dataclass(frozen=True, slots=True)
class Context:
    """What a match may ask of its surroundings.

    Args:
        model: the graph module.
        constants: nodes whose value no input can change.
        quantized: nodes whose output has a spec so far; filled along the walk.
        memory: which nodes write to memory that others read.
    """

    model: GraphModule
    constants: set[Node]
    quantized: set[Node]
    memory: Memory
    _found: dict[Any, Any] = field(default_factory=dict)

    def once(self, find: Callable[[GraphModule], T]) -> T:
        """Returns what a function finds in the graph; it looks only once."""
        if find not in self._found:
            self._found[find] = find(self.model)
        return self._found[find]


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that a match reads: by which node, from which, in which role."""

    reader: Node
    source: Node
    role: Role


@dataclass(frozen=True, slots=True)
class Match:
    """A row found in the graph: its head node, what is fused before it, and the nodes fused after it."""

    pattern: Pattern
    head: Node
    before: Node | None
    fused: tuple[Node, ...]
    config: QuantizationConfig
    context: Context

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes of the match, the head first."""
        return (self.head, *((self.before,) if self.before is not None else ()), *self.fused)

    @property
    def last(self) -> Node:
        """The node whose output is the output of the row."""
        return self.fused[-1] if self.fused else self.head

    def argument(self, name: str) -> Any:
        """Returns the head's argument by its schema name, its default included."""
        return argument(self.head, name)

    def inputs(self) -> list[Input]:
        """Returns what is read at the row's arguments, in order; what is fused before the head reads in its place."""
        bound = bind(self.head)
        found: list[Input] = []
        for name, role in self.pattern.inputs.items():
            value = bound.get(name)
            items = value if isinstance(value, (list, tuple)) else [value]
            found.extend(Input(self.head, item, role) for item in items if isinstance(item, Node))
        if self.before is not None:
            source = self.before.all_input_nodes[0]
            found = [Input(self.before, source, i.role) if i.source is self.before else i for i in found]
        return found

    def is_constant(self, node: Node) -> bool:
        """True when no input can change the node's value."""
        return node in self.context.constants


Condition: TypeAlias = Callable[[Match], str | None]
"""Returns None when it holds, else the reason for refusing: a sentence with the value at fault."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One row: an operator that the backend computes in integers.

    Args:
        name: what reports call it.
        chain: the head operators, then those that may be fused after it, each step optional.
        inputs: role of each quantized argument, by its schema name.
        output: role of what the last node of the chain returns.
        when: conditions on a match.
        before: operators that may be fused before the head, on its first input, when they have no other reader.
        before_when: conditions on such an operator; where one fails, it is not fused.
        dynamic: the backend also computes it with activations quantized at run time, under these conditions too.
        dynamic_granularity: for what it then chooses a scale, whatever the configuration says.
    """

    name: str
    chain: tuple[Operators, ...]
    inputs: Mapping[str, Role]
    output: Role = ACT
    when: tuple[Condition, ...] = ()
    before: Operators = ()
    before_when: tuple[Callable[[Node], bool], ...] = ()
    dynamic: tuple[Condition, ...] | None = None
    dynamic_granularity: Granularity = ONE_SCALE


Reason: TypeAlias = str | Callable[[Node], str]
"""Why an operator without a row stays float: a sentence, or what gives it for a node."""


@dataclass(frozen=True, slots=True)
class Table:
    """A backend's rows, indexed by head operator, and the operators that it computes in float only.

    Raises:
        SpecError: two rows have one head operator; names both.
    """

    backend: str
    patterns: tuple[Pattern, ...]
    float_only: tuple[tuple[Operators, Reason], ...] = ()
    _by_head: dict[Any, Pattern] = field(init=False, repr=False, compare=False)
    _reasons: dict[Any, Reason] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        heads: dict[Any, Pattern] = {}
        for pattern in self.patterns:
            for operator in pattern.chain[0]:
                if (other := heads.setdefault(operator, pattern)) is not pattern:
                    what = f"the rows {other.name!r} and {pattern.name!r} have one head operator, {operator}"
                    remedy = "Make them one row; what tells them apart is a condition of it."
                    raise SpecError(what, where=f"the table of {self.backend}", remedy=remedy)
        object.__setattr__(self, "_by_head", heads)
        reasons = {operator: reason for operators, reason in self.float_only for operator in operators}
        object.__setattr__(self, "_reasons", reasons)

    def pattern_of(self, node: Node) -> Pattern | None:
        """Returns the row whose head the node is."""
        return self._by_head.get(node.target) if node.op == "call_function" else None

    def float_reason(self, node: Node) -> str:
        """Returns why a node without a row stays float."""
        reason = self._reasons.get(node.target, f"{self.backend} has no integer kernel for this operator")
        return reason if isinstance(reason, str) else reason(node)


def is_float32(node: Node) -> bool:
    """True when the node returns one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
