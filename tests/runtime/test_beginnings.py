"""The search for the operator with which a graph begins to go wrong, in graphs with branches."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from tests.backends.q_dq import Graph, exported, fake
from zeropoint.graph.chains import ancestors
from zeropoint.runtime.beginnings import beginning, first_place, places


def branches(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = x.exp().sin().cos()
    b = x.tanh().sigmoid().abs()
    return (a + b).neg(), fake(b.relu())


@pytest.fixture(scope="module")
def model() -> GraphModule:
    return exported(Graph(branches), torch.randn(3, 4))


@pytest.mark.parametrize("name", ["exp", "sin", "cos", "tanh", "sigmoid", "abs_1", "add", "neg", "relu"])
def test_the_first_that_goes_wrong_in_any_branch(model: GraphModule, name: str):
    by_name = {node.name: node for node in model.graph.nodes}
    asked = []

    def goes_wrong(place: torch.fx.Node) -> bool:
        asked.append(place.name)
        return place.name == name or by_name[name] in ancestors(place)

    ends = model.graph.find_nodes(op="output")[0].all_input_nodes
    assert first_place(places(model), ends, goes_wrong) is by_name[name]
    assert len(asked) == len(set(asked)) < len(places(model))


def test_nothing_goes_wrong(model: GraphModule):
    ends = model.graph.find_nodes(op="output")[0].all_input_nodes
    assert first_place(places(model), ends, lambda place: False) is None


@torch.no_grad()
def test_beginning_returns_each_name_with_its_q_and_dq(model: GraphModule):
    x = torch.randn(3, 4)
    cosine, rectified = beginning(model, ["cos", "relu"])(x)
    assert torch.equal(cosine, x.exp().sin().cos())
    assert torch.equal(rectified, model(x)[1])
