"""Sizes that are free, from the export to the file, which runs with other sizes than the example's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from tests.models import Applied
from zeropoint import convert_pt2e, prepare_pt2e
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower_program
from zeropoint.graph.inputs import free_sizes
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.child import run_in_child

DYNAMIC = torch.export.Dim.DYNAMIC
CONFIG = get_symmetric_quantization_config(is_per_channel=True)


def to_multiple(x: torch.Tensor, of: int = 16) -> torch.Tensor:
    """Returns x padded along its last axis."""
    return F.pad(x, (0, -x.shape[-1] % of, *[0, 0] * (x.dim() - 3)))


def conv(kind: type[nn.Module], function: Callable[..., object]) -> nn.Module:
    torch.manual_seed(0)
    return Applied(function, conv=kind(3, 4, 3), second=kind(4, 4, 3, padding=1)).eval()


LENGTH, SPACE = {2: DYNAMIC}, {2: DYNAMIC, 3: DYNAMIC}
SIGNALS = ((2, 3, 30), (2, 3, 17), (2, 3, 18), (2, 3, 60))
PICTURES = ((2, 3, 9, 10), (2, 3, 12, 30), (2, 3, 5, 34))
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], Any]] = {
    "padding to a multiple": (lambda: conv(nn.Conv1d, lambda m, x: to_multiple(m.conv(x))), SIGNALS, LENGTH),
    "between two layers": (lambda: conv(nn.Conv1d, lambda m, x: m.second(to_multiple(m.conv(x)))), SIGNALS, LENGTH),
    "before a layer": (lambda: conv(nn.Conv2d, lambda m, x: m.conv(to_multiple(x))), PICTURES, SPACE),
    "before an average": (
        lambda: conv(nn.Conv2d, lambda m, x: F.avg_pool2d(to_multiple(m.conv(x)), 3, 1, 1)), PICTURES, SPACE,
    ),
    "average that counts padding": (
        lambda: conv(nn.Conv2d, lambda m, x: F.avg_pool2d(m.conv(x), 3, 1, 1)), PICTURES, SPACE,
    ),
    "average of what is cut": (
        lambda: conv(nn.Conv2d, lambda m, x: F.avg_pool2d(F.pad(m.conv(x), (-1,) * 4), 3, 1, 1)), PICTURES, SPACE,
    ),
    "cut and padded": (
        lambda: conv(nn.Conv2d, lambda m, x: F.relu(F.pad(m.conv(x), (-1, 2, 0, -1), value=0.5))), PICTURES, SPACE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_file_takes_other_sizes(name: str):
    build, shapes, free = CASES[name]
    module, data = build(), [(torch.randn(shape),) for shape in shapes]
    model = torch.export.export(module, data[0], dynamic_shapes=((free,),)).module()
    prepared = prepare_pt2e(model, XNNPACKQuantizer().set_global(CONFIG))
    for inputs in data:
        torch.testing.assert_close(prepared(*inputs), module(*inputs))
    converted = convert_pt2e(prepared)
    for inputs, (actual,) in zip(data, run_in_child(lower_program(converted, data[0]).pte, data), strict=True):
        assert sqnr_db(converted(*inputs), actual) > 60


@torch.no_grad()
def test_a_mean_with_several_free_sizes_stays_as_it_is():
    module = conv(nn.Conv2d, lambda m, x, y: (m.conv(x), y.mean((2, 3))))
    data = [(torch.randn(2, 3, 8, 8), torch.randn(*sizes, 8, 8)) for sizes in ((2, 5), (4, 3))]
    shapes = (({}, {0: DYNAMIC, 1: DYNAMIC}),)
    prepared = prepare_pt2e(
        torch.export.export(module, data[0], dynamic_shapes=shapes).module(), XNNPACKQuantizer().set_global(CONFIG)
    )
    for inputs in data:
        torch.testing.assert_close(prepared(*inputs), module(*inputs))
    converted = convert_pt2e(prepared)
    for inputs, outputs in zip(data, run_in_child(lower_program(converted, data[0]).pte, data), strict=True):
        assert min(map(sqnr_db, pytree.tree_leaves(converted(*inputs)), outputs)) > 60


def test_spelling_leaves_free_sizes_free():
    module, x = CASES["average that counts padding"][0](), torch.randn(PICTURES[0])
    model = torch.export.export(module, (x,), dynamic_shapes=((SPACE,),)).module()
    before = free_sizes(model, (x,))
    assert str(free_sizes(prepare_pt2e(model, XNNPACKQuantizer().set_global(CONFIG)), (x,))) == str(before)
