"""Observers of torch and torchao: ours of the same settings take their place, unless they are to be kept."""

import functools

import models
import pytest
import quantizers
import torch
from torch.ao.quantization import fake_quantize as torch_fake_quantize
from torch.ao.quantization import observer as torch_observer

from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.annotate.stock import REPLACED, replaced
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics import fake_quantize, observers
from zeropoint.workflow import convert_pt2e, prepare_pt2e

ao_observer = pytest.importorskip("torchao.quantization.pt2e.observer")
ao_fake_quantize = pytest.importorskip("torchao.quantization.pt2e.fake_quantize")
MODULES = [(torch_observer, torch_fake_quantize), (ao_observer, ao_fake_quantize)]


@pytest.mark.parametrize("modules", MODULES, ids=["torch", "torchao"])
@pytest.mark.parametrize("ours", REPLACED, ids=lambda ours: ours.__name__)
def test_each_class_is_replaced_by_ours_of_its_name(modules, ours):
    theirs = next(getattr(module, ours.__name__) for module in modules if hasattr(module, ours.__name__))
    assert replaced(theirs).p.func is ours
    assert replaced(ours) is ours


@pytest.mark.parametrize("module", [torch_observer, ao_observer], ids=["torch", "torchao"])
def test_settings_are_those_that_were_given_last(module):
    first = module.PerChannelMinMaxObserver.with_args(eps=2**-10, ch_axis=1)
    made = replaced(first.with_args(eps=2**-12))(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
    assert type(made) is observers.PerChannelMinMaxObserver
    assert (made.ch_axis, made.eps.item(), made.dtype) == (1, 2**-12, torch.int8)
    plain = functools.partial(module.MinMaxObserver, quant_min=-127, quant_max=127, dtype=torch.int8)
    assert replaced(plain)().quant_min == -127


@pytest.mark.parametrize("modules", MODULES, ids=["torch", "torchao"])
def test_a_fake_quantizer_is_replaced_together_with_its_observer(modules):
    observer, fake = modules
    constructor = fake.FusedMovingAvgObsFakeQuantize.with_args(
        observer=observer.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5), quant_min=-8, quant_max=7,
        dtype=torch.int8,
    )  # fmt: skip
    made = replaced(constructor)()
    assert type(made) is fake_quantize.FusedMovingAvgObsFakeQuantize
    assert type(made.activation_post_process) is observers.MovingAverageMinMaxObserver
    assert made.activation_post_process.averaging_constant == 0.5


def test_arguments_that_are_called_for_stay_so():
    asked = []
    constructor = torch_observer.MinMaxObserver.with_callable_args(eps=lambda: asked.append(1) or 0.25)
    build = replaced(constructor)
    assert not asked
    assert build(dtype=torch.int8).eps.item() == 0.25


class OfSomebody(torch_observer.MinMaxObserver):
    """Calls what it sees twice as wide."""

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return 2 * scale, zero_point


@pytest.mark.parametrize(
    "constructor",
    [
        OfSomebody,
        OfSomebody.with_args(eps=0.5),
        torch_fake_quantize.FakeQuantize.with_args(observer=OfSomebody),
        functools.partial(torch_observer.MinMaxObserver, torch.int8),
        lambda **_: None,
    ],
)
def test_others_come_back_as_they_are(constructor):
    assert replaced(constructor) is constructor


def quantizer(constructor):
    def annotate(model):
        linear = models.find(model, "linear")
        spec = QuantizationSpec(torch.int8, constructor, -128, 127, torch.per_tensor_affine)
        linear.meta[quantizers.KEY] = QuantizationAnnotation({linear.args[0]: spec}, spec)

    return quantizers.ByHand(annotate)


def prepared(constructor, **choice):
    made = prepare_pt2e(models.exported(models.linear), quantizer(constructor), **choice)
    made(*models.linear()[1])
    return made


def kinds(model):
    return {type(module) for name, module in model.named_children() if name.startswith("activation_post_process")}


@pytest.mark.parametrize("name", ["MinMaxObserver", "HistogramObserver", "MovingAverageMinMaxObserver"])
def test_the_scales_are_the_same_either_way(name):
    theirs = getattr(ao_observer, name)
    ours, kept = prepared(theirs), prepared(theirs, stock_observers="keep")
    assert kinds(ours) == {getattr(observers, name)}
    assert kinds(kept) == {theirs}
    scales = [
        [node.args[1:3] for node in convert_pt2e(model).graph.nodes if "quantize_per_tensor" in node.name]
        for model in (ours, kept)
    ]
    assert scales[0] == scales[1]
    assert len(scales[0]) >= 3


def test_an_observer_of_somebody_runs_as_it_is():
    assert kinds(prepared(OfSomebody)) == {OfSomebody}


def test_another_word_is_refused():
    model = models.exported(models.linear)
    with pytest.raises(SpecError, match="stock_observers='mine' is no choice") as error:
        prepare_pt2e(model, quantizer(observers.MinMaxObserver), stock_observers="mine")
    assert error.value.remedy == 'Choose "replace" or "keep".'
