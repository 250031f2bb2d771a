"""Bias correction: the mean of each channel is that of the float model again, on the int32 grid."""

import copy

import pytest
import quantizers
import torch
from torch import nn

import zeropoint as zp
from zeropoint.algorithms.correct_biases import (
    Correction,
    channel_means,
    correct_biases,
    last_reads,
    live_bytes,
    significant,
)
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import LAYERS
from zeropoint.passes.round_biases import bias_scale


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6(), nn.Flatten(),
        nn.Linear(16 * 36, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def quantized():
    """Returns the float graph, the converted one with 4-bit weights, and the batches."""
    batches = [(torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    graph = torch.export.export(network(), batches[0]).module()
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-7, weight_qmax=7)
    prepared = zp.prepare_pt2e(copy.deepcopy(graph), XNNPACKQuantizer().set_global(config))
    for batch in batches:
        prepared(*batch)
    return graph, zp.convert_pt2e(prepared), batches


def shifts(reference, converted, batches):
    """Returns the root mean square of the shifts of channels' means, by layer."""
    found = channel_means(converted, batches)
    return {name: float((found[name] - means).mean(0).square().mean().sqrt()) for name, means in reference.items()}


def test_the_means_are_restored(quantized):
    graph, converted, batches = quantized
    converted = copy.deepcopy(converted)
    reference = channel_means(graph, batches)
    assert {name: tuple(means.shape) for name, means in reference.items()} == {
        "conv2d": (32, 16), "conv2d_1": (32, 16), "linear": (32, 5),
    }  # fmt: skip
    before = shifts(reference, converted, batches)
    assert correct_biases(converted, batches, reference) == Correction(("conv2d_1", "linear"), 2, 32)
    after = shifts(reference, converted, batches)
    for name in ("conv2d_1", "linear"):
        assert after[name] < 0.5 * before[name]


def test_biases_stay_on_their_grid(quantized):
    graph, converted, batches = quantized
    converted = copy.deepcopy(converted)
    correct_biases(converted, batches, channel_means(graph, batches))
    for node in converted.graph.nodes:
        if node.target in LAYERS and argument(node, "bias") is not None:
            bias = converted.get_parameter(argument(node, "bias").target).detach().double()
            steps = bias / bias_scale(converted, node).double()
            torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-6)


def test_nothing_to_correct_changes_nothing(quantized):
    _, converted, batches = quantized
    converted = copy.deepcopy(converted)
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    found = correct_biases(converted, batches, channel_means(converted, batches))
    assert (found, found.reason) == (Correction((), 2, 32), "no shift is larger than chance")
    found = correct_biases(converted, batches, {})
    assert found.reason == "no layer has a bias, and input and weight quantized to fixed scales"
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())


def test_one_sample_corrects_nothing_and_says_so(quantized):
    graph, converted, batches = quantized
    of_one = {name: means[:1] for name, means in channel_means(graph, batches).items()}
    found = correct_biases(copy.deepcopy(converted), [(batches[0][0][:1],)], of_one)
    assert found == Correction((), 2, 1)
    assert found.reason == "only 1 sample was used, and it takes 2 to tell a shift from chance"


def test_chance_is_not_corrected():
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 1000, generator=random)
    shifted = noise + torch.cat([torch.full((500,), 3.0), torch.zeros(500)])
    kept = significant(shifted)
    assert (kept[:500] != 0).all()
    assert (kept[500:] != 0).float().mean() < 0.1
    assert torch.equal(significant(noise[:1]), torch.zeros(1000))


def test_as_many_batches_are_used_as_fit_in_memory(quantized, monkeypatch):
    graph, model, batches = quantized
    whole = channel_means(graph, batches)
    of_two = {name: means[:8] for name, means in whole.items()}
    expected, actual = copy.deepcopy(model), copy.deepcopy(model)
    changed = correct_biases(expected, batches[:2], of_two)
    activation = 4 * 16 * 64 * 4  # Bytes of the largest one, of a batch of four.
    live = live_bytes(model, batches[0], last_reads(model))
    assert 2 * activation <= live < 3 * activation
    monkeypatch.setattr("zeropoint.algorithms.correct_biases.LIVE_BYTES", 2 * live)
    assert correct_biases(actual, batches, whole) == changed
    assert changed.changed
    assert changed.samples == 8
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, actual.state_dict()[name])


def test_a_convolution_without_a_batch_has_one_sample():
    torch.manual_seed(0)
    batches = [(torch.rand(3, 10, 10),) for _ in range(8)]
    graph = torch.export.export(nn.Sequential(nn.Conv2d(3, 16, 3)).eval(), batches[0]).module()
    by = quantizers.weight(quant_min=-2, quant_max=2)
    quantizer = quantizers.ByHand(lambda model: quantizers.static(model, weight_spec=by))
    prepared = zp.prepare_pt2e(copy.deepcopy(graph), quantizer)
    for batch in batches:
        prepared(*batch)
    converted = zp.convert_pt2e(prepared)
    reference = channel_means(graph, batches)
    assert reference["conv2d"].shape == (8, 16)
    torch.testing.assert_close(reference["conv2d"][3], graph(*batches[3]).mean((1, 2)))
    before = shifts(reference, converted, batches)["conv2d"]
    correction = correct_biases(converted, batches, reference)
    assert (correction.changed, correction.samples) == (("conv2d",), 8)
    assert shifts(reference, converted, batches)["conv2d"] < 0.5 * before
