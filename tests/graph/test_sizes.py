"""Sizes that are equal, and the axes of views."""

import models
import pytest
import torch
from torch.export import Dim

from zeropoint.graph.sizes import are_equal, axis_before_view, have_equal_sizes, is_never_negative


@pytest.mark.parametrize(
    ("before", "after", "axis", "found"),
    [
        ((3, 5, 1), (3, 5), 1, 1),
        ((3, 5), (3, 5, 1), 1, 1),
        ((2, 3, 5), (6, 5), 1, 2),
        ((1, 5, 4, 4), (1, 5, 16), 1, 1),
        ((1, 5, 4, 4), (1, 80), 1, None),
        ((2, 10), (2, 5, 2), 1, None),
        ((5, 2, 3), (6, 5), 1, None),
        ((3, 1, 2), (3, 1, 1, 2), 1, 1),
    ],
)
def test_the_axis_before_a_view(before, after, axis, found):
    assert axis_before_view(before, after, axis) == found


def test_free_sizes():
    model = torch.export.export(
        models.Applied(lambda m, x, y: (x.flatten(0, 1), y)),
        (torch.randn(3, 4, 5), torch.randn(6, 4)),
        dynamic_shapes=(({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),),
    ).module()
    x, y = (node.meta["val"].shape for node in model.graph.nodes if node.op == "placeholder")
    flat = models.find(model, "flatten").meta["val"].shape
    assert are_equal(x[0], x[0])
    assert not are_equal(x[0], y[0])
    assert not are_equal(x[0], 3)
    assert have_equal_sizes(x[:2], (x[0], 4))
    assert not have_equal_sizes(x[:2], y)
    assert axis_before_view(x, flat, 1) == 2
    assert is_never_negative(x[0] - 1)
    assert not is_never_negative(x[0] - 5)
    assert not is_never_negative(-x[0])
    assert is_never_negative(0)
