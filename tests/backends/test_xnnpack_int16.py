"""Activations of 16 bits with weights of 8: every row of the table in q/dq form and in integers; no file of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests import models
from tests.backends.examples import EXAMPLES, Branch, Branches, inputs_of
from tests.models import Applied, export
from zeropoint import QuantizationConfig, QuantizationSpec, convert_pt2e, prepare_pt2e, prepare_qat_pt2e, quantize
from zeropoint.backends.xnnpack import XNNPACKQuantizer, check_prepared, get_symmetric_quantization_config, lower
from zeropoint.core.errors import LoweringError
from zeropoint.graph.layers import LAYERS
from zeropoint.numerics import ops
from zeropoint.numerics.fake_quantize import FusedMovingAvgObsFakeQuantize
from zeropoint.numerics.observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.record import record_of

INT8 = get_symmetric_quantization_config()
WIDE = {"dtype": torch.int16, "quant_min": -32768, "quant_max": 32767}
SCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric)
FLOOR_DB = 60
Case = tuple[nn.Module, GraphModule, list[tuple[torch.Tensor, ...]]]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
    "ignore:The tensor attribute:UserWarning",
)


def int16(scheme: torch.qscheme, observer=MinMaxObserver, **base) -> QuantizationConfig:
    activation = QuantizationSpec(observer_or_fake_quant_ctr=observer, qscheme=scheme, **WIDE)
    config = get_symmetric_quantization_config(**base)
    return replace(config, input_activation=activation, output_activation=activation)


def as_stored(module: nn.Module) -> nn.Module:
    """Returns the module with weights that are multiples of a scale, of 127 steps: quantizing leaves them."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            layer.weight.data = on_127_steps(layer.weight.data)
    for name, buffer in module.named_buffers():
        if "constant" in name:
            buffer.data = on_127_steps(buffer)
    return module.eval()


def per_channel_on_127_steps(module: nn.Sequential) -> nn.Module:
    for layer in module:
        if hasattr(layer, "weight"):
            layer.weight.data = torch.stack([on_127_steps(channel) for channel in layer.weight.data])
    return module.eval()


def on_127_steps(value: torch.Tensor) -> torch.Tensor:
    scale = value.abs().max() / 127
    return (value / scale).round() * scale


def prepared_as(config: QuantizationConfig, module: nn.Module, batches: list[tuple[torch.Tensor, ...]]) -> GraphModule:
    prepared = prepare_pt2e(export(module, *batches[0]), XNNPACKQuantizer().set_global(config))
    for inputs in batches:
        prepared(*inputs)
    return prepared


def outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = model(*inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture(scope="module", params=SCHEMES, ids=str)
def every_row(
    request: pytest.FixtureRequest,
) -> Case:
    torch.manual_seed(0)
    module, batches = as_stored(Branches(EXAMPLES)), [inputs_of(EXAMPLES) for _ in range(3)]
    with torch.no_grad():
        prepared = prepared_as(int16(request.param), module, batches)
    return module, prepared, batches


@torch.no_grad()
def test_every_row_is_quantized_to_16_bits_and_loses_next_to_nothing(every_row):
    module, prepared, batches = every_row
    converted = convert_pt2e(copy.deepcopy(prepared))
    for inputs in batches:
        pairs = zip(EXAMPLES, outputs(module, inputs), outputs(converted, inputs), strict=True)
        lost = {str(example): sqnr_db(expected, actual) for example, expected, actual in pairs}
        assert {name: db for name, db in lost.items() if db < FLOOR_DB} == {}
    activations = [n for n in converted.graph.nodes if n.target is ops.QUANTIZE_PER_TENSOR]
    assert {n.args[5] for n in activations} == {torch.int16}


@torch.no_grad()
def test_what_is_integer_with_8_bits_is_so_with_16(every_row):
    module, prepared, batches = every_row
    narrow = record_of(prepared_as(INT8, module, batches[:1])).coverage
    assert record_of(prepared).coverage == narrow


@torch.no_grad()
def test_the_reference_computes_every_row_in_integers(every_row):
    _, prepared, batches = every_row
    converted = convert_pt2e(copy.deepcopy(prepared))
    reference = convert_pt2e(copy.deepcopy(prepared), use_reference_representation=True)
    assert not [n for n in reference.graph.nodes if n.target in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS, *LAYERS)]
    for inputs in batches:
        for expected, actual in zip(outputs(converted, inputs), outputs(reference, inputs), strict=True):
            assert sqnr_db(expected, actual) > 85


