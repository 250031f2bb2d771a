"""Histograms of what is quantized, against numpy; weights by channel, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import Applied, export
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.numerics.granularity import PerAxis, PerGroup
from zeropoint.numerics.quantized_tensor import QuantizedTensor
from zeropoint.report.page.ranges import INSIDE, MOST_CHANNELS, OUTSIDE, activation_ranges, weight_channels

INT8 = get_symmetric_quantization_config(is_per_channel=True)


@torch.no_grad()
def converted(module: nn.Module, *batches: tuple):
    prepared = zp.prepare_pt2e(export(module.eval(), *batches[0]), XNNPACKQuantizer().set_global(INT8))
    for inputs in batches:
        prepared(*inputs)
    return zp.convert_pt2e(prepared)


def test_counts_as_numpy_does():
    torch.manual_seed(0)
    model = converted(nn.Linear(4, 3), (torch.randn(50, 4),))
    batches = [(torch.randn(50, 4) * factor,) for factor in (1, 2, 9)]
    first, second = activation_ranges(model, batches)
    values = torch.cat([x for (x,) in batches]).double().flatten().numpy()
    assert (first.site, first.operator, first.total) == ("input_1", "input", 600)
    assert (first.least, first.most) == (values.min(), values.max())
    integers = np.round(values / first.scale) + first.zero_point
    assert first.clipped == ((integers < -128) | (integers > 127)).sum() > 0
    edges = first.start + first.step * np.arange(len(first.counts) + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    assert first.counts.tolist() == np.histogram(values, edges)[0].tolist()
    assert first.counts[:OUTSIDE].sum() + first.counts[-OUTSIDE:].sum() == first.clipped
    assert len(first.counts) == INSIDE + 2 * OUTSIDE
    assert (second.site, second.operator, second.total) == ("linear", "linear", 450)


def test_inputs_in_dictionaries_and_infinite_values():
    module = Applied(lambda m, given, y: m.layer(given["x"]) + y, layer=nn.Linear(3, 2))
    inputs = ({"x": torch.randn(4, 3)}, torch.randn(4, 2))
    model = converted(module, inputs)
    found = activation_ranges(model, [({"x": torch.tensor([[float("inf"), float("nan"), 1.0]] * 4)}, inputs[1])])
    assert found[0].total == 8
    assert found[0].clipped == 4
    assert found[0].counts[-1] == 4


def test_nothing_is_counted_without_batches():
    assert activation_ranges(converted(nn.Linear(4, 3), (torch.randn(5, 4),)), []) == []


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_of_a_weight(axis):
    weight = torch.randn(6, 5, 3)
    found = weight_channels("w", QuantizedTensor.quantize(weight, granularity=PerAxis(axis), quant_min=-127))
    rows = weight.movedim(axis, 0).flatten(1)
    step = rows.abs().amax(1) / 127
    torch.testing.assert_close(torch.tensor(found.reach), rows.abs().amax(1), rtol=1e-5, atol=0)
    assert ((torch.tensor(found.low) - rows.amin(1)).abs() <= step).all()
    assert ((torch.tensor(found.high) - rows.amax(1)).abs() <= step).all()
    assert (found.shape, found.channels) == ((6, 5, 3), tuple(range(weight.shape[axis])))


def test_weights_of_one_scale_and_of_groups():
    weight = torch.randn(6, 8)
    one = weight_channels("w", QuantizedTensor.quantize(weight, quant_min=-127))
    assert one.reach == pytest.approx([float(weight.abs().max())] * 6, rel=1e-5)
    groups = weight_channels("w", QuantizedTensor.quantize(weight, granularity=PerGroup(4), quant_min=-127))
    assert groups.reach == pytest.approx(weight.abs().amax(1).tolist(), rel=1e-5)


def test_very_many_channels_are_thinned_out():
    found = weight_channels("w", QuantizedTensor.quantize(torch.randn(5000, 2), granularity=PerAxis(0)))
    assert MOST_CHANNELS / 2 < len(found.channels) <= MOST_CHANNELS
    assert len(found.low) == len(found.reach) == len(found.channels)
