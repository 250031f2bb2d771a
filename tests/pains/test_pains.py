"""What users ask of a quantization tool, each as what a user does and what comes out: one section per wish."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import zeropoint as zp
from tests.models import Applied
from zeropoint import QuantizationConfig, QuantizationSpec
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.core.errors import GraphError, LoweringError
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db

INT8 = get_symmetric_quantization_config(is_per_channel=True)
Inputs = tuple[Any, ...]


def calibrated(
    model: nn.Module, batches: list[Inputs], config: QuantizationConfig = INT8, **export: Any
) -> GraphModule:
    graph = torch.export.export(model.eval(), batches[0], **export).module()
    prepared = zp.prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for inputs in batches:
            prepared(*inputs)
    return prepared


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 10))


def pictures(count: int, batch: int = 4) -> list[Inputs]:
    torch.manual_seed(1)
    return [(torch.randn(batch, 3, 8, 8),) for _ in range(count)]


# 11. A prepared or converted model moves to another device, with all that export wrote into its graph.


def with_devices() -> nn.Module:
    return Applied(lambda m, x: m.layer(x) + torch.zeros(8).to("cpu") * torch.arange(8), layer=nn.Linear(8, 8))


def test_11_models_move_with_the_tensors_that_they_make():
    batches = [(torch.randn(4, 8),) for _ in range(3)]
    prepared = calibrated(with_devices(), batches)
    on_meta = copy.deepcopy(prepared).to("meta")  # It stands for any other device.
    assert {tensor.device.type for tensor in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}
    moved = zp.convert_pt2e(prepared).to("meta")
    assert moved(batches[0][0].to("meta")).device.type == "meta"


def test_11_what_cannot_be_moved_says_so_at_once():
    converted = zp.convert_pt2e(calibrated(with_devices(), [(torch.randn(4, 8),)]))
    with pytest.raises(GraphError, match=r"the graph is quantized.*torch\.float16 before it is exported"):
        converted.half()


# 17. int16 activations: they are what was asked for, or an error says that they cannot be.

WIDE = QuantizationSpec(torch.int16, MinMaxObserver, -32768, 32767, torch.per_tensor_symmetric)
INT16 = replace(INT8, input_activation=WIDE, output_activation=WIDE)


@torch.no_grad()
def test_17_activations_of_16_bits_are_nearer_to_float():
    net, batches = conv_net(), pictures(4)
    narrow, wide = (zp.convert_pt2e(calibrated(net, batches, config)) for config in (INT8, INT16))
    lost = [sqnr_db(net(*batches[0]), model(*batches[0])) for model in (narrow, wide)]
    assert lost[1] > lost[0] + 5  # What is left is of the weights.
    integers = [n.meta["val"].dtype for n in wide.graph.nodes if "quantize_per_tensor" in n.name and n.name[0] == "q"]
    assert set(integers) == {torch.int16}


def test_17_a_file_for_xnnpack_is_refused_in_words():
    net, batches = conv_net(), pictures(2)
    words = r"(?s)relu \(relu\) \[2\].* torch\.int16 in \[-32768, 32767\].*The delegate has int8 kernels only"
    with pytest.raises(LoweringError, match=words):
        zp.quantize(net, batches[0], batches, quantizer=XNNPACKQuantizer().set_global(INT16))
    with pytest.raises(LoweringError, match=words):
        lower(zp.convert_pt2e(calibrated(net, batches, INT16)), batches[0])