SMALL = (torch.rand(4, 8) * 0.1,)


@torch.no_grad()
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver])
def test_net_with_scales_per_channel(observer: type):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6(), nn.Conv2d(16, 8, 1)
    module = per_channel_on_127_steps(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 10)))
    batches = [(torch.randn(4, 3, 8, 8),) for _ in range(4)]
    config = int16(torch.per_tensor_affine, observer, is_per_channel=True)
    converted = convert_pt2e(prepared_as(config, module, batches))
    assert min(sqnr_db(module(*inputs), converted(*inputs)) for inputs in batches) > 60


@torch.no_grad()
def test_biases_have_64_bits_where_32_are_not_enough():
    layer = nn.Linear(8, 4)
    layer.weight.data *= 0.01
    layer.bias.data += 100
    converted = convert_pt2e(prepared_as(int16(torch.per_tensor_symmetric), as_stored(layer), [SMALL]))
    (bias,) = record_of(converted).biases
    assert bias.overflowed == ()
    assert sqnr_db(layer(*SMALL), converted(*SMALL)) > 90


def test_training():
    module, inputs = models.net()
    fake = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
    config = int16(torch.per_tensor_affine, fake, is_per_channel=True, is_qat=True)
    graph = torch.export.export(module.train(), inputs).module()
    prepared = prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))
    for _ in range(3):
        prepared(*inputs).square().mean().backward()
    with torch.no_grad():
        expected = prepared.eval()(*inputs)
        assert sqnr_db(expected, convert_pt2e(prepared)(*inputs)) > 60


@torch.no_grad()
def test_recurrent_layers():
    module = Applied(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(4, 6, batch_first=True)).eval()
    inputs = (torch.randn(2, 3, 4),)
    prepared = prepared_as(int16(torch.per_tensor_affine), module, [inputs])
    converted = convert_pt2e(copy.deepcopy(prepared))
    assert sqnr_db(module(*inputs), converted(*inputs)) > 40  # That is of its weights, which have 8 bits.
    reference = convert_pt2e(prepared, use_reference_representation=True)
    assert sqnr_db(converted(*inputs), reference(*inputs)) > 85


# XNNPACK has no kernels for it.


@torch.no_grad()
def test_lower_names_what_is_of_16_bits():
    module, inputs = models.conv_relu()
    converted = convert_pt2e(prepared_as(int16(torch.per_tensor_affine), module, [inputs]))
    words = (
        r"it quantizes to torch\.int16 in \[-32768, 32767\] what relu .*returns\. The delegate has int8 kernels only"
    )
    with pytest.raises(LoweringError, match=words):
        lower(converted, inputs)


def test_quantize_refuses_before_it_calibrates():
    module, inputs = models.conv_relu()
    shown: list[str] = []

    class Watched(MinMaxObserver):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shown.append("data")
            return super().forward(x)

    quantizer = XNNPACKQuantizer().set_global(int16(torch.per_tensor_affine, Watched))
    words = r"conv2d \(conv2d\) \[0\]: it reads torch\.int16 in \[-32768, 32767\]\. The delegate has int8 kernels only"
    with pytest.raises(LoweringError, match=words):
        quantize(module, inputs, [inputs], quantizer=quantizer)
    assert shown == []


@torch.no_grad()
def test_weights_of_16_bits_are_refused_before_calibration():
    module, inputs = models.conv_relu()
    weight = replace(INT8.weight, dtype=torch.int16, quant_min=-32767, quant_max=32767)
    prepared = prepare_pt2e(export(module, *inputs), XNNPACKQuantizer().set_global(replace(INT8, weight=weight)))
    with pytest.raises(LoweringError, match=r"conv2d .*its weight is torch\.int16\. Quantize weights to int8"):
        check_prepared(prepared)


def test_what_is_of_8_bits_passes():
    torch.manual_seed(0)
    module = Branch(EXAMPLES[0])
    for config in (INT8, get_symmetric_quantization_config(is_dynamic=True, is_per_channel=True)):
        check_prepared(prepare_pt2e(export(module, *inputs_of(EXAMPLES[:1])), XNNPACKQuantizer().set_global(config)))
