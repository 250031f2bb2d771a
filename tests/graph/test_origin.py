"""The node of the exported program that a node comes from."""

from dataclasses import asdict

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.graph.bind import argument
from zeropoint.graph.origin import debug_info
from zeropoint.workflow import convert_pt2e, prepare_pt2e

theirs = pytest.importorskip("torchao.quantization.pt2e._numeric_debugger")


def same(ours, other):
    return (ours is None) == (other is None) and (ours is None or asdict(ours) == vars(other))


@pytest.mark.parametrize("build", [models.net, models.mlp, models.called_twice, models.counter, models.conditional])
@pytest.mark.parametrize("strict", [True, False])
def test_torchao_says_the_same(build, strict):
    model = models.exported(build, strict=strict)
    for node in model.graph.nodes:
        assert same(debug_info(node), theirs._extract_node_source_debug_info(node))
    if not strict:  # There, the names are those of the graph before it was taken apart.
        calls = [node for node in model.graph.nodes if node.op == "call_function"]
        assert [debug_info(node).name for node in calls] == [node.name for node in calls]


def test_a_node_without_history_has_none():
    graph = torch.fx.Graph()
    node = graph.call_function(torch.relu, (graph.placeholder("x"),))
    assert debug_info(node) is None
    node.meta["from_node"] = []
    assert debug_info(node) is None


def test_a_layer_is_the_batch_norm_that_is_folded_into_it():
    _, inputs = models.net()
    prepared = prepare_pt2e(models.exported(models.net), quantizers.STATIC)
    prepared(*inputs)
    for model in (prepared, convert_pt2e(prepared)):
        assert [debug_info(models.find(model, "conv2d", i)).name for i in (0, 1)] == ["batch_norm", "batch_norm_1"]
        assert debug_info(models.find(model, "linear")).name == "linear"


def test_what_lies_between_layer_and_batch_norm_is_no_node_of_the_program():
    module = models.Applied(lambda m, x: m.norm(m.conv(x).flatten(2)), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm1d(4))
    prepared = prepare_pt2e(models.export(module.eval(), torch.randn(2, 3, 4, 4)), quantizers.STATIC)
    assert debug_info(models.find(prepared, "conv2d")) is None
    assert debug_info(models.find(prepared, "flatten")).name == "batch_norm"


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_computed_from_a_parameter_is_no_node_of_the_program(strict):
    _, inputs = models.mlp()
    prepared = prepare_pt2e(models.exported(models.mlp, strict=strict), quantizers.STATIC)
    observers = [argument(models.find(prepared, "linear", i), "weight") for i in (0, 1)]
    assert [debug_info(node) for node in observers] == [None, None]
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    weights = [argument(models.find(converted, "linear", i), "weight") for i in (0, 1)]
    assert [debug_info(node) for weight in weights for node in (weight, weight.args[0])] == [None] * 4


@pytest.mark.parametrize("strict", [True, False])
def test_each_value_is_observed_quantized_and_dequantized_as_itself(strict):
    _, inputs = models.mlp()
    prepared = prepare_pt2e(models.exported(models.mlp, strict=strict), quantizers.STATIC)
    layers = [debug_info(models.find(prepared, "linear", i)) for i in (0, 1)]
    assert [count(prepared, layer) for layer in layers] == [2, 2]
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    assert [count(converted, layer) for layer in layers] == [3, 3]


def count(model, info):
    return sum(debug_info(node) == info for node in model.graph.nodes)
