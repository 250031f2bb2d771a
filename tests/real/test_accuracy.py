"""Real networks through ``quantize`` and the real runtime: what the README promises of them."""

import pytest
import torch

import zeropoint as zp
from zeropoint.runtime.executorch import Program
from zoo import efficientnet_lite0, waifu2x


@pytest.fixture(scope="module")
def super_resolution():
    model, inputs = waifu2x.load(1)
    return model, zp.quantize(model, inputs, waifu2x.calibration(32, 1))


def test_waifu2x_loses_at_most_half_a_decibel(super_resolution):
    model, result = super_resolution
    program = Program(result.pte)
    lost = waifu2x.metric(model, batch=1) - waifu2x.metric(lambda x: program(x)[0].clone(), batch=1)
    assert lost <= 0.5


def test_waifu2x_runs_in_one_piece_with_integer_layers(super_resolution):
    _, result = super_resolution
    assert result.delegates == 1
    assert result.outside == ()
    floating = {row.operator for row in result.coverage if not row.is_quantized}
    assert floating == {"leaky_relu"}
    assert result.runtime_sqnr_db >= 40


@pytest.fixture(scope="module")
def classifier():
    model, inputs = efficientnet_lite0.load(1)
    return zp.quantize(model, inputs, efficientnet_lite0.calibration(80, 1))


def test_efficientnet_classifies_as_before(classifier):
    program = Program(classifier.pte)
    scores = efficientnet_lite0.metrics(lambda x: program(x)[0].clone(), batch=1)
    assert scores.top1 >= 0.8587 - 0.010
    assert scores.negative_log_likelihood <= 0.6401 + 0.05


def test_efficientnet_is_all_integer_and_equal_bit_for_bit(classifier):
    assert all(row.is_quantized for row in classifier.coverage)
    assert classifier.delegates == 1
    assert classifier.outside == ()
    program = Program(classifier.pte)
    views, _ = efficientnet_lite0.labelled_views()
    with torch.no_grad():
        for view in views[::97].split(1):
            assert torch.equal(program(view)[0], classifier.model(view))
