"""Which integers values a step away explain, and which they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from tests.backends.q_dq import SCALE, Graph, exported, fake
from zeropoint.runtime.ties import explained, float_sources

ROW = SCALE * torch.tensor([[5.0, 9.0, -4.0, 10.0, 10.0, 0.0]])


class Watcher(Interpreter):
    """Keeps the value of every node."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def are_explained(function: Callable[..., Any], integers: torch.Tensor, *inputs: torch.Tensor) -> bool:
    """Whether these integers are, where a file gave the very floats that the model gives."""
    return explained_in(exported(Graph(function), *inputs), integers, *inputs)


def explained_in(model: GraphModule, integers: torch.Tensor, *inputs: torch.Tensor) -> bool:
    watcher = Watcher(model)
    watcher.run(*inputs, enable_io_processing=False)
    (node,) = model.graph.find_nodes(op="output")[0].all_input_nodes
    return explained(model, node, inputs, integers, {each: watcher.values[each] for each in float_sources(node)})


@pytest.mark.parametrize(
    ("function", "near"),
    [
        (lambda x: fake(x).argmax(1), [1, 3, 4]),
        (lambda x: fake(x).argmax(1, keepdim=True), [1, 3, 4]),
        (lambda x: fake(x).argmax(), [1, 3, 4]),
        (lambda x: fake(x).argmin(1), [2]),
        (lambda x: fake(x).max(1)[1], [1, 3, 4]),
        (lambda x: fake(x).topk(1, 1)[1], [1, 3, 4]),
        (lambda x: fake(x).argmax(1).unsqueeze(0).int(), [1, 3, 4]),
        (lambda x: (fake(x) * 2).argmax(-1), [3, 4]),  # No dequantize: 3 % of a value of middle size are less than 2.
        (lambda x: fake(x).argmax(1) + 0, [3]),  # Of what is computed with a position, no step is known.
    ],
)
def test_a_position_is_explained_by_a_value_within_one_step(function: Callable[..., Any], near: list[int]):
    integers = function(ROW)
    assert [i for i in range(-1, 7) if are_explained(function, torch.full_like(integers, i), ROW)] == near


def test_sorted_positions():
    def order(x: torch.Tensor) -> torch.Tensor:
        return fake(x).argsort(1)

    assert are_explained(order, torch.tensor([[2, 5, 0, 4, 1, 3]]), ROW)  # 10, 9, 10 for 9, 10, 10
    assert not are_explained(order, torch.tensor([[2, 0, 5, 1, 3, 4]]), ROW)


def test_comparisons_flip_where_their_sides_are_steps_apart():
    def larger(x: torch.Tensor) -> torch.Tensor:
        return fake(x) > 9.4 * SCALE

    def larger_by_two(x: torch.Tensor) -> torch.Tensor:
        return fake(x) > fake(x * 0 + 8 * SCALE)

    assert are_explained(larger, torch.tensor([[False, True, False, False, True, False]]), ROW)
    assert not are_explained(larger, torch.tensor([[True, False, False, True, True, False]]), ROW)
    assert are_explained(larger_by_two, torch.tensor([[False, False, False, False, True, False]]), ROW)
    assert not are_explained(larger_by_two, torch.tensor([[True, True, False, True, True, False]]), ROW)


def test_counts_and_conversions_lie_between_those_of_lower_and_higher_values():
    def count(x: torch.Tensor) -> torch.Tensor:
        return (fake(x) > 9.4 * SCALE).sum(1)

    def whole(x: torch.Tensor) -> torch.Tensor:
        return (fake(x) / SCALE).round().int()

    assert [i for i in range(6) if are_explained(count, torch.tensor([i]), ROW)] == [0, 1, 2, 3]
    assert are_explained(whole, torch.tensor([[5, 9, -4, 10, 10, 0]]), ROW)
    assert not are_explained(whole, torch.tensor([[5, 9, -4, 10, 12, 0]]), ROW)


def test_masked_values_are_tied():
    def masked(x: torch.Tensor) -> torch.Tensor:
        return fake(x).masked_fill(x < 1, -torch.inf).argmax(1)

    assert are_explained(masked, torch.tensor([5]), ROW)
    assert not are_explained(lambda x: fake(x).argmax(1), torch.tensor([3, 3]), ROW)  # Another shape.


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return (fake(x) * self.seen).argmax(1)


def test_buffers_of_the_model_stay_as_they_are():
    model = exported(Counts(), ROW)
    assert explained_in(model, torch.tensor([3]), ROW)
    assert torch.equal(model.seen, torch.ones(1))  # One run: the test's own.
