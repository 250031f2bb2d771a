"""What observers measure, refuse, forget, save and cost; min-max observers against torchao's."""

import copy
import gc
import pickle
import re
import warnings

import pytest
import torch

from zeropoint.core.errors import CalibrationError, NonFiniteError, SpecError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics import observers
from zeropoint.numerics.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    MovingAveragePerGroupMinMaxObserver,
    MSEObserver,
    NoopObserver,
    ObserverBase,
    PartialWrapper,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    PerGroupMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import observer as torchao

PER_TENSOR = (MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver, PercentileObserver, MSEObserver)
PER_CHANNEL = (PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver, PerChannelMSEObserver)
PER_GROUP = (
    PerGroupMinMaxObserver.with_args(group_size=4),
    MovingAveragePerGroupMinMaxObserver.with_args(group_size=4),
)
MEASURING = PER_TENSOR + PER_CHANNEL + PER_GROUP


def batches(count=3, shape=(4, 8, 8)):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * (1 + 0.3 * i) + 0.2 for i in range(count)]


def observed(constructor, data=None, **arguments):
    observer = constructor(**arguments)
    for x in batches() if data is None else data:
        assert observer(x) is x
    return observer


# -- what all observers keep to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", MEASURING)
def test_no_data_is_an_error_that_names_the_site(constructor):
    observer = constructor()
    observer.site = "conv2d, input"
    with pytest.raises(CalibrationError, match=r"conv2d, input: no data reached this .*Run the prepared model"):
        observer.calculate_qparams()


@pytest.mark.parametrize("constructor", MEASURING)
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")])
def test_non_finite_data_is_an_error_that_names_site_and_batch(constructor, value, word):
    observer = observed(constructor, batches(2))
    observer.site = "linear"
    before = {name: buffer.clone() for name, buffer in observer.named_buffers()}
    x = torch.zeros(4, 8, 8)
    x[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match=rf"^linear: {word} in batch 2 \(counted from 0\)\. Check"):
        observer(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in observer.named_buffers())
    assert observer.batches == 2


@pytest.mark.parametrize("constructor", MEASURING)
def test_complex_data_is_refused(constructor):
    observer = constructor()
    observer.site = "fft"
    with pytest.raises(CalibrationError, match=r"^fft: a tensor of torch\.complex64 has no range\. Annotate"):
        observer(torch.ones(4, 4, dtype=torch.complex64))


def test_complex_data_passes_what_leaves_it_as_it_is():
    x = torch.ones(2, dtype=torch.complex64)
    assert observers.PlaceholderObserver()(x) is x
    recording = observers.RecordingObserver()
    recording(x)
    assert torch.equal(recording.tensor_val[0], x)
    for changing in ({"dtype": torch.float16}, {"dtype": torch.int8, "is_dynamic": True}):
        with pytest.raises(CalibrationError, match="complex64 has no range"):
            observers.PlaceholderObserver(**changing)(x)


def test_one_range_has_the_zero_point_of_its_scheme():
    """An observer of the user's may keep one range where the scheme is that of channels."""
    scheme = torch.per_channel_affine_float_qparams
    observer = PerChannelMinMaxObserver(dtype=torch.quint8, qscheme=scheme)
    ends = torch.tensor(1.0), torch.tensor(3.0)
    for one, many in zip(
        observer._calculate_qparams(*ends), observer._calculate_qparams(*(end[None] for end in ends)), strict=True
    ):
        assert torch.equal(one, many)
    assert observer._calculate_qparams(*ends)[1].item() == pytest.approx(-127.5)


def test_a_constant_that_is_not_finite_is_in_no_batch():
    observer = MinMaxObserver()
    observer.site, observer.constant_input = "weight", True
    with pytest.raises(NonFiniteError, match=r"^weight: NaN in this constant of the model\. Check what"):
        observer(torch.tensor([torch.nan]))


@pytest.mark.parametrize("constructor", MEASURING)
def test_an_empty_tensor_is_no_batch(constructor):
    observer = constructor()
    empty = torch.zeros(0, 4)
    assert observer(empty) is empty
    assert observer.batches == 0


