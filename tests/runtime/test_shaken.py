"""How far a model's own outputs move with the last bits of its values, and what that allows a file."""

import math

import models
import pytest
import torch
from torch import nn

from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.agreement import Agreement, agreements
from zeropoint.runtime.shaken import shaken


class Steps(nn.Module):
    """Values on the boundary of two steps of a coarse grid: the last bit decides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        arguments = (0.25, 0, -128, 127, torch.int8)
        return ops.DEQUANTIZE_PER_TENSOR(ops.QUANTIZE_PER_TENSOR(x * 0.125, *arguments), *arguments)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x + self.seen


ON_THE_BOUNDARY = torch.arange(-20.0, 20.0) * 2 + 1


def test_a_smooth_model_agrees_with_itself():
    module, inputs = models.mlp()
    exported = models.export(module, *inputs)
    for run in shaken(exported, inputs):
        assert sqnr_db(exported(*inputs), run[0]) > 100


def test_values_between_two_steps_move():
    exported = models.export(Steps(), ON_THE_BOUNDARY)
    runs = shaken(exported, (ON_THE_BOUNDARY,))
    assert all(10 < sqnr_db(exported(ON_THE_BOUNDARY), run[0]) < 40 for run in runs)
    assert not torch.equal(runs[0][0], runs[1][0])


def test_a_model_that_writes_to_buffers_is_not_run_again():
    exported = models.export(Counter(), torch.ones(2))
    assert shaken(exported, (torch.ones(2),)) == []
    assert float(exported.seen) == 0


@pytest.mark.parametrize(
    ("sqnr", "own", "right"),
    [(31, math.inf, True), (29, math.inf, False), (29, 31, True), (27, 31, False), (15, 12, True), (14, 12, False)],
)
def test_a_file_may_differ_as_the_model_does_from_itself(sqnr, own, right):
    assert Agreement(sqnr, shaken_db=own).is_right is right


def test_a_wrong_file_of_a_smooth_model_is_wrong():
    module, inputs = models.mlp()
    exported = models.export(module, *inputs)
    right = exported(*inputs)
    (found,) = agreements(exported, inputs, (right + 0.1 * right.norm() / right.numel() ** 0.5,))
    assert 15 < found.sqnr_db < 30
    assert found.shaken_db > 100
    assert not found.is_right
