"""What ExecuTorch's backends take from torchao's ``utils``: the same answers, and the module paths."""

import time

import models
import pytest
import torch
from torch import nn

from zeropoint.pt2e import export_utils as our_export_utils
from zeropoint.pt2e import utils as ours

theirs = pytest.importorskip("torchao.quantization.pt2e.utils")
export_utils = pytest.importorskip("torchao.quantization.pt2e.export_utils")
aten = torch.ops.aten


def layers():
    def forward(m, x):
        y = m.deep(m.transposed(m.conv(x)))
        return m.linear(torch.conv_transpose2d(y, m.same.weight) + m.same(y).sum())

    modules = {
        "conv": nn.Conv2d(2, 3, 3),
        "same": nn.Conv2d(3, 3, 1, padding="same"),
        "transposed": nn.ConvTranspose2d(3, 3, 2),
        "deep": nn.Identity(),
        "linear": nn.Linear(4, 3),
    }
    return models.Applied(forward, **modules), torch.randn(1, 2, 5, 5)


def test_kinds_of_layers():
    module, x = layers()
    model = models.export(module, x)
    for name in ("conv", "conv_transpose", "conv_or_conv_transpose", "linear"):
        ours_is, theirs_is = (getattr(each, f"_is_{name}_node") for each in (ours, theirs))
        found = [ours_is(node) for node in model.graph.nodes]
        assert found == [theirs_is(node) for node in model.graph.nodes]
        assert any(found)


def test_packets_are_transposed_convolutions():
    graph = torch.fx.Graph()
    node = graph.call_function(aten.conv_transpose2d, (graph.placeholder("x"), graph.placeholder("w")))
    assert ours._is_conv_transpose_node(node) is theirs._is_conv_transpose_node(node) is True
    assert ours._is_conv_node(node) is theirs._is_conv_node(node) is False


def test_readers_of_sizes_are_left_out():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for target, arguments in ((aten.sym_size.default, ()), (aten.sym_numel.default, ()), (aten.relu.default, ())):
        graph.call_function(target, (x, *arguments))
    assert ours._filter_sym_size_users(x) == theirs._filter_sym_size_users(x)
    size = graph.call_function(aten.sym_size.int, (x, 0))  # As export spells it.
    assert size not in ours._filter_sym_size_users(x)
    assert size in theirs._filter_sym_size_users(x)


def test_new_names():
    module = nn.Module()
    for prefix in ("_tensor_constant_", "a.b", "conv2d"):
        for _ in range(20):
            name = ours.get_new_attr_name_with_prefix(prefix)(module)
            assert name == theirs.get_new_attr_name_with_prefix(prefix)(module)
            assert name == ours.get_new_attr_name_with_prefix(prefix)(module)
            module.register_buffer(name, torch.zeros(1))


def test_new_names_among_others():
    module = nn.Module()
    for index in (0, 1, 3, 7, 15, 16, 40):
        setattr(module, f"x{index}", 1)
    assert not hasattr(module, ours.get_new_attr_name_with_prefix("x")(module))


def test_many_new_names_take_linear_time():
    module, start = nn.Module(), time.perf_counter()
    for _ in range(3000):
        setattr(module, ours.get_new_attr_name_with_prefix("x")(module), 1)
    assert time.perf_counter() - start < 2


class Pattern(nn.Module):
    def forward(self, x, weight, mean, var):
        x = nn.functional.batch_norm(torch.relu(x), mean, var, weight, None, training=True)
        return nn.functional.hardtanh(x, 0, 6, inplace=True)


def test_graphs_of_patterns():
    inputs = (torch.randn(2, 3, 4, 4), torch.rand(3), torch.rand(3), torch.rand(3))
    expected = theirs._get_aten_graph_module_for_pattern(Pattern(), inputs)
    for pattern in (Pattern(), export_utils.WrapperModule(Pattern()), our_export_utils.WrapperModule(Pattern())):
        graph = ours._get_aten_graph_module_for_pattern(pattern, inputs)
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
            n.target for n in expected.graph.nodes if n.op == "call_function"
        ]
        assert models.count(graph, "call_module") == models.count(graph, "copy_") == 0


def test_graphs_of_functions_and_named_inputs():
    graph = ours._get_aten_graph_module_for_pattern(lambda x, y: torch.relu(x) + y, (torch.zeros(2),), y=torch.ones(2))
    assert models.count(graph, "relu") == models.count(graph, "add") == 1
    assert torch.equal(graph(torch.zeros(2), y=torch.ones(2)), torch.ones(2))


def test_exported_models_are_known():
    module, _ = models.linear()
    for model in (module, torch.fx.symbolic_trace(module), models.exported(models.linear)):
        assert our_export_utils.model_is_exported(model) == export_utils.model_is_exported(model)


def test_functions_as_modules():
    wrapped = our_export_utils.WrapperModule(torch.add)
    assert torch.equal(wrapped(torch.ones(1), other=torch.ones(1)), torch.full((1,), 2.0))