@pytest.mark.parametrize("constructor", MEASURING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_count_as_float32(constructor, dtype):
    data = [x.to(dtype) for x in batches()]
    found = observed(constructor, data).calculate_qparams()
    expected = observed(constructor, [x.float() for x in data]).calculate_qparams()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("constructor", MEASURING)
def test_gradients_flow_and_the_layout_of_memory_does_not_count(constructor):
    x = batches(1, (4, 8, 4, 4))[0]
    wanted = observed(constructor, [x]).calculate_qparams()
    for same in (x.to(memory_format=torch.channels_last), x.transpose(0, 2).contiguous().transpose(0, 2)):
        leaf = same.detach().requires_grad_()
        observer = observed(constructor, [leaf * 1])
        assert torch.equal(observer.calculate_qparams()[0], wanted[0])
        observer(leaf * 2).sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(x, 2))
        assert not any(buffer.requires_grad for buffer in observer.buffers())


@pytest.mark.parametrize("constructor", MEASURING)
def test_reset_forgets(constructor):
    observer = observed(constructor)
    observer.reset()
    assert observer.batches == 0
    with pytest.raises(CalibrationError, match="no data"):
        observer.calculate_qparams()
    fresh = observed(constructor, batches(1))
    observer(batches(1)[0])
    assert torch.equal(observer.calculate_qparams()[0], fresh.calculate_qparams()[0])


@pytest.mark.parametrize("constructor", MEASURING)
def test_state_is_saved_copied_and_pickled(constructor):
    observer = observed(constructor)
    observer.site = "add"
    loaded = constructor()
    loaded.load_state_dict(observer.state_dict())
    for twin in (loaded, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        for ours, theirs in zip(twin.calculate_qparams(), observer.calculate_qparams(), strict=True):
            assert torch.equal(ours, theirs)
    assert copy.deepcopy(observer).batches == 3
    assert copy.deepcopy(observer).site == "add"
    more = batches(4)[3] * 5
    observer(more)
    loaded(more)
    assert torch.equal(loaded.calculate_qparams()[0], observer.calculate_qparams()[0])


@pytest.mark.parametrize(
    "kind", ["MinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver", "FixedQParamsObserver"]
)
def test_state_of_torchao_loads(kind):
    arguments = {"scale": 0.5, "zero_point": 3} if kind.startswith("Fixed") else {}
    theirs, ours = getattr(torchao, kind)(**arguments), getattr(observers, kind)(**arguments)
    for x in batches():
        theirs(x)
    ours.load_state_dict(theirs.state_dict())
    for value, expected in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert torch.equal(value.double(), expected.double())


@pytest.mark.parametrize("constructor", MEASURING)
def test_memory_does_not_grow_with_the_number_of_batches(constructor):
    def held():
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor)

    data = batches(1)[0]
    observer = constructor()
    observer(data)
    size = len(pickle.dumps(observer))
    before = held()
    for i in range(60):
        observer(data * (1 + i / 10))
    assert held() <= before
    assert len(pickle.dumps(observer)) <= size + 64


@pytest.mark.parametrize("constructor", MEASURING)
def test_every_keyword_of_a_spec_may_be_passed(constructor):
    observer = constructor(
        dtype=torch.int8, quant_min=None, quant_max=None, qscheme=None, ch_axis=None, is_dynamic=False
    )
    assert (observer.quant_min, observer.quant_max) == (-128, 127)
    spec = QuantizationSpec(torch.int8, constructor, quant_min=-8, quant_max=7)
    assert constructor(dtype=spec.dtype, quant_min=spec.quant_min, quant_max=spec.quant_max).quant_max == 7


