"""How far two models are apart, node by node; the same nodes as with torchao."""

import copy
import math
from types import SimpleNamespace

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.core.errors import ComparisonError
from zeropoint.graph.origin import NodeSourceDebugInfo
from zeropoint.pt2e import _numeric_debugger as ours
from zeropoint.workflow import convert_pt2e, prepare_pt2e

theirs = pytest.importorskip("torchao.quantization.pt2e._numeric_debugger")
pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
from torchao.quantization.pt2e import quantizer as ao_quantizer  # noqa: E402

THEIRS = SimpleNamespace(**vars(pt2e), **{k: v for k, v in vars(ao_quantizer).items() if k not in vars(pt2e)})
OUR_FLOW = (prepare_pt2e, convert_pt2e)
THEIR_FLOW = (quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e)
INFO = NodeSourceDebugInfo("conv2d", 1)


@models.seeded
def cnn():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    return nn.Sequential(*layers), (torch.randn(4, 3, 6, 6),)


def outputs_too(model):
    """Annotates as ``quantizers.static`` does, and the results of activations."""
    quantizers.static(model, THEIRS)
    act = quantizers.activation(THEIRS)
    for name in ("relu", "flatten"):
        for index in range(models.count(model, name)):
            quantizers.annotate(models.find(model, name, index), {}, act, THEIRS)


def compared(model, inputs, flow, debugger, annotate=outputs_too):
    """Returns the summaries by the name of the node, and the SQNR of the whole model."""
    prepare, convert = flow
    model = copy.deepcopy(model)
    reference = debugger.prepare_for_propagation_comparison(model)
    prepared = prepare(model, quantizers.ByHand(annotate))
    with torch.no_grad():
        prepared(*inputs)
        converted = debugger.prepare_for_propagation_comparison(convert(prepared))
        reference(*inputs)
        converted(*inputs)
    recordings = [debugger.extract_results_from_loggers(each) for each in (reference, converted)]
    return {info.name: summary for info, summary in debugger.compare_results(*recordings).items()}


def test_sqnr_of_each_node_of_a_quantized_network():
    _, inputs = cnn()
    model = models.exported(cnn)
    found = compared(model, inputs, OUR_FLOW, ours)
    other = compared(model, inputs, THEIR_FLOW, theirs)
    assert found.keys() == other.keys() == {"conv2d", "relu", "conv2d_1", "relu_1", "flatten", "linear"}
    for name, summary in found.items():
        (result,), (expected,) = summary.results, other[name].results
        assert 30 < result.sqnr < 80
        assert result.sqnr.item() == pytest.approx(expected.sqnr.item(), abs=0.1)
        assert result.mse_loss.item() == pytest.approx(expected.mse_loss.item(), rel=0.01)
        assert (summary.ref_node_name, summary.ref_module_stack) == (
            other[name].ref_node_name,
            other[name].ref_module_stack,
        )
        assert summary.actual_module_stack == summary.ref_module_stack
        assert summary.actual_node_name.startswith("dequantize_per_tensor_default")
    assert found["conv2d_1"].ref_module_stack == "2"


def test_nodes_that_are_quantized_where_they_are_read():
    _, inputs = cnn()
    model = models.exported(cnn)
    found = compared(model, inputs, OUR_FLOW, ours, lambda m: quantizers.static(m, THEIRS))
    other = compared(model, inputs, THEIR_FLOW, theirs, lambda m: quantizers.static(m, THEIRS))
    assert found.keys() == other.keys()
    assert found["relu"].actual_node_name.startswith("dequantize_per_tensor_default")
    assert other["relu"].actual_node_name == "relu"
    assert all(summary.results[0].sqnr > 30 for summary in found.values())


def test_our_debugger_takes_the_models_of_torchao():
    _, inputs = cnn()
    model = models.exported(cnn)
    found = compared(model, inputs, THEIR_FLOW, ours)
    mine = compared(model, inputs, OUR_FLOW, ours)
    assert found.keys() == mine.keys()
    for name, summary in found.items():
        assert summary.results[0].sqnr.item() == pytest.approx(mine[name].results[0].sqnr.item(), abs=0.1)


def test_batch_norm_is_compared_with_the_layer_that_computes_it():
    _, inputs = models.net()
    model = models.exported(models.net)

    def annotate(m):
        quantizers.static(m, THEIRS)

    found = compared(model, inputs, OUR_FLOW, ours, annotate)
    assert found.keys() == {"batch_norm", "relu", "batch_norm_1", "relu_1", "add", "mean", "linear"}
    assert all(summary.results[0].sqnr > 30 for summary in found.values())
    other = compared(model, inputs, THEIR_FLOW, theirs, annotate)
    assert other["conv2d"].results[0].sqnr < 10  # What comes before batch norm, and what comes after.


