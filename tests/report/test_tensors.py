"""The tensors of a converted model, as values."""

import models
import pytest
import quantizers
import torch
from quantizers import annotate

import zeropoint as zp
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics.granularity import PerAxis, PerGroup, PerTensor
from zeropoint.numerics.observers import MinMaxObserver, PerChannelMinMaxObserver, PerGroupMinMaxObserver
from zeropoint.report.tensors import quantized_tensors
from zeropoint.workflow import convert_pt2e, prepare_pt2e


@pytest.mark.parametrize(
    ("observer", "scheme", "granularity", "shape"),
    [
        (MinMaxObserver, torch.per_tensor_symmetric, PerTensor(), ()),
        (PerChannelMinMaxObserver, torch.per_channel_symmetric, PerAxis(0), (3,)),
        (PerGroupMinMaxObserver.with_args(group_size=2), torch.per_channel_symmetric, PerGroup(2), (3, 2)),
        (PerGroupMinMaxObserver.with_args(group_size=4), torch.per_channel_affine, PerGroup(4), (3, 1)),
    ],
    ids=str,
)
def test_stored_integers_have_the_granularity_of_their_observer(observer, scheme, granularity, shape):
    module, _ = models.linear()
    spec = QuantizationSpec(torch.int8, observer, -8, 7, scheme)
    prepared = prepare_pt2e(
        models.exported(models.linear),
        quantizers.ByHand(lambda model: annotate(models.find(model, "linear"), {"weight": spec})),
    )
    model = convert_pt2e(prepared)
    found = quantized_tensors(model)
    assert list(found) == ["weight"]
    weight = found["weight"]
    assert (weight.granularity, weight.scale.shape, weight.dtype) == (granularity, shape, torch.int8)
    assert (weight.quant_min, weight.quant_max, weight.is_packed) == (-8, 7, True)
    assert torch.equal(weight.int_repr(), model._frozen_param0)
    assert (weight.dequantize() - module.weight).abs().max() <= weight.scale.max() * 1.01


def test_tables_with_zero_points_between_integers_are_left_out():
    module, tokens = torch.nn.Embedding(10, 4), torch.randint(0, 10, (2, 3))
    program = torch.export.export(module.eval(), (tokens,))
    prepared = zp.prepare_pt2e(program.module(), zp.EmbeddingQuantizer())
    prepared(tokens)
    assert quantized_tensors(zp.convert_pt2e(prepared)) == {}
