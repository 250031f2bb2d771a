"""What of a model comes into the file, and how."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropoint as zp
from tests.models import Applied
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower_float, lower_program
from zeropoint.runtime.child import run_in_child


class Counting(nn.Module):
    """Writes to two buffers at every call; one begins above 0, and is in no ``state_dict``."""

    def __init__(self):
        super().__init__()
        self.register_buffer("from_zero", torch.zeros(1, 4))
        self.register_buffer("from_five", torch.full((1, 4), 5.0), persistent=False)

    def forward(self, x):
        self.from_zero.add_(2)
        self.from_five.add_(x)
        return x * self.from_zero + self.from_five


@torch.no_grad()
def test_written_buffers_begin_as_they_are():
    model, inputs = Counting(), (torch.randn(1, 4),)
    pte = lower_float(model, inputs).pte
    assert not model.from_zero.any()
    for (actual,) in run_in_child(pte, [inputs, inputs, inputs]):
        torch.testing.assert_close(actual, model(*inputs))


def one(kind, *sizes):
    return Applied(lambda m, x: m.layer(F.relu(m.layer(x))), layer=kind(*sizes))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (one(nn.Conv1d, 4, 4, 3), (2, 4, 9)),
        (one(nn.ConvTranspose1d, 4, 4, 3), (2, 4, 9)),
        (nn.Sequential(nn.Conv1d(4, 4, 3), nn.PReLU(4), nn.Conv1d(4, 4, 1)), (2, 4, 9)),
        (Applied(lambda m, x: torch.cat(m.layer(x).split([2, 4], 1)[::-1], 1), layer=nn.Conv2d(4, 6, 1)), (2, 4, 5, 5)),
        (Applied(lambda m, x: m.layer(torch.add(*x.relu().chunk(2, -1))), layer=nn.Conv2d(4, 6, 1)), (2, 4, 5, 6)),
    ],
    ids=["conv1d twice", "conv_transpose1d twice", "prelu of one dimension", "split", "chunk of floats"],
)
@torch.no_grad()
def test_one_piece_equal_to_the_converted_model(module, shape):
    torch.manual_seed(0)
    data = [(torch.randn(shape),) for _ in range(4)]
    result = zp.quantize(module.eval(), data[0], data, verify=False)
    assert (result.delegates, result.outside) == (1, ())
    ((actual,),) = run_in_child(result.pte, data[:1])
    torch.testing.assert_close(actual, result.model(*data[0]))


@pytest.mark.parametrize("is_per_channel", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(64, 48), (5, 64)), (nn.Linear(64, 48, bias=False), (2, 5, 64)), (nn.Linear(64, 48), (64,))],
    ids=["rows", "sequences without bias", "one row"],
)
@torch.no_grad()
def test_linear_layers_of_quantized_weights_and_float_inputs(layer, shape, is_per_channel):
    config = replace(get_symmetric_quantization_config(is_per_channel), input_activation=None, output_activation=None)
    module, inputs = nn.Sequential(layer, nn.Tanh()), (torch.randn(shape),)
    model = torch.export.export(module, inputs).module()
    converted = zp.convert_pt2e(zp.prepare_pt2e(model, XNNPACKQuantizer().set_global(config)))
    lowered = lower_program(converted, inputs)
    assert lowered.delegates == 1
    assert len(lowered.pte) < len(lower_float(module, inputs).pte) - 2.5 * 64 * 48  # Of 4 bytes for each weight.
    ((actual,),) = run_in_child(lowered.pte, [inputs])
    torch.testing.assert_close(actual, converted(*inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_free_batch_of_float_inputs_to_quantized_weights():
    config = replace(get_symmetric_quantization_config(True), input_activation=None, output_activation=None)
    batch = {"input": {0: torch.export.Dim("batch", max=8)}}
    model = torch.export.export(nn.Linear(16, 8), (torch.randn(4, 3, 16),), dynamic_shapes=batch).module()
    converted = zp.convert_pt2e(zp.prepare_pt2e(model, XNNPACKQuantizer().set_global(config)))
    pte = lower_program(converted, (torch.randn(4, 3, 16),)).pte
    for size in (1, 8):
        inputs = (torch.randn(size, 3, 16),)
        ((actual,),) = run_in_child(pte, [inputs])
        torch.testing.assert_close(actual, converted(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_per_channel", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 6, 6)),
        (nn.Conv2d(4, 6, 1), (2, 4, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
        (nn.Conv1d(4, 6, 3), (2, 4, 6)),
        (nn.ConvTranspose2d(4, 6, 3, 2), (2, 4, 5, 5)),
        (nn.Linear(4, 6), (2, 4)),
    ],
)
def test_layers_of_4_bit_weights(layer, shape, is_per_channel):
    """Those of convolutions are stored as 8 bits: the delegate has 4-bit kernels for linear layers only."""
    config = get_symmetric_quantization_config(is_per_channel=is_per_channel, weight_qmin=-8, weight_qmax=7)
    x = torch.randn(shape)
    prepared = zp.prepare_pt2e(torch.export.export(layer.eval(), (x,)).module(), XNNPACKQuantizer().set_global(config))
    prepared(x)
    model = zp.convert_pt2e(prepared)
    lowered = lower_program(model, (x,))
    assert lowered.outside == ()
    ((actual,),) = run_in_child(lowered.pte, [(x,)])
    expected = model(x)
    step = (expected.max() - expected.min()) / 255
    assert len(expected.unique()) > 4
    assert (actual - expected).abs().max() <= step * 1.1


@torch.no_grad()
def test_float_batch_norms_of_modules_that_are_named_by_numbers():
    """ExecuTorch folds them, and then looks for parameters by names that begin with a digit."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))
    model(torch.randn(8, 3, 6, 6) * 3 + 1)
    inputs = (torch.randn(1, 3, 6, 6),)
    lowered = lower_float(model.eval(), inputs)
    torch.testing.assert_close(run_in_child(lowered.pte, [inputs])[0][0], model(*inputs), rtol=1e-4, atol=1e-4)
    assert (lowered.delegates, lowered.outside) == (1, ())
