"""A failure names the input that does not fit; what runs is not looked at."""

import copy

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.core.errors import CalibrationError, NonFiniteError
from zeropoint.graph.explained import ExplainedModule
from zeropoint.workflow import convert_pt2e, prepare_pt2e

X = torch.randn(2, 3, 6, 6)


@pytest.fixture
def prepared():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    return prepare_pt2e(models.export(module, X), quantizers.STATIC)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            (torch.randn(2, 3, 9, 6),),
            r", input 'input': has shape \(2, 3, 9, 6\); the model was exported for \(2, 3, 6,",
        ),
        (
            (X[0],),
            r", input 'input': has shape \(3, 6, 6\); the model was exported for \(2, 3, 6, 6\)\. Bring the data",
        ),
        ((X.double(),), r", input 'input': is torch\.float64; the model was exported for torch\.float32\. Convert it"),
        ((X, 1), r": has 2 inputs, the model takes 1\. They are: input\. Leave labels out"),
        ((), r": has 0 inputs, the model takes 1\. They are: input\."),
    ],
)
def test_a_failure_names_the_input_that_does_not_fit(prepared, inputs, words):
    for model in (prepared, copy.deepcopy(prepared)):
        with pytest.raises(CalibrationError, match=f"^prepared model{words}") as caught:
            model(*inputs)
        assert caught.value.__cause__ is not None


def test_a_free_size_fits():
    module, (x,) = models.linear()
    free = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    prepared = prepare_pt2e(free, quantizers.STATIC)
    assert prepared(torch.randn(7, 4)).shape == (7, 3)
    with pytest.raises(CalibrationError, match=r"has shape \(7, 5\); the model was exported for \(s\w+, 4\)"):
        prepared(torch.randn(7, 5))


def test_a_call_that_succeeds_may_have_any_size():
    prepared = prepare_pt2e(models.export(nn.Conv2d(3, 4, 3), X), quantizers.STATIC)
    assert prepared(torch.randn(5, 3, 8, 8)).shape == (5, 4, 6, 6)


def test_other_failures_stay_as_they_are(prepared):
    with pytest.raises(NonFiniteError, match="NaN in batch 0"):
        prepared(X * torch.nan)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        prepared(other=X)

    def fail(*_):
        raise RuntimeError("of another cause")

    prepared.register_forward_pre_hook(fail)
    for x in (X, X * torch.nan):
        with pytest.raises(RuntimeError, match="of another cause"):
            prepared(x)


def test_a_converted_model_is_a_plain_graph_module(prepared):
    assert isinstance(prepared, ExplainedModule)
    prepared(X)
    assert not isinstance(convert_pt2e(prepared), ExplainedModule)
