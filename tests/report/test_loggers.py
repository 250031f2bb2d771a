"""What the nodes of a model compute, recorded."""

import copy
from collections import namedtuple

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.core.errors import CaptureError
from zeropoint.graph.origin import NodeSourceDebugInfo
from zeropoint.report.loggers import (
    OutputLogger,
    extract_results_from_loggers,
    prepare_for_propagation_comparison,
)
from zeropoint.workflow import convert_pt2e, prepare_pt2e

theirs = pytest.importorskip("torchao.quantization.pt2e._numeric_debugger")


def recorded(model, *inputs):
    logged = prepare_for_propagation_comparison(model)
    with torch.no_grad():
        logged(*inputs)
    return {info.name: values for info, values in extract_results_from_loggers(logged).items()}


@pytest.mark.parametrize("build", [models.net, models.mlp, models.branches, models.called_twice])
def test_torchao_records_the_same_of_an_exported_model(build):
    _, inputs = build()
    model = models.exported(build)
    found = []
    for package in (None, theirs):
        prepare = prepare_for_propagation_comparison if package is None else package.prepare_for_propagation_comparison
        extract = extract_results_from_loggers if package is None else package.extract_results_from_loggers
        logged = prepare(model)
        result = logged(*inputs)
        assert torch.equal(result, model(*inputs))
        logged.graph.eliminate_dead_code()
        logged.recompile()
        logged(*inputs)
        found.append({info.name: values for info, values in extract(logged).items()})
    ours, other = found
    assert ours.keys() == other.keys()
    for name, (node_name, stack, values) in ours.items():
        assert (node_name, stack) == other[name][:2]
        assert len(values) == len(other[name][2]) == 2
        assert all(map(torch.equal, values, other[name][2]))


def test_the_model_stays_as_it_is():
    model = models.exported(models.net)
    before = [node.format_node() for node in model.graph.nodes]
    logged = prepare_for_propagation_comparison(model)
    assert [node.format_node() for node in model.graph.nodes] == before
    assert not [each for each in model.modules() if isinstance(each, OutputLogger)]
    assert next(name for name, each in logged.named_children() if isinstance(each, OutputLogger)) == "conv2d_logger0"


def test_what_is_written_to_later_is_recorded_before():
    module = models.Applied(lambda m, x: torch.relu_(m.layer(x)) + 1, layer=nn.Linear(3, 3))
    x = torch.randn(5, 3)
    model = models.export(module, x)
    assert torch.equal(recorded(model, x)["linear"][2][0], module.layer(x))
    logged = theirs.prepare_for_propagation_comparison(model)
    logged(x)
    (values,) = [v for i, (_, _, v) in theirs.extract_results_from_loggers(logged).items() if i.name == "linear"]
    assert torch.equal(values[0], module.layer(x).relu())


def test_a_converted_model_is_recorded_after_dequantize():
    _, inputs = models.net()
    prepared = prepare_pt2e(models.exported(models.net), quantizers.STATIC)
    prepared(*inputs)
    found = recorded(prepared, *inputs)
    assert found["relu"][0].startswith("activation_post_process")
    converted = convert_pt2e(copy.deepcopy(prepared))
    found = recorded(converted, *inputs)
    assert found.keys() == {"batch_norm", "relu", "batch_norm_1", "relu_1", "add", "mean", "linear"}
    assert all(name.startswith("dequantize_per_tensor") for name, _, _ in found.values())
    assert all(values[0].dtype == torch.float32 for _, _, values in found.values())
    assert torch.equal(found["linear"][2][0], converted(*inputs))


def test_sizes_are_not_recorded():
    module = models.Applied(lambda m, x: m.layer(x).reshape(x.shape[0], -1), layer=nn.Conv1d(2, 2, 1))
    shapes = (({0: torch.export.Dim.DYNAMIC},),)
    model = torch.export.export(module, (torch.randn(3, 2, 4),), dynamic_shapes=shapes).module()
    assert models.count(model, "sym_size") == 1
    assert recorded(model, torch.randn(5, 2, 4)).keys() == {"conv1d", "reshape"}


def test_lists_and_tuples():
    module = models.Applied(lambda m, x: m.layer(x).split(2, 1)[0].max(1), layer=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    found = recorded(models.export(module, x), x)
    assert [tuple(t.shape) for t in found["split"][2][0]] == [(3, 2), (3, 2)]
    assert len(found["max_1"][2][0]) == 2


def test_values_of_any_structure_are_copied():
    Pair = namedtuple("Pair", "first second")
    logger = OutputLogger(NodeSourceDebugInfo("x", 1), "x_1")
    value = {"a": [torch.ones(1, requires_grad=True)], "b": Pair(torch.ones(1), 2)}
    assert logger(value) is value
    value["b"].first.zero_()
    (copied,) = logger.stats
    assert copied["b"] == Pair(torch.ones(1), 2)
    assert not copied["a"][0].requires_grad
    assert repr(logger) == "OutputLogger(NodeSourceDebugInfo(name='x', graph_id=1), node_name=x_1, runs=1)"


def test_models_without_history_are_refused():
    with pytest.raises(CaptureError, match="its nodes do not say which node of an exported program"):
        prepare_for_propagation_comparison(torch.fx.symbolic_trace(nn.ReLU()))
    with pytest.raises(CaptureError, match="got Linear, not a graph module"):
        prepare_for_propagation_comparison(nn.Linear(2, 2))
