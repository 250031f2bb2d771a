"""Biases on the int32 grid of the backend."""

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.core.policy import BackendPolicy
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.bind import argument
from zeropoint.passes.round_biases import INT32
from zeropoint.report.record import record_of
from zeropoint.workflow import convert_pt2e, prepare_pt2e


class Rounding(quantizers.ByHand):
    policy = BackendPolicy("test", "float on the int32 grid")


def converted(module, *inputs, weight_spec=None):
    function = lambda model: quantizers.static(model, weight_spec=weight_spec)  # noqa: E731
    model = prepare_pt2e(models.export(module.eval(), *inputs), Rounding(function))
    model(*inputs)
    return convert_pt2e(model)


def scales_of(model, node, channels):
    """Returns ``s_x * s_w`` per output channel as float64, from the graph's own numbers."""
    x, w = argument(node, "input"), argument(node, "weight")
    s_w = w.args[1] if isinstance(w.args[1], float) else get_attribute(model, w.args[1].target)
    s_w = torch.as_tensor(s_w, dtype=torch.float32).expand(channels) if torch.as_tensor(s_w).numel() == 1 else s_w
    return (torch.tensor(x.args[1], dtype=torch.float32) * s_w).double()


def bias_of(model, node):
    return get_attribute(model, argument(node, "bias").target).detach()


@pytest.mark.parametrize("per_channel", [False, True])
def test_biases_are_multiples_of_the_product_of_scales(per_channel):
    module, inputs = models.linear()
    spec = None if per_channel else quantizers.activation(qscheme=torch.per_tensor_symmetric, quant_min=-127)
    model = converted(module, *inputs, weight_spec=spec)
    node = models.find(model, "linear")
    scale = scales_of(model, node, 3)
    steps = torch.round(module.bias.detach().double() / scale)
    assert torch.equal(bias_of(model, node), (steps * scale).float())
    (report,) = record_of(model).biases
    assert report.node == "linear"
    assert (report.to_zero, report.overflowed) == ((), ())
    assert report.largest_error == (bias_of(model, node) - module.bias).abs().max().item()
    assert 0 < report.largest_error <= scale.max().item() / 2 * 1.001


def test_channels_that_overflow_or_round_to_zero_are_reported():
    module, inputs = models.linear()
    with torch.no_grad():
        module.bias.copy_(torch.tensor([1e12, 0.0, 1e-12]))
    model = converted(module, *inputs)
    node = models.find(model, "linear")
    (report,) = record_of(model).biases
    assert report.overflowed == (0,)
    assert report.to_zero == (2,)
    clipped = (INT32.max * scales_of(model, node, 3)[0]).float()
    assert bias_of(model, node)[0] == clipped
    assert bias_of(model, node)[1:].tolist() == [0, 0]
    assert report.largest_error == pytest.approx(1e-12)


def test_a_bias_of_two_layers_becomes_one_for_each():
    module, inputs = models.branches()
    module.b.bias = module.c.bias
    model = converted(module, *inputs)
    nodes = [models.find(model, "linear", i) for i in range(3)]
    assert len({argument(node, "bias").target for node in nodes}) == 3
    for node in nodes:
        steps = bias_of(model, node).double() / scales_of(model, node, 4)
        assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_one_layer_called_twice_has_a_bias_for_each_call():
    module, inputs = models.called_twice()
    model = converted(module, *inputs)
    first, second = (models.find(model, "linear", i) for i in (0, 1))
    assert argument(first, "bias") is not argument(second, "bias")
    assert not torch.equal(bias_of(model, first), bias_of(model, second))


def test_the_users_bias_is_not_changed():
    module, inputs = models.linear()
    before = module.bias.detach().clone()
    converted(module, *inputs)
    assert torch.equal(module.bias, before)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model = converted(module, torch.randn(1, 4, 3, 3))
    node = models.find(model, "conv_transpose2d")
    scales = get_attribute(model, argument(node, "weight").args[1].target)
    assert scales.shape == (6 // groups,)
    grid = torch.tensor(argument(node, "input").args[1]) * scales.repeat(groups)
    steps = bias_of(model, node).double() / grid.double()
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_grouped_convolutions():
    torch.manual_seed(0)
    model = converted(nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 3, 3))
    node = models.find(model, "conv2d")
    steps = bias_of(model, node).double() / scales_of(model, node, 6)
    assert torch.allclose(steps, steps.round(), atol=1e-3)


@pytest.mark.parametrize(
    ("module", "shape", "axis"), [(nn.Linear(4, 3), (2, 4), 1), (nn.ConvTranspose2d(4, 3, 1), (1, 4, 2, 2), 0)]
)
def test_weights_with_scales_along_the_inputs_have_no_grid(module, shape, axis):
    torch.manual_seed(0)
    before = module.bias.detach().clone()
    model = converted(module, torch.randn(shape), weight_spec=quantizers.weight(ch_axis=axis))
    node = models.find(model, "linear" if axis else "conv_transpose2d")
    assert torch.equal(bias_of(model, node), before)
    assert not record_of(model).biases


def test_layers_without_bias_or_without_integers():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model = models.export(module, torch.randn(2, 4))
    act = quantizers.activation()
    quantizer = Rounding(lambda m: quantizers.annotate(models.find(m, "linear", 1), {"input": act}))
    prepared = prepare_pt2e(model, quantizer)
    prepared(torch.randn(2, 4))
    converted_model = convert_pt2e(prepared)
    assert not record_of(converted_model).biases
    assert torch.equal(converted_model.get_parameter("1.bias"), module[1].bias)


def test_other_backends_keep_their_biases():
    module, inputs = models.linear()
    model = prepare_pt2e(models.export(module, *inputs), quantizers.STATIC)
    model(*inputs)
    model = convert_pt2e(model)
    assert torch.equal(model.bias, module.bias)
    assert record_of(model).policy is None


def test_the_bias_node_keeps_its_metadata():
    module, inputs = models.linear()
    model = converted(module, *inputs)
    node = argument(models.find(model, "linear"), "bias")
    assert node.meta["val"].shape == (3,)
