"""Prepared by one package and converted by the other: the right model, or words."""

import copy

import models
import pytest
import qat_quantizers
import quantizers
import torch
from test_parity import CONFIGURATIONS, THEIRS, quantize_pt2e
from torch import nn

from zeropoint.core.errors import GraphError
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    models.randomize_norms(module)
    x = torch.randn(2, 3, 6, 6)
    return models.export(module.eval(), x), x


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda function: function.__name__)
def test_what_torchao_prepared_is_converted_as_torchao_does(exported, configuration):
    model, x = exported
    prepared = quantize_pt2e.prepare_pt2e(copy.deepcopy(model), quantizers.ByHand(configuration))
    prepared(x)
    prepared(x * 2)
    copied = copy.deepcopy(prepared)
    theirs, ours = quantize_pt2e.convert_pt2e(prepared), convert_pt2e(copied)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    operators = [sorted(str(n.target) for n in each.graph.nodes if n.op == "call_function") for each in (ours, theirs)]
    assert operators[0] == operators[1]


def test_torchao_refuses_in_our_words_what_was_prepared_here(exported):
    model, x = exported
    prepared = copy.deepcopy(prepare_pt2e(copy.deepcopy(model), quantizers.ByHand(CONFIGURATIONS[0])))
    prepared(x)
    with pytest.raises(GraphError, match=r"prepared by zeropoint.*Convert it with zeropoint\.convert_pt2e"):
        quantize_pt2e.convert_pt2e(copy.deepcopy(prepared))
    assert torch.isfinite(convert_pt2e(prepared)(x)).all()


def trained_mode(*layers):
    x = torch.randn(4, 3, 6, 6)
    return torch.export.export(nn.Sequential(*layers).train(), (x,)).module(), x


def theirs_by_hand():
    return quantizers.ByHand(lambda model: qat_quantizers.qat(model, THEIRS))


def test_training_by_torchao_without_batch_norm_ends_here():
    model, x = trained_mode(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5))
    prepared = quantize_pt2e.prepare_qat_pt2e(model, theirs_by_hand())
    prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), converted(x))


def test_training_by_torchao_with_batch_norm_is_refused():
    model, x = trained_mode(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prepared = quantize_pt2e.prepare_qat_pt2e(model, theirs_by_hand())
    prepared(x)
    with pytest.raises(GraphError, match=r"batch_norm.* is not folded.*with torchao's convert_pt2e"):
        convert_pt2e(prepared)


def test_training_here_is_refused_by_torchao():
    model, x = trained_mode(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prepared = prepare_qat_pt2e(model, quantizers.ByHand(qat_quantizers.qat))
    prepared(x)
    with pytest.raises(GraphError, match="prepared by zeropoint"):
        quantize_pt2e.convert_pt2e(prepared)