def result(actual, ref):
    return ours.QuantizationComparisonResult(actual=actual, ref=ref)


def test_losses_of_any_structure():
    ref = {"a": [torch.ones(4), torch.zeros(2)], "b": (torch.tensor([1, 2]),), "c": torch.ones(1)}
    actual = {"a": [torch.full((4,), 0.9), torch.zeros(2)], "b": (torch.tensor([1, 2]),), "c": torch.ones(1)}
    found, other = result(actual, ref), theirs.QuantizationComparisonResult(actual=actual, ref=ref)
    assert found.mse_loss == other.mse_loss
    assert found.loss(lambda x, y: (x - y).sum()) == other.loss(lambda x, y: (x - y).sum())
    sqnr = found.sqnr
    assert sqnr["a"][0].item() == pytest.approx(20, abs=1e-4)
    assert sqnr["a"][1] == sqnr["c"] == math.inf
    assert isinstance(sqnr["b"], tuple)
    assert repr(result(torch.ones(1), torch.ones(1))) == ("QuantizationComparisonResult(mse_loss=0.0, sqnr=inf)")


def test_the_reference_is_the_signal():
    found, other = (
        kind(actual=torch.zeros(3), ref=torch.ones(3))
        for kind in (ours.QuantizationComparisonResult, theirs.QuantizationComparisonResult)
    )
    assert found.sqnr == 0.0
    assert other.sqnr == -math.inf


@pytest.mark.parametrize(
    ("ref", "actual", "words", "torchao_refuses"),
    [
        (torch.ones(2), torch.ones(3), r"ref and actual differ in shape: \(2,\) and \(3,\)\. Run both models", True),
        ([torch.ones(2)], [torch.ones(2), torch.ones(1)], r"differ in shape: \[\(2,\)\] and \[\(2,\), \(1,\)\]", False),
        ({"a": torch.ones(2)}, {}, r"differ in shape: \{'a': \(2,\)\} and \{\}", True),
        ([torch.ones(2), 3], [torch.ones(2), 4], r"differ in shape: \[\(2,\), 3\] and \[\(2,\), 4\]", True),
        (torch.ones(2), 3, "actual is int, not a tensor, list, tuple or dictionary", True),
        (None, torch.ones(2), "ref is NoneType, not a tensor", True),
    ],
)
def test_what_cannot_be_compared(ref, actual, words, torchao_refuses):
    with pytest.raises(ComparisonError, match=words):
        result(actual, ref)
    if torchao_refuses:
        with pytest.raises(ValueError, match=r"value must be|different shapes"):
            theirs.QuantizationComparisonResult(actual=actual, ref=ref)
    else:
        theirs.QuantizationComparisonResult(actual=actual, ref=ref)


def recording(*values):
    return {INFO: ("conv2d", {"x": ("conv", nn.Conv2d)}, list(values))}


def test_summaries():
    (summary,) = ours.compare_results(recording(torch.ones(2)), recording(torch.ones(2))).values()
    assert (summary.actual_module_stack, summary.ref_module_stack) == ("conv", "conv")
    missing = {INFO: (None, None, [torch.ones(2)])}
    (summary,) = ours.compare_results(missing, missing).values()
    assert (summary.actual_node_name, summary.actual_module_stack) == ("", "None")


@pytest.mark.parametrize(
    ("ref", "actual", "words"),
    [
        (recording(torch.ones(2)), recording(torch.ones(3)), r"^conv2d, recorded at conv2d and conv2d: ref and actual"),
        (
            recording(torch.ones(2)),
            recording(torch.ones(2), torch.ones(2)),
            r"^conv2d, .*: the reference has 1 values, the other model 2\. Run both models on the same inputs, in the",
        ),
        ({}, recording(torch.ones(2)), r"^compare_results: .*no node in common\. Run each model before"),
        (
            recording(torch.ones(2)),
            {NodeSourceDebugInfo("conv2d", 2): ("conv2d", None, [torch.ones(2)])},
            r"no node in common\. Make both models of one torch\.export",
        ),
    ],
)
def test_recordings_that_cannot_be_compared(ref, actual, words):
    with pytest.raises(ComparisonError, match=words):
        ours.compare_results(ref, actual)
