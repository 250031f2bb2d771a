"""Batch norm in every spelling becomes the one that export writes."""

import models
import pytest
import torch
from test_fold_batch_norm import X, by_hand, with_shapes, with_values
from torch import nn

from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.passes.finish import finish
from zeropoint.passes.spell_batch_norm import spell_batch_norm

aten = torch.ops.aten


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


SPELLINGS = [
    (aten._native_batch_norm_legit_no_training.default, {}, False),
    (aten._batch_norm_no_update.default, {}, False),
    (aten._native_batch_norm_legit.default, {"training": False}, False),
    (aten._native_batch_norm_legit.default, {"training": True}, True),
    (aten.native_batch_norm.default, {"training": True}, True),
    (aten._native_batch_norm_legit_functional.default, {"training": False}, False),
]


@pytest.mark.parametrize(("target", "settings", "training"), SPELLINGS, ids=str)
def test_values_are_the_same(target, settings, training):
    model = with_values(by_hand(target, **settings), X)
    (expected,) = model(X)
    spell_batch_norm(model)
    (norm,) = norms(model)
    assert norm.target is aten.batch_norm.default
    assert norm.args[5] is training
    assert torch.allclose(finish(model)(X)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "settings", "training"),
    [
        (aten.cudnn_batch_norm.default, {"training": True}, True),
        (aten.miopen_batch_norm.default, {"training": False}, False),
        (aten._batch_norm_with_update.default, {}, True),
    ],
    ids=str,
)
def test_operators_of_other_devices(target, settings, training):
    model = with_shapes(by_hand(target, **settings))
    spell_batch_norm(model)
    (norm,) = norms(model)
    assert norm.target is aten.batch_norm.default
    assert norm.args[5:8] == (training, 0.1, 0.3)


def test_without_statistics_each_batch_is_normalized():
    model = with_shapes(by_hand(aten._native_batch_norm_legit.no_stats, training=True, names=("weight", "bias")))
    spell_batch_norm(model)
    (norm,) = norms(model)
    assert norm.args[3:6] == (None, None, True)
    assert "no running statistics" in norm.meta[DECISION_KEY].refusal


def test_statistics_that_are_read_stay():
    model = with_values(by_hand(aten.native_batch_norm.default, take=(0, 1), training=True), X)
    spell_batch_norm(model)
    (norm,) = norms(model)
    assert norm.target is aten.native_batch_norm.default
    assert norm.meta[DECISION_KEY].refusal == "batch norm is not folded: its statistics are read too"


def test_new_statistics_that_go_elsewhere_stay():
    model = with_shapes(by_hand(aten._native_batch_norm_legit_functional.default, take=(0, 3), training=True))
    spell_batch_norm(model)
    assert norms(model)[0].target is aten._native_batch_norm_legit_functional.default


def test_the_functional_one_updates_its_statistics():
    torch.manual_seed(0)
    module = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4)).train()
    model = torch.export.export(module, (X,)).run_decompositions().module()
    assert models.count(model, "_native_batch_norm_legit_functional") == 2
    spell_batch_norm(model)
    model = finish(model)
    assert [norm.target for norm in norms(model)] == [aten.batch_norm.default] * 2
    assert torch.allclose(model(X), module(X), atol=1e-6)
    for name, buffer in module.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, atol=1e-6), name
