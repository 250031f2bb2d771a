"""Fake quantizers: values and gradients against torchao's, switches, state, and agreement with what convert writes."""

import copy
import re
import warnings

import pytest
import torch

from zeropoint.core.errors import CalibrationError, NonFiniteError, SpecError
from zeropoint.numerics import fake_quantize as ours_module
from zeropoint.numerics.fake_quantize import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from zeropoint.numerics.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    PerGroupMinMaxObserver,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import fake_quantize as torchao
    from torchao.quantization.pt2e import observer as torchao_observers

INT8 = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
CASES = [
    ("MovingAverageMinMaxObserver", {}),
    ("MovingAverageMinMaxObserver", {**INT8, "qscheme": torch.per_tensor_symmetric, "eps": 2**-12}),
    ("MinMaxObserver", INT8),
    ("HistogramObserver", INT8),
    ("MovingAveragePerChannelMinMaxObserver", {**INT8, "qscheme": torch.per_channel_symmetric, "ch_axis": 1}),
    ("PerChannelMinMaxObserver", {**INT8, "qscheme": torch.per_channel_affine, "ch_axis": 0}),
    ("PerChannelMinMaxObserver", {"qscheme": torch.per_channel_affine_float_qparams, "ch_axis": 0}),
]


def data(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 6, 5, generator=generator) * (i + 1) for i in range(count)]


@pytest.mark.parametrize(("observer", "arguments"), CASES, ids=str)
def test_values_and_gradients_as_torchao(observer, arguments):
    ours = FakeQuantize(getattr(__import__("zeropoint.numerics.observers").numerics.observers, observer), **arguments)
    theirs = torchao.FakeQuantize(getattr(torchao_observers, observer), **arguments)
    for x in data():
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [module(leaf) for module, leaf in zip((ours, theirs), leaves, strict=True)]
        for result in results:
            result.square().sum().backward()
        assert torch.equal(*results)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.zero_point, theirs.zero_point)
    assert ours.zero_point.dtype == theirs.zero_point.dtype
    for name in ("dtype", "qscheme", "ch_axis", "quant_min", "quant_max", "is_dynamic", "is_per_channel"):
        assert getattr(ours, name) == getattr(theirs, name)
    loaded = type(ours)(type(ours.activation_post_process), **arguments)
    loaded.load_state_dict(theirs.state_dict())
    loaded.disable_observer()
    assert torch.equal(loaded(data()[0]), theirs.disable_observer() or theirs(data()[0]))


