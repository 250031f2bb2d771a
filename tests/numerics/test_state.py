"""What observers saw is saved and loaded apart from the weights."""

import models
import pytest
import quantizers
import torch

from zeropoint.core.errors import CalibrationError
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers.state import get_observer_state_dict, load_observer_state_dict
from zeropoint.workflow import convert_pt2e, prepare_pt2e


def prepared(build=models.mlp, **changes):
    act = quantizers.activation(**changes)
    return prepare_pt2e(models.exported(build), quantizers.ByHand(lambda model: quantizers.static(model, act=act)))


@pytest.mark.parametrize("changes", [{}, {"observer_or_fake_quant_ctr": FakeQuantize}], ids=["observers", "fakes"])
def test_statistics_go_to_another_model(changes):
    _, inputs = models.mlp()
    model, other = prepared(**changes), prepared(**changes)
    model(*inputs)
    state = get_observer_state_dict(model)
    assert state
    assert not [name for name in state if name.endswith(("weight", "bias"))]
    assert set(state._metadata) >= {""}
    load_observer_state_dict(other, state)
    assert torch.equal(convert_pt2e(other)(*inputs), convert_pt2e(model)(*inputs))


def test_only_observers_are_loaded():
    model, other = prepared(), prepared()
    model(*models.mlp()[1])
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    before = other.state_dict()["0.weight"].clone()
    load_observer_state_dict(other, state)
    assert torch.equal(other.state_dict()["0.weight"], before)


def test_statistics_of_another_model():
    model = prepared()
    model(*models.mlp()[1])
    state = get_observer_state_dict(model)
    with pytest.raises(CalibrationError, match=r"^load_observer_state_dict: the model has no observer for activation_"):
        load_observer_state_dict(prepared(models.linear), state)
    state.popitem()
    with pytest.raises(CalibrationError, match=r"the saved statistics lack activation_post_process_\d+\.\w+\. Prepare"):
        load_observer_state_dict(prepared(), state)
