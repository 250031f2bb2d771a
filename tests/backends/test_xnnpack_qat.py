"""Training for the XNNPACK delegate: from an exported network to a file that computes what was trained."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import models
import pytest
import torch
from torch import nn

from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.numerics.fake_quantize import disable_observer
from zeropoint.passes.end_training import to_eval
from zeropoint.passes.qat_batch_norm import groups_in
from zeropoint.report.record import record_of
from zeropoint.runtime.executorch import Program
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

QAT = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)


def quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(QAT)


def separable(i: int, o: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU6(),
        nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU6(),
    )  # fmt: skip


def mobile_net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [separable(8, 16, 2), separable(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), *blocks, *head)


def train(model: nn.Module, sizes: tuple[int, ...], steps: int = 3) -> list[float]:
    """A plain loop; the labels are given by the pictures."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses: list[float] = []
    for step in range(steps):
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_mobile_network_from_export_to_the_runtime():
    x = torch.randn(16, 1, 28, 28)
    exported = torch.export.export(mobile_net().train(), (x,)).module()
    start = time.perf_counter()
    prepared = prepare_qat_pt2e(exported, quantizer())
    assert time.perf_counter() - start < 1
    assert len(groups_in(prepared.graph)) == 5
    assert not [row for row in record_of(prepared).coverage if not row.is_quantized and row.operator != "dropout"]
    losses = train(prepared, (16, 1, 28, 28))
    assert losses[-1] < losses[0]
    prepared.apply(disable_observer)
    evaluated = copy.deepcopy(prepared)
    to_eval(evaluated)
    evaluated.recompile()
    start = time.perf_counter()
    converted = convert_pt2e(prepared)
    assert time.perf_counter() - start < 1
    left = {node.target for node in converted.graph.nodes if node.target in BATCH_NORMS}
    assert not left
    with torch.no_grad():
        expected, result = evaluated(x), converted(x)
    scale = models.find(converted, "output").args[0][0].args[1]
    assert (expected - result).abs().max() <= scale * 1.001
    (found,) = Program(lower(converted, (x,)))(x)
    assert (found - result).abs().max() <= scale * 1.001
    assert (found != result).float().mean() < 0.01


def exported(module: nn.Module, *sizes: int) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    models.randomize_norms(module)
    return torch.export.export(module.train(), (torch.randn(sizes),)).module()


def blocks(activation: nn.Module | None = None) -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *([activation] if activation else []), nn.Conv2d(4, 2, 1)]


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True), nn.Hardtanh(-1, 1)])
def test_layer_batch_norm_and_clamp_are_one(activation):
    prepared = prepare_qat_pt2e(exported(nn.Sequential(*blocks(activation)), 2, 3, 6, 6), quantizer())
    norm = models.find(prepared, "batch_norm")
    last = norm if activation is None else next(iter(norm.users))
    assert norm.meta[DECISION_KEY].pattern == "conv"
    assert norm.meta[DECISION_KEY].nodes == (models.find(prepared, "conv2d"), norm, last)[: 2 + (last is not norm)]
    assert [user.op for user in last.users] == ["call_module"]
    assert all(row.is_quantized for row in record_of(prepared).coverage)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 7)),
        (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 6)),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
        (nn.Linear(3, 4), (8, 3)),
    ],
    ids=str,
)
def test_every_layer_of_the_table(layer, sizes):
    norm = nn.BatchNorm2d(4) if len(sizes) == 4 else nn.BatchNorm1d(4)
    prepared = prepare_qat_pt2e(exported(nn.Sequential(layer, norm, nn.ReLU()), *sizes), quantizer())
    (group,) = groups_in(prepared.graph)
    fake = prepared.get_submodule(argument(group["layer"], "weight").target)
    assert fake.ch_axis == int(isinstance(layer, nn.ConvTranspose2d))
    prepared(torch.randn(sizes))
    converted = convert_pt2e(prepared)
    assert argument(models.find(converted, models.name_of(group["layer"])), "weight").target in ops.DEQUANTIZE_OPS


def test_a_batch_norm_that_a_rule_leaves_out():
    module = nn.Sequential(*blocks(nn.ReLU()))
    prepared = prepare_qat_pt2e(exported(module, 2, 3, 6, 6), quantizer().set_module_name("1", None))
    assert not groups_in(prepared.graph)
    assert [user.op for user in models.find(prepared, "conv2d").users] == ["call_module"]


def test_a_batch_norm_that_cannot_be_folded():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    prepared = prepare_qat_pt2e(exported(module, 2, 3, 6, 6), quantizer())
    assert [user.op for user in models.find(prepared, "conv2d").users] == ["call_module"]
    (row,) = [row for row in record_of(prepared).coverage if row.operator == "batch_norm"]
    assert row.reason == "batch norm is not folded: it keeps no running statistics and normalizes by each batch"


def test_weights_alone():
    config = replace(QAT, input_activation=None, output_activation=None)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    prepared = prepare_qat_pt2e(exported(module, 2, 3, 6, 6), XNNPACKQuantizer().set_global(config))
    assert len(groups_in(prepared.graph)) == 1
    prepared(torch.randn(2, 3, 6, 6))
    assert not models.count(convert_pt2e(prepared), "batch_norm")


def test_the_quantizer_of_executorch():
    """It annotates as torchao's contract says; that takes it ten seconds."""
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    theirs = xnnpack.XNNPACKQuantizer().set_global(
        xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    )
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model, x = exported(module, 2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    results = []
    for each in (theirs, quantizer()):
        prepared = prepare_qat_pt2e(copy.deepcopy(model), each)
        assert len(groups_in(prepared.graph)) == 2
        prepared(x)
        converted = convert_pt2e(prepared)
        assert not models.count(converted, "batch_norm")
        results.append(converted(x))
    scale = models.find(converted, "output").args[0][0].args[1]
    assert (results[0] - results[1]).abs().max() <= scale * 1.001