def test_the_gradient_passes_where_nothing_was_clamped():
    module = FakeQuantize(MinMaxObserver, **INT8)
    module(torch.tensor([-1.0, 1.0]))
    module.disable_observer()
    x = torch.tensor([-3.0, 0.3, 0.9, 5.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


class ClampedObserver(MovingAverageMinMaxObserver):
    """A user's own: looks at another tensor than it is called with."""

    def forward(self, x):
        super().forward(x.clamp(-1, 1))
        return x


class PercentileObserver(MovingAverageMinMaxObserver):
    def batch_range(self, x):
        return torch.quantile(x, 0.25), torch.quantile(x, 0.75)


@pytest.mark.parametrize("observer", [ClampedObserver, PercentileObserver])
def test_values_beyond_the_range_of_an_observer_of_ones_own_are_clamped(observer):
    settings = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}
    fake = FakeQuantize(observer=observer, **settings)
    x = torch.linspace(-4, 4, 2**17).requires_grad_()
    observed = fake(x)
    observed.sum().backward()
    reference = x.detach().clone().requires_grad_()
    arguments = (fake.scale.item(), fake.zero_point.item(), -128, 127)
    expected = torch.fake_quantize_per_tensor_affine(reference, *arguments)
    expected.sum().backward()
    assert torch.equal(observed, expected)
    assert torch.equal(x.grad, reference.grad)
    assert observed.max() < 2.5


@pytest.mark.parametrize("ch_axis", [0, 1, 2, -1])
@pytest.mark.parametrize("kind", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_the_channel_axis_is_honoured(kind, ch_axis):
    x = data(1)[0]
    module = kind(MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=ch_axis, **INT8)
    result = module(x)
    assert module.ch_axis == ch_axis
    assert module.scale.shape == (x.shape[ch_axis],)
    for i in range(x.shape[ch_axis]):
        scale = x.select(ch_axis, i).abs().max() / 127.5
        expected = torch.fake_quantize_per_tensor_affine(x.select(ch_axis, i), scale.item(), 0, -128, 127)
        torch.testing.assert_close(result.select(ch_axis, i), expected)


def test_groups_are_rounded_with_their_own_scale():
    x = data(1)[0].reshape(4, 30)
    observer = PerGroupMinMaxObserver.with_args(group_size=10, qscheme=torch.per_channel_symmetric)
    module = FakeQuantize(observer, **INT8)
    result = module(x)
    assert module.scale.shape == (4, 3)
    scale = x[1, 10:20].abs().max().item() / 127.5
    torch.testing.assert_close(
        result[1, 10:20], torch.fake_quantize_per_tensor_affine(x[1, 10:20], scale, 0, -128, 127)
    )


@pytest.mark.parametrize("kind", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_nested_constructors(kind):
    observer = MovingAverageMinMaxObserver.with_args(eps=0.5).with_args(averaging_constant=0.25)
    module = kind.with_args(observer=observer).with_args(quant_min=0).with_args(quant_max=15, dtype=torch.uint8)()
    built = module.activation_post_process
    assert (built.eps.item(), built.averaging_constant, module.quant_max, module.dtype) == (0.5, 0.25, 15, torch.uint8)


def test_an_observers_own_arguments_are_kept():
    module = FakeQuantize(MovingAverageMinMaxObserver.with_args(is_dynamic=True, averaging_constant=1, quant_max=100))
    assert module.is_dynamic
    assert module.quant_max == 100


def test_switches():
    module = FakeQuantize(MinMaxObserver, **INT8)
    model = torch.nn.Sequential(module, torch.nn.ReLU())
    x = data(1)[0]
    model(x)
    scale = module.scale.clone()
    model.apply(disable_observer)
    model(10 * x)
    assert torch.equal(module.scale, scale)
    assert module.batches == 1
    model.apply(disable_fake_quant)
    assert module(x) is x
    model.apply(enable_observer)
    model.apply(enable_fake_quant)
    assert not torch.equal(module(10 * x), 10 * x)
    assert module.observer_enabled.dtype == torch.uint8
    assert FusedMovingAvgObsFakeQuantize().observer_enabled.dtype == torch.int64


@pytest.mark.parametrize(
    "observer", [MinMaxObserver, HistogramObserver, PerChannelMinMaxObserver, PerChannelMSEObserver]
)
def test_state_is_saved_and_copied(observer):
    module = FakeQuantize(observer, dtype=torch.int8)
    module.site = "relu"
    for x in data():
        module(x)
    loaded = FakeQuantize(observer, dtype=torch.int8)
    loaded.load_state_dict(module.state_dict())
    twin = copy.deepcopy(module)
    assert (twin.site, twin.batches) == ("relu", 3)
    more = data(4)[3]
    result = module(more)
    for other in (loaded, twin):
        assert torch.equal(other(more), result)
    module.reset()
    assert module.scale.tolist() == [1.0]
    with pytest.raises(CalibrationError, match="relu: no data"):
        module.calculate_qparams()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_half_precision_keeps_its_dtype(kind, dtype):
    x = data(1)[0].to(dtype).requires_grad_()
    result = kind(**INT8)(x)
    result.sum().backward()
    assert result.dtype == x.grad.dtype == dtype


def test_nan_and_empty_tensors():
    module = FakeQuantize(**INT8)
    module.site = "linear, weight"
    assert module(torch.zeros(0)).numel() == 0
    with pytest.raises(NonFiniteError, match="linear, weight: NaN in batch 0"):
        module(torch.tensor([1.0, torch.nan]))


# -- the moving average and the fixed ones -----------------------------------------------------------------------------


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_what_training_saw_is_what_convert_writes(qscheme, scale):
    """torch's fused kernel fails this: up to a factor of 2 for values of one sign, more for small ones."""
    for sign in (torch.ones(1), torch.zeros(1)):
        module = FusedMovingAvgObsFakeQuantize(qscheme=qscheme, eps=2**-12, **INT8)
        for x in data():
            module(scale * (x.abs() if sign.item() else x))
        assert torch.equal(module.scale, module.calculate_qparams()[0])
        assert torch.equal(module.zero_point.long(), module.calculate_qparams()[1])


def test_fused_affine_as_torchao():
    ours, theirs = FusedMovingAvgObsFakeQuantize(**INT8), torchao.FusedMovingAvgObsFakeQuantize(**INT8)
    for x in data():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.activation_post_process.min_val, theirs.activation_post_process.min_val)


def test_fixed_qparams():
    made = FixedQParamsFakeQuantize.with_args(observer=FixedQParamsObserver.with_args(scale=0.5, zero_point=3))
    module = made(dtype=torch.quint8)
    assert module(torch.tensor([0.6, -9.0])).tolist() == [0.5, -1.5]
    assert [value.item() for value in module.calculate_qparams()] == [0.5, 3]


def test_what_cannot_be_is_refused():
    with pytest.raises(SpecError, match=re.escape("keeps no moving average. Use MovingAverageMinMaxObserver")):
        FusedMovingAvgObsFakeQuantize(MinMaxObserver)
    with pytest.raises(SpecError, match="has no fixed scale and zero point"):
        FixedQParamsFakeQuantize(MinMaxObserver)
    with pytest.raises(SpecError, match="is no range within"):
        FakeQuantize(quant_min=0, quant_max=300, dtype=torch.uint8)


NAMED = [name for name in torchao.__all__ if name.startswith(("default", "fused")) and "affine_" not in name]
NAMED = [name for name in NAMED if "groupwise" not in name] + ["default_affine_fixed_qparams_fake_quant"]


@pytest.mark.parametrize("name", NAMED)
def test_named_defaults_as_torchao(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(torchao, name)()
    ours = getattr(ours_module, name)()
    for attribute in ("dtype", "qscheme", "quant_min", "quant_max", "ch_axis", "is_dynamic"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("eps", "averaging_constant"):
        expected = getattr(theirs.activation_post_process, attribute, None)
        if expected is not None:
            assert getattr(ours.activation_post_process, attribute) == expected
