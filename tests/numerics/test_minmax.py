"""Min-max observers, per tensor, channel and group, and the named defaults: torchao's numbers."""

import warnings

import pytest
import torch

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics import observers
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers import (
    MinMaxObserver,
    MovingAveragePerGroupMinMaxObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
)
from zeropoint.numerics.observers import defaults as named

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import observer as torchao


def batches(count=3, shape=(4, 8, 8)):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * (1 + 0.3 * i) + 0.2 for i in range(count)]


def observed(constructor, data=None, **arguments):
    observer = constructor(**arguments)
    for x in batches() if data is None else data:
        assert observer(x) is x
    return observer


@pytest.mark.parametrize("kind", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.int8},
        {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "eps": 2**-12},
        {"dtype": torch.uint8, "quant_min": 0, "quant_max": 15},
        {"dtype": torch.int16},
        {"dtype": torch.uint16},
        {"dtype": torch.int32},
    ],
)
@pytest.mark.parametrize(
    "data", [batches(), [x.abs() for x in batches()], [torch.zeros(3)], [x.half() for x in batches()]]
)
def test_per_tensor_as_torchao(kind, qscheme, arguments, data):
    ours = observed(getattr(observers, kind), data, qscheme=qscheme, **arguments)
    theirs = getattr(torchao, kind)(qscheme=qscheme, **arguments)
    for x in data:
        theirs(x)
    assert_same_qparams(ours, theirs)
    assert torch.equal(ours.min_val, theirs.min_val)
    assert torch.equal(ours.max_val, theirs.max_val)


def assert_same_qparams(ours, theirs):
    (scale, zero_point), (their_scale, their_zero_point) = ours.calculate_qparams(), theirs.calculate_qparams()
    assert torch.equal(scale, their_scale)
    assert torch.equal(zero_point.double(), their_zero_point.double())


@pytest.mark.parametrize("kind", ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
@pytest.mark.parametrize(
    "qscheme", [torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams]
)
@pytest.mark.parametrize("ch_axis", [0, 1, 2, -1])
def test_per_channel_as_torchao(kind, qscheme, ch_axis):
    ours = observed(getattr(observers, kind), dtype=torch.int8, qscheme=qscheme, ch_axis=ch_axis)
    theirs = getattr(torchao, kind)(dtype=torch.int8, qscheme=qscheme, ch_axis=ch_axis)
    for x in batches():
        theirs(x)
    assert_same_qparams(ours, theirs)
    assert ours.ch_axis == ch_axis


def test_reduce_range_as_torchao():
    for arguments in ({"dtype": torch.qint8}, {"dtype": torch.quint8}, {"quant_min": 0, "quant_max": 255}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torchao.MinMaxObserver(reduce_range=True, **arguments)
        ours = MinMaxObserver(reduce_range=True, **arguments)
        assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)


@pytest.mark.parametrize("name", [name for name in vars(named) if "observer" in name and not name.startswith("_")])
def test_named_defaults_as_torchao(name):
    ours, theirs = getattr(named, name)(), getattr(torchao, name)()
    for attribute in ("dtype", "qscheme", "quant_min", "quant_max", "ch_axis", "is_dynamic", "eps", "scale"):
        assert_same(getattr(ours, attribute, None), getattr(theirs, attribute, None), attribute)


def assert_same(ours, theirs, attribute):
    if theirs is not None:
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, attribute


def test_4_bit_symmetric_has_its_zero_in_the_middle():
    """torchao puts it at 0 of 0..15, where negative values have no integers."""
    observer = observed(
        MinMaxObserver, [torch.tensor([-1.0, 1.0])], dtype=torch.quint4x2, qscheme=torch.per_tensor_symmetric
    )
    assert observer.calculate_qparams()[1].item() == 7


def test_every_channel_of_a_vector():
    scale, zero_point = observed(
        PerChannelMinMaxObserver, [torch.tensor([1.0, -2.0])], dtype=torch.int8
    ).calculate_qparams()
    assert torch.equal(scale, torch.tensor([1.0, 2.0]) / 255)
    assert zero_point.tolist() == [-128, 127]


def test_groups_by_hand():
    x = torch.tensor([[1.0, -3.0, 0.5, 0.25], [8.0, 0.0, 0.0, -1.0]])
    observer = observed(
        PerGroupMinMaxObserver, [x], group_size=2, dtype=torch.int8, qscheme=torch.per_channel_symmetric
    )
    scale, zero_point = observer.calculate_qparams()
    assert torch.equal(scale, torch.tensor([[3.0, 0.5], [8.0, 1.0]]) / 127.5)
    assert zero_point.shape == (2, 2)
    moving = observed(MovingAveragePerGroupMinMaxObserver, [x, 3 * x], averaging_constant=0.5, group_size=2)
    assert torch.equal(moving.max_val, 2 * observer.max_val)


def test_group_size_must_divide():
    with pytest.raises(CalibrationError, match=r"group_size=3 does not divide the last axis of shape \(2, 4\)"):
        PerGroupMinMaxObserver(group_size=3)(torch.ones(2, 4))
    with pytest.raises(SpecError, match="group_size=0"):
        PerGroupMinMaxObserver(group_size=0)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e36, 1e38])
def test_averages_in_numbers_are_those_of_tensors(qscheme, size):
    arguments = {"averaging_constant": 0.3, "dtype": torch.qint8, "qscheme": qscheme, "eps": 2**-12}
    ours, theirs = (kind.MovingAverageMinMaxObserver(**arguments) for kind in (observers, torchao))
    for batch in batches(20):
        x = batch.clamp(-1, 1) * size
        ours(x)
        theirs(x)
        assert (ours.min_val.item(), ours.max_val.item()) == (theirs.min_val.item(), theirs.max_val.item())
        assert ours.last == (x.min().item(), x.max().item())
        numbers = ours.qparams_in_numbers()
        assert (numbers is None) == (size > 1e37)
        if numbers is not None:
            assert numbers == tuple(each.item() for each in ours.calculate_qparams())


def test_an_average_goes_on_from_a_loaded_state():
    first, second = (observers.MovingAverageMinMaxObserver() for _ in range(2))
    first(batches()[0])
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each(batches()[1])
    assert torch.equal(first.min_val, second.min_val)


def test_an_observer_that_chooses_its_own_scale_has_no_numbers():
    class Doubled(observers.MovingAverageMinMaxObserver):
        def calculate_qparams(self):
            scale, zero_point = super().calculate_qparams()
            return scale * 2, zero_point

    fakes = [FakeQuantize(kind) for kind in (Doubled, observers.MovingAverageMinMaxObserver)]
    for fake in fakes:
        fake(batches()[0])
    assert fakes[0].scale.item() == fakes[1].scale.item() * 2


def test_an_observer_that_averages_in_its_own_way_is_asked():
    class Widest(observers.MovingAverageMinMaxObserver):
        def merged(self, low, high):
            return torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)

    observer = Widest()
    for x in batches():
        observer(x)
    assert observer.max_val.item() == max(x.max().item() for x in batches())
