"""One step of a recurrent layer as operators: LSTM, GRU and plain cells, as ``torch.nn`` defines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.emit import Emitter
from zeropoint.graph.source import WRITTEN_KEY

aten = torch.ops.aten

STEP_KEY = "zeropoint_step"
"""Metadata of a node of a recurrent layer: what it is at each step. Nodes of a graph with equal ones share a scale."""

State = tuple[Node | None, ...]
"""``(h,)``, or ``(h, c)`` of an LSTM; None where it is zero."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of one layer in one direction, under the names that ``torch.nn`` gives them."""

    ih: Node
    hh: Node
    bias_ih: Node | None = None
    bias_hh: Node | None = None
    hr: Node | None = None


class Cell:
    """Emits the operators of one layer in one direction; all steps read the same parameters.

    Args:
        emit: where.
        written: the operator that the user wrote.
        weights: its parameters.
        place: tells this layer and direction from all others of the graph.
    """

    def __init__(self, emit: Emitter, written: Any, weights: Weights, place: str) -> None:
        self.emit, self.written, self.weights, self.place = emit, written, weights, place

    def call(self, target: Any, *args: Any, role: str = "") -> Node:
        """Returns a new node; with a role, one that has the scale of the nodes of this role at other steps."""
        node = self.emit.call(target, *args)
        node.meta[WRITTEN_KEY] = self.written
        if role:
            self.mark(node, role)
        return node

    def mark(self, node: Node, role: str) -> None:
        """Gives a node a role; one that has another already keeps that."""
        node.meta.setdefault(STEP_KEY, f"{self.place}.{role}")

    def of_input(self, inputs: Node) -> Node:
        """Returns what the input adds to the gates, of one step or of all."""
        return self.call(aten.linear.default, inputs, self.weights.ih, self.weights.bias_ih)

    def of_state(self, hidden: Node | None) -> Node | None:
        """Returns what the state adds to the gates: of a zero one the bias, None where there is none."""
        if hidden is None:
            return self.weights.bias_hh
        return self.call(aten.linear.default, hidden, self.weights.hh, self.weights.bias_hh, role="of_state")

    def add(self, left: Node, right: Node | None, role: str) -> Node:
        """Returns the sum; the first where there is no second."""
        return left if right is None else self.call(aten.add.Tensor, left, right, role=role)

    def pieces(self, gates: Node, count: int) -> list[Node]:
        """Returns the gates one by one: they lie next to each other along the last axis."""
        shape = gates.meta["val"].shape
        size = shape[-1] // count
        return [
            self.call(aten.slice.Tensor, gates, len(shape) - 1, index * size, (index + 1) * size)
            for index in range(count)
        ]


Step = Callable[[Cell, Node, State], State]
"""Returns the state after a step, from what the input adds to the gates and the state before."""


def lstm_step(cell: Cell, of_input: Node, state: State) -> State:
    """LSTM, with projection where there is a weight for it: the equations of ``torch.nn.LSTM``."""
    hidden, carried = state
    gates = cell.add(of_input, cell.of_state(hidden), "gates")
    before = cell.pieces(gates, 4)
    functions = (aten.sigmoid.default, aten.sigmoid.default, aten.tanh.default, aten.sigmoid.default)
    taken, kept, new, shown = (
        cell.call(function, gate, role=role)
        for function, gate, role in zip(functions, before, ("i", "f", "g", "o"), strict=True)
    )
    if carried is None:
        carried = cell.call(aten.mul.Tensor, taken, new, role="c")
    else:
        old = cell.call(aten.mul.Tensor, kept, carried, role="f*c")
        carried = cell.call(aten.add.Tensor, old, cell.call(aten.mul.Tensor, taken, new, role="i*g"), role="c")
    squashed = cell.call(aten.tanh.default, carried, role="tanh(c)")
    if cell.weights.hr is None:
        return cell.call(aten.mul.Tensor, shown, squashed, role="h"), carried
    full = cell.call(aten.mul.Tensor, shown, squashed, role="o*tanh(c)")
    return cell.call(aten.linear.default, full, cell.weights.hr, role="h"), carried


def gru_step(cell: Cell, of_input: Node, state: State) -> State:
    """GRU: the equations of ``torch.nn.GRU``; ``h' = n + z * (h - n)``."""
    (hidden,) = state
    of_state = cell.of_state(hidden)
    xr, xz, xn = cell.pieces(of_input, 3)
    hr, hz, hn = (None, None, None) if of_state is None else cell.pieces(of_state, 3)
    reset = cell.call(aten.sigmoid.default, cell.add(xr, hr, "r_gate"), role="r")
    update = cell.call(aten.sigmoid.default, cell.add(xz, hz, "z_gate"), role="z")
    past = None if hn is None else cell.call(aten.mul.Tensor, reset, hn, role="r*hn")
    new = cell.call(aten.tanh.default, cell.add(xn, past, "n_gate"), role="n")
    if hidden is None:
        rest = cell.call(aten.mul.Tensor, update, new)
        return (cell.call(aten.sub.Tensor, new, rest, role="h"),)
    change = cell.call(aten.mul.Tensor, update, cell.call(aten.sub.Tensor, hidden, new, role="h-n"), role="z*(h-n)")
    return (cell.call(aten.add.Tensor, new, change, role="h"),)


def tanh_step(cell: Cell, of_input: Node, state: State) -> State:
    """``h' = tanh(x + h)`` of what input and state add."""
    total = cell.add(of_input, cell.of_state(state[0]), "sum")
    return (cell.call(aten.tanh.default, total, role="h"),)


def relu_step(cell: Cell, of_input: Node, state: State) -> State:
    """``h' = relu(x + h)`` of what input and state add."""
    total = cell.add(of_input, cell.of_state(state[0]), "sum")
    return (cell.call(aten.relu.default, total, role="h"),)
