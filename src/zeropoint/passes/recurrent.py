"""Take recurrent layers apart, so that their products and gates are operators that can be quantized."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from zeropoint.core.errors import GraphError
from zeropoint.graph.bind import argument
from zeropoint.graph.emit import Emitter
from zeropoint.graph.layers import MOVES
from zeropoint.graph.recurrent import Cell, State, Step, Weights, gru_step, lstm_step, relu_step, tanh_step
from zeropoint.graph.source import describe

aten = torch.ops.aten
PASS = "take_apart_recurrent"
LAYERS: dict[Any, Step] = {
    aten.lstm.input: lstm_step,
    aten.gru.input: gru_step,
    aten.rnn_tanh.input: tanh_step,
    aten.rnn_relu.input: relu_step,
}
"""Layers: all steps of a sequence, of one layer or several."""
CELLS: dict[Any, Step] = {
    aten.lstm_cell.default: lstm_step,
    aten.gru_cell.default: gru_step,
    aten.rnn_tanh_cell.default: tanh_step,
    aten.rnn_relu_cell.default: relu_step,
}
"""Cells: one step."""
PACKED = (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
RECURRENT = (*LAYERS, *CELLS, *PACKED)
ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
WITHIN = (*MOVES, aten.slice.Tensor, aten.select.int, aten.narrow.default)
"""Operators that return a part of what they read."""


def take_apart(node: Node, known: dict[object, Any]) -> None:
    """Replaces a recurrent layer or cell by its steps: linear layers, sums, products, sigmoid and tanh.

    All steps read the same parameters, and what is the same at each step is marked, so that it gets one scale.

    Raises:
        GraphError: the layer reads packed sequences, or sequences of a free length.
    """
    if node.target in PACKED:
        what = "it reads a packed sequence, whose steps have batches of different sizes"
        remedy = "Export the model without pack_padded_sequence: pad the sequences, and mask what the padding gives."
        raise GraphError(what, where=describe(node), remedy=remedy)
    results = _cell(node, known) if node.target in CELLS else _Layers(node, known).run()
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    for reader in list(node.users):
        assert reader.target is operator.getitem
        reader.replace_all_uses_with(results[argument(reader, "index")])
        node.graph.erase_node(reader)
    node.graph.erase_node(node)


def _cell(node: Node, known: dict[object, Any]) -> Sequence[Any]:
    """Returns the state after the one step of a cell."""
    weights = Weights(*(argument(node, name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")))
    cell = Cell(Emitter(node, PASS, known), node.target, weights, node.name)
    state = _started(cell, [None if is_zero(each) else each for each in _states(node)])
    return CELLS[node.target](cell, cell.of_input(argument(node, "input")), state)


def _states(node: Node) -> list[Node]:
    state = argument(node, "hx")
    return [state] if isinstance(state, Node) else list(state)


def is_zero(node: Node) -> bool:
    """True for a state that the program fills with zeros, and that nothing else could write to."""
    return node.target in ZEROS and all(user.target in RECURRENT for user in node.users)


def _started(cell: Cell, state: Sequence[Node | None]) -> State:
    """Returns the state before the first step; what a caller carries over from call to call has the scale of the rest.

    The state of another part of the program, such as an encoder's, has its own.
    """
    for each, role in zip(state, ("h", "c"), strict=False):
        if each is not None and _is_carried(each):
            cell.mark(each, role)
    return tuple(state)


def _is_carried(node: Node) -> bool:
    while node.target in WITHIN:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


@dataclass(frozen=True, slots=True)
class _Direction:
    """What one layer gives in one direction: the hidden state of each step, in order of time, and the last state."""

    hidden: list[Node]
    last: State


class _Layers:
    """The layers of one operator."""

    def __init__(self, node: Node, known: dict[object, Any]) -> None:
        self.node, self.emit, self.step = node, Emitter(node, PASS, known), LAYERS[node.target]
        self.time = 1 if argument(node, "batch_first") else 0
        self.length = _length(node, self.time)
        self.directions = 2 if argument(node, "bidirectional") else 1
        self.states = _states(node)
        self.plain = Cell(self.emit, node.target, Weights(node, node), "")  # For what belongs to no direction.

    def run(self) -> list[Node]:
        """Returns what the operator does: the output, and the last states of all layers and directions."""
        sequence: Node = argument(self.node, "input")
        weights, ends, found = self._weights(), [], []
        for layer in range(argument(self.node, "num_layers")):
            if layer and argument(self.node, "dropout"):
                rate, mode = argument(self.node, "dropout"), argument(self.node, "train")
                sequence = self.plain.call(aten.dropout.default, sequence, rate, mode)
            indices = range(layer * self.directions, (layer + 1) * self.directions)
            found = [self._direction(sequence, weights[index], index) for index in indices]
            ends += [direction.last for direction in found]
            sequence = self._joined([self._joined(direction.hidden, self.time) for direction in found], 2)
        self._shorten(found)
        return [sequence, *(self._stacked([end[which] for end in ends]) for which in range(len(self.states)))]

    def _weights(self) -> list[Weights]:
        """Returns the parameters of each layer and direction."""
        names = ["ih", "hh"] + ["bias_ih", "bias_hh"] * bool(argument(self.node, "has_biases"))
        if len(self.states) == 2 and not _have_equal_width(*self.states):
            names.append("hr")
        parameters: list[Node] = argument(self.node, "params")
        groups = (parameters[at : at + len(names)] for at in range(0, len(parameters), len(names)))
        return [Weights(**dict(zip(names, group, strict=True))) for group in groups]

    def _direction(self, sequence: Node, weights: Weights, index: int) -> _Direction:
        cell = Cell(self.emit, self.node.target, weights, f"{self.node.name}.{index}")
        is_reverse = self.directions == 2 and index % 2 == 1
        of_input = self._steps(cell, cell.of_input(sequence))
        state = _started(cell, [self._start(cell, each, index) for each in self.states])
        hidden: list[Node] = []
        for step in reversed(of_input) if is_reverse else of_input:
            state = self.step(cell, step, state)
            assert state[0] is not None
            hidden.append(state[0])
        return _Direction(hidden[::-1] if is_reverse else hidden, state)

    def _steps(self, cell: Cell, sequence: Node) -> list[Node]:
        """Returns the steps of a sequence, of three dimensions too."""
        if self.length == 1:
            return [sequence]
        return [cell.call(aten.slice.Tensor, sequence, self.time, at, at + 1) for at in range(self.length)]

    def _start(self, cell: Cell, states: Node, index: int) -> Node | None:
        """Returns the state of one layer and direction before the first step, shaped like a step; None for zeros."""
        if is_zero(states):
            return None
        if states.meta["val"].shape[0] != 1:
            states = cell.call(aten.slice.Tensor, states, 0, index, index + 1)
        return states if self.time == 0 else self._swapped(cell, states)

    def _swapped(self, cell: Cell, state: Node) -> Node:
        """Returns ``(1, batch, width)`` as ``(batch, 1, width)`` or the other way."""
        one, batch, width = state.meta["val"].shape
        sizes = [size if isinstance(size, int) else -1 for size in (batch, one, width)]
        return cell.call(aten.reshape.default, state, sizes)

    def _joined(self, parts: list[Node], axis: int) -> Node:
        return parts[0] if len(parts) == 1 else self.plain.call(aten.cat.default, parts, axis)

    def _stacked(self, ends: Sequence[Node | None]) -> Node:
        """Returns the last states as ``(layers and directions, batch, width)``.

        Each keeps its scale: a stack is computed in float where it has no integer kernel, a cat would join the scales.
        """
        present = [each for each in ends if each is not None]
        if len(present) == 1:
            return present[0] if self.time == 0 else self._swapped(self.plain, present[0])
        flat = [self.plain.call(aten.select.int, each, self.time, 0) for each in present]
        return self.plain.call(aten.stack.default, flat)

    def _shorten(self, found: list[_Direction]) -> None:
        """Lets what picks one step of the output, such as ``output[:, -1]``, read that step and no sequence."""
        outputs = [user for user in self.node.users if user.args[1] == 0]
        for reader in [reader for output in outputs for reader in output.users]:
            if reader.target is aten.select.int and argument(reader, "dim") % 3 == self.time:
                at = argument(reader, "index")
                step = self._joined([direction.hidden[at] for direction in found], 2)
                sizes = [s if isinstance(s, int) else -1 for s in reader.meta["val"].shape]
                reader.replace_all_uses_with(self.plain.call(aten.reshape.default, step, sizes))
                reader.graph.erase_node(reader)


def _length(node: Node, axis: int) -> int:
    length = argument(node, "input").meta["val"].shape[axis]
    if isinstance(length, int):
        return length
    what = f"the length of its sequences is free ({length}), and a layer is taken apart step by step"
    remedy = "Export it for one length, with Dim.STATIC for that axis; the batch may be free. Pad what is shorter."
    raise GraphError(what, where=describe(node), remedy=remedy)


def _have_equal_width(hidden: Node, carried: Node) -> bool:
    return hidden.meta["val"].shape[-1] == carried.meta["val"].shape[-1]