@pytest.mark.parametrize(
    ("constructor", "arguments", "words"),
    [
        (
            MinMaxObserver,
            {"qscheme": torch.per_channel_affine},
            "Use one of torch.per_tensor_affine, torch.per_tensor_sym",
        ),
        (PerChannelMinMaxObserver, {"qscheme": torch.per_tensor_affine}, "Use one of torch.per_channel_affine"),
        (HistogramObserver, {"is_dynamic": True}, "is_dynamic=True is not for this observer. Use PlaceholderObserver"),
        (MovingAverageMinMaxObserver, {"is_dynamic": True}, "needs averaging_constant=1, not 0.01"),
        (MovingAverageMinMaxObserver, {"averaging_constant": 0}, "Choose 0 < averaging_constant <= 1"),
        (MinMaxObserver, {"dtype": torch.float16}, "Use one of torch.int8, torch.uint8"),
        (MinMaxObserver, {"dtype": torch.int8, "quant_max": 200}, "Choose -128 <= quant_min < quant_max <= 127"),
        (MinMaxObserver, {"quant_min": 7, "quant_max": 7}, "is no range within"),
        (
            MinMaxObserver,
            {"qscheme": torch.per_tensor_symmetric, "reduce_range": True},
            "zero point 128 of a symmetric",
        ),
        (MinMaxObserver, {"eps": 0}, "MinMaxObserver: eps=0 is no smallest scale. Choose eps > 0"),
        (MinMaxObserver, {"averaging_constant": 1}, "no argument is called averaging_constant"),
        (PlaceholderObserver, {"bins": 1}, "no argument is called bins"),
        (HistogramObserver, {"bins": 0}, "HistogramObserver: bins=0. Choose bins >= 1"),
        (PerChannelMSEObserver, {"bins": 0}, "PerChannelMSEObserver: bins=0. Choose bins >= 1"),
        (PercentileObserver, {"percentile": 0.9}, "Choose 50 < percentile <= 100"),
        (FixedQParamsObserver, {"scale": 0.0, "zero_point": 0}, "scale=0.0 is not a positive finite number"),
        (FixedQParamsObserver, {"scale": 1.0, "zero_point": 300}, "Choose one in 0..255"),
        (FixedQParamsObserver, {"scale": "x", "zero_point": 0}, "scale='x' is not a positive finite number"),
        (FixedQParamsObserver, {"scale": 1.0, "zero_point": 1.5}, "zero_point=1.5 is no integer"),
        (MinMaxObserver, {"quant_min": -1.5, "dtype": torch.int8}, "quant_min=-1.5 is no integer"),
        (MinMaxObserver, {"quant_max": True}, "quant_max=True is no integer"),
        (MinMaxObserver, {"is_dynamic": 1}, "is_dynamic=1 is no bool"),
        (PerChannelMinMaxObserver, {"ch_axis": "0"}, "ch_axis='0' is no integer"),
        (PerChannelMSEObserver, {"ch_axis": 0.5}, "ch_axis=0.5 is no integer"),
        (PerGroupMinMaxObserver, {"group_size": 2.5}, "group_size=2.5 is no integer"),
        (PlaceholderObserver, {"dtype": torch.int64}, "dtype=torch.int64 is no type to quantize to"),
        (PlaceholderObserver, {"dtype": torch.int8, "quant_min": 5, "quant_max": 5}, "is no range within"),
        (RecordingObserver, {"dtype": torch.bool}, "dtype=torch.bool is no type to quantize to"),
    ],
)
def test_what_cannot_be_is_refused_when_built(constructor, arguments, words):
    with pytest.raises(SpecError, match=re.escape(words)):
        constructor(**arguments)


def test_a_dynamic_moving_average_of_one():
    assert MovingAverageMinMaxObserver(averaging_constant=1, is_dynamic=True).is_dynamic


def test_channels_must_stay_as_many_and_the_axis_must_exist():
    observer = observed(PerChannelMinMaxObserver, [torch.ones(3, 2)])
    with pytest.raises(CalibrationError, match=r"shape \(3,\), those of this batch \(4,\)"):
        observer(torch.ones(4, 2))
    with pytest.raises(CalibrationError, match="ch_axis=2 is no axis"):
        PerChannelMinMaxObserver(ch_axis=2)(torch.ones(3, 2))


def test_a_range_wider_than_float32_is_an_error():
    x = torch.tensor([-3e38, 3e38])
    with pytest.raises(NonFiniteError, match="too wide for a float32 scale"):
        observed(MinMaxObserver, [x]).calculate_qparams()


