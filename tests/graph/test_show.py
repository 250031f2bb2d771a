"""A graph as short text."""

import models
import torch
from torch.fx import Graph, GraphModule

from zeropoint.graph.show import show


def test_a_network():
    # Its own export: torch leaves the guards out of one that is made in a file with "torchao" in its name.
    module, inputs = models.mlp()
    assert show(models.export(module, *inputs)) == (
        "_guards_fn = _guards_fn(input_1)\n"
        "linear = linear(input_1, 0.weight, 0.bias)\n"
        "relu = relu(linear)\n"
        "linear_1 = linear(relu, 2.weight, 2.bias)\n"
        "return [linear_1]"
    )


def test_numbers_types_lists_and_keywords():
    graph = Graph()
    x = graph.placeholder("x")
    q = graph.call_function(torch.ops.aten.full.default, ([2, 3], 1 / 3), {"dtype": torch.int8})
    c = graph.call_function(torch.ops.aten.cat.default, ((x, q),), {"dim": -1})
    n = graph.call_function(torch.ops.aten.clamp.default, (c, None, True))
    graph.output(n)
    assert show(GraphModule({}, graph)) == (
        "full_default = full([2, 3], 0.3333, dtype=int8)\n"
        "cat_default = cat([x, full_default], dim=-1)\n"
        "clamp_default = clamp(cat_default, None, True)\n"
        "return clamp_default"
    )


def test_control_flow():
    assert show(models.exported(models.conditional)).splitlines()[3:] == [
        "cond = cond(gt, true_graph_0, false_graph_0, [x, layer.bias, layer.weight])",
        "getitem = getitem(cond, 0)",
        "return [getitem]",
    ]
