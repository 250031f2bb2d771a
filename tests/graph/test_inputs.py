"""Do inputs fit the model?"""

import models
import pytest
import torch
from torch.export import Dim

from zeropoint.core.errors import CalibrationError, NonFiniteError
from zeropoint.graph.inputs import inputs_for


def test_a_batch_is_a_tuple_of_inputs():
    x, y = torch.ones(3), torch.ones(3)
    two = models.exported(models.adds)
    assert inputs_for(two, (x, y), "batch 0") == inputs_for(two, [x, y], "batch 0") == (x, y)
    x = torch.ones(2, 4)
    assert inputs_for(models.exported(models.linear), x, "batch 0") == (x,)


@pytest.mark.parametrize("batch", [{"x": 1}, None, "text", 3])
def test_something_else_is_no_batch(batch):
    with pytest.raises(CalibrationError, match=r"batch 3: is \w+, not a tuple of inputs"):
        inputs_for(models.exported(models.adds), batch, "batch 3")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((), r"batch 1: has 0 inputs, the model takes 2. They are: inputs_0, inputs_1"),
        ((torch.ones(3), torch.ones(4)), r"batch 1, input 'inputs_1': has shape \(4,\).*exported for \(3\)"),
        ((torch.ones(3), torch.ones(3, 1)), r"has shape \(3, 1\)"),
        ((torch.ones(3), torch.ones(3).half()), r"is torch.float16; the model was exported for torch.float32.*x\.to"),
        ((torch.ones(3), 2), r"is int, not a tensor"),
    ],
)
def test_what_does_not_fit_is_named(inputs, words):
    with pytest.raises(CalibrationError, match=words):
        inputs_for(models.exported(models.adds), inputs, "batch 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    bad = torch.tensor([1.0, value, value])
    with pytest.raises(NonFiniteError, match=r"batch 0, input 'inputs_0': holds 2 NaN or infinite values"):
        inputs_for(models.exported(models.adds), (bad, torch.ones(3)), "batch 0")


def test_a_free_size_takes_any():
    module, inputs = models.linear()
    model = torch.export.export(module, inputs, dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    inputs_for(model, (torch.ones(9, 4),), "batch 0")
    with pytest.raises(CalibrationError, match=r"\(9, 5\); the model was exported for \(s\d+, 4\)"):
        inputs_for(model, (torch.ones(9, 5),), "batch 0")


def test_nested_inputs_are_counted_by_their_leaves():
    class Nested(torch.nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    model = models.export(Nested(), (torch.ones(2), torch.ones(2)))
    inputs_for(model, ((torch.ones(2), torch.ones(2)),), "batch 0")


class Named(torch.nn.Module):
    """Takes a dictionary, and a number that export fixes."""

    def forward(self, named, factor):
        return named["a"] * factor - named["b"]


def test_dictionaries_are_taken_by_their_keys():
    ones, zeros = torch.ones(2), torch.zeros(2)
    model = models.export(Named(), {"a": ones, "b": zeros}, 3)
    (named, factor) = inputs_for(model, [{"b": zeros, "a": ones}, 3], "batch 0")
    assert (list(named), named["a"] is ones, factor) == (["a", "b"], True, 3)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            ({"a": torch.ones(2), "c": torch.ones(2)}, 3),
            r"its inputs are \({'a': ., 'c': .}, .\); the model takes \({'a'",
        ),
        (
            ([torch.ones(2), torch.ones(2)], 3),
            r"its inputs are \(\[., .\], .\); the model takes \({'a': ., 'b': .}, .\)",
        ),
        (
            ({"a": torch.ones(2), "b": torch.ones(2)}, 2),
            r"input 'factor': is 2; the model was exported for 3, and that",
        ),
    ],
)
def test_structures_and_fixed_values_that_do_not_fit(inputs, words):
    model = models.export(Named(), {"a": torch.ones(2), "b": torch.ones(2)}, 3)
    with pytest.raises(CalibrationError, match=words):
        inputs_for(model, inputs, "batch 1")
