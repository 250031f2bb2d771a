"""Walks over all nodes, the bodies of control flow included."""

import models
import pytest
import torch
from torch import nn

from zeropoint.core.errors import CaptureError
from zeropoint.graph.chains import collect_producer_nodes
from zeropoint.graph.trace import bfs_trace_with_node_process

theirs = pytest.importorskip("torchao.quantization.pt2e.graph_utils")


def visited(walk, model):
    nodes = []
    walk(model, nodes.append)
    return nodes


@models.seeded
def mapped():
    class Mapped(nn.Module):
        def forward(self, x, y):
            from torch._higher_order_ops.map import map as over_rows

            return over_rows(lambda row, y: row * 2 + y, x, y)

    return Mapped(), (torch.randn(3, 4), torch.randn(4))


@pytest.mark.parametrize("build", [models.net, models.conditional, models.scanned, mapped])
def test_torchao_visits_the_same(build):
    module, inputs = build()
    with torch.no_grad():
        program = torch.export.export(module, inputs)
    for model in (program, program.module()):
        nodes = visited(bfs_trace_with_node_process, model)
        assert nodes == visited(theirs.bfs_trace_with_node_process, model)
        assert not {"placeholder", "output"} & {node.op for node in nodes}
        assert (len({node.graph for node in nodes}) > 1) == (build is not models.net)


def test_the_condition_of_a_loop_is_visited():
    model = models.exported(models.looped)
    nodes = visited(bfs_trace_with_node_process, model)
    missed = [node for node in nodes if node not in visited(theirs.bfs_trace_with_node_process, model)]
    assert [models.name_of(node) for node in missed if node.op == "call_function"] == ["lt"]
    assert {"add", "linear"} <= {models.name_of(node) for node in nodes}


def test_bodies_in_bodies_come_last():
    class Nested(nn.Module):
        def forward(self, x):
            def inner(x):
                return torch.cond(x.max() > 1, lambda x: x.sin(), lambda x: x.cos(), (x,))

            return torch.cond(x.sum() > 0, inner, lambda x: x * 2, (x,))

    model = models.export(Nested(), torch.randn(3))
    nodes = visited(bfs_trace_with_node_process, model)
    assert nodes == visited(theirs.bfs_trace_with_node_process, model)
    assert [models.name_of(node) for node in nodes if node.op == "call_function"][-2:] == ["sin", "cos"]


def test_other_models_are_refused():
    with pytest.raises(CaptureError, match="got Linear, not an exported program or graph module"):
        bfs_trace_with_node_process(nn.Linear(2, 2), print)


def test_producers():
    module = models.Applied(lambda m, x: m.a(x) + m.a.weight.t().relu().sum(), a=nn.Linear(3, 3))
    model = models.export(module, torch.randn(2, 3))
    for node in model.graph.nodes:
        if node.op != "output":
            assert collect_producer_nodes(node) == theirs.collect_producer_nodes(node)
    assert collect_producer_nodes(models.find(model, "add")) is None


def test_producers_are_named_once_and_found_in_lists():
    graph = torch.fx.Graph()
    node = graph.get_attr("weight")
    for _ in range(40):  # Two to the power of 40 ways.
        node = graph.call_function(torch.add, (node, node), {})
    assert len(collect_producer_nodes(node)) == 41
    joined = graph.call_function(torch.cat, ([node, graph.placeholder("x")],))
    assert collect_producer_nodes(joined) is None
    assert theirs.collect_producer_nodes(joined) == [joined]