# -- constants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", MEASURING)
def test_a_constant_is_observed_once_and_again_when_it_changes(constructor):
    weight, observer = batches(1)[0], constructor()
    observer.constant_input = True
    for _ in range(3):
        observer(weight)
    assert observer.batches == 1
    weight.mul_(0.5)
    observer(weight)
    assert observer.batches == 1
    assert torch.equal(observer.calculate_qparams()[0], observed(constructor, [weight]).calculate_qparams()[0])
    other = weight * 3
    observer(other)
    assert torch.equal(observer.calculate_qparams()[0], observed(constructor, [other]).calculate_qparams()[0])


def test_a_constant_in_inference_mode():
    observer = MinMaxObserver()
    observer.constant_input = True
    with torch.inference_mode():
        x = torch.ones(3)
        observer(observer(x))
    assert observer.batches == 1


# -- without statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlaceholderObserver, NoopObserver, ReuseInputObserver, RecordingObserver])
def test_observers_without_a_scale_say_so(kind):
    x = torch.ones(2)
    observer = kind(dtype=torch.float16, ch_axis=None, quant_min=None)
    observer.site = "bias"
    assert observer(x) is x
    with pytest.raises(CalibrationError, match=rf"bias: a?\s?{kind.__name__} has no scale and zero point"):
        observer.calculate_qparams()


def test_placeholder_keeps_what_the_dynamic_quantization_will_use():
    observer = PlaceholderObserver(dtype=torch.int8, quant_min=-128, quant_max=127, eps=2**-12, is_dynamic=True)
    assert (observer.qscheme, observer.eps, observer.is_dynamic) == (torch.per_tensor_affine, 2**-12, True)
    assert PlaceholderObserver(compute_dtype=torch.quint8).is_dynamic


def test_recording_keeps_copies():
    x = torch.ones(2)
    observer = RecordingObserver()
    observer(x)
    x.zero_()
    assert [t.tolist() for t in observer.get_tensor_value()] == [[1.0, 1.0]]


def test_fixed_qparams():
    observer = observed(FixedQParamsObserver, scale=1 / 256, zero_point=-128, dtype=torch.int8)
    scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1 / 256], [-128])


# -- constructors ------------------------------------------------------------------------------------------------------


def test_with_args_nests():
    made = MinMaxObserver.with_args(eps=2**-12).with_args(dtype=torch.int8).with_args(eps=0.5)
    assert made.p.func is MinMaxObserver
    assert made.p.keywords == {"eps": 0.5, "dtype": torch.int8}
    observer = made(quant_min=-7)
    assert (observer.eps.item(), observer.dtype, observer.quant_min) == (0.5, torch.int8, -7)
    assert repr(made) == "MinMaxObserver(eps=0.5, dtype=torch.int8)"


def test_callable_args_are_called_at_each_construction():
    numbers = iter((0.25, 0.5, 1.0))
    made = MinMaxObserver.with_callable_args(eps=lambda: next(numbers)).with_args(dtype=torch.int8)
    assert isinstance(made, PartialWrapper)
    assert list(made.callable_args) == ["eps"]
    assert [made().eps.item(), made().eps.item(), made(eps=4.0).eps.item()] == [0.25, 0.5, 4.0]
    assert made.with_args(eps=8.0)().eps.item() == 8.0


def test_specs_compare_observers_by_their_arguments():
    first = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=0.5))
    assert first == QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=1.0).with_args(eps=0.5))
    assert first != QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=1.0))


def test_a_users_observer_may_override_forward_and_calculate_qparams():
    class Largest(observers.UniformQuantizationObserverBase):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.register_buffer("max_val", torch.zeros(()))

        def forward(self, x):
            self.max_val = torch.maximum(self.max_val, x.abs().max())
            return x

        def calculate_qparams(self):
            return self._calculate_qparams(-self.max_val, self.max_val)

    observer = observed(Largest, [torch.tensor([-2.0, 1.0])], dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
    assert observer.calculate_qparams()[0].item() == torch.tensor(2.0).div(127.5).item()
    assert issubclass(Largest, ObserverBase)


def test_the_text_of_an_observer_shows_its_statistics():
    text = repr(observed(MinMaxObserver, [torch.tensor([-1.0, 2.0])]))
    assert text == "MinMaxObserver(torch.quint8, torch.per_tensor_affine, 0..255, batches=1, min_val=-1.0, max_val=2.0)"
