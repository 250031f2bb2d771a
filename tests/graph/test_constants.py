"""What no input can change."""

import models
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from zeropoint.graph.constants import constant_nodes, evaluate, mutated_attributes

aten = torch.ops.aten


def graph_of(**tensors):
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    return root, Graph()


def test_weights_and_what_is_computed_from_them_are_constant():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(6.0).reshape(2, 3))

        def forward(self, x):
            return x @ (self.w.t() * 2)

    model = models.export(Transposed(), torch.randn(4, 2 + 1))
    constants = {node.name for node in constant_nodes(model)}
    assert constants == {"w", "t", "mul"}
    expected = torch.arange(6.0).reshape(2, 3).t() * 2
    assert torch.equal(evaluate(model, models.find(model, "mul")), expected)


def test_a_buffer_written_through_a_view_is_no_constant():
    model = models.exported(models.counter)
    assert mutated_attributes(model.graph) == {"state"}
    assert {node.name for node in constant_nodes(model)} == {"table", "t", "t_1"}


def test_a_buffer_written_by_a_keyword_argument_or_by_copy():
    root, graph = graph_of(a=torch.zeros(2), b=torch.zeros(2))
    x = graph.placeholder("x")
    a, b = graph.get_attr("a"), graph.get_attr("b")
    graph.call_function(aten.copy_.default, (a,), {"src": x})
    graph.call_function(aten.add.out, (x, x), {"out": b})
    graph.output(x)
    model = GraphModule(root, graph)
    assert mutated_attributes(graph) == {"a", "b"}
    assert not constant_nodes(model)


def test_two_reads_of_a_mutated_buffer_are_both_no_constants():
    root, graph = graph_of(a=torch.zeros(2))
    x, first, second = graph.placeholder("x"), graph.get_attr("a"), graph.get_attr("a")
    graph.call_function(aten.add_.Tensor, (first, x))
    graph.output(second)
    assert not constant_nodes(GraphModule(root, graph))


def test_random_operators_of_constants_are_no_constants():
    root, graph = graph_of(a=torch.zeros(2))
    a = graph.get_attr("a")
    noise = graph.call_function(aten.rand_like.default, (a,))
    dropped = graph.call_function(aten.dropout.default, (a, 0.5, True))
    graph.output((noise, dropped))
    assert constant_nodes(GraphModule(root, graph)) == {a}


def test_the_body_of_control_flow_is_no_constant():
    model = models.exported(models.conditional)
    assert {node.name for node in constant_nodes(model)} == {"layer_weight", "layer_bias"}


def test_evaluate_a_deep_chain_without_recursion():
    root, graph = graph_of(a=torch.zeros(()))
    node = graph.get_attr("a")
    for _ in range(3000):
        node = graph.call_function(aten.add.Tensor, (node, 1))
    graph.output(node)
    assert evaluate(GraphModule(root, graph), node) == 3000


def test_evaluate_gives_no_gradient():
    model = models.exported(models.linear)
    assert not evaluate(model, models.find(model, "get_attr")).requires_grad
