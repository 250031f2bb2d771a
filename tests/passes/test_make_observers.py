"""From groups to observers."""

import functools
import random
from dataclasses import dataclass

import models
import pytest
import quantizers
import torch
from torch.fx import Graph

from zeropoint.annotate.groups import resolve
from zeropoint.annotate.plan import Plan
from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
)
from zeropoint.graph.bind import Site
from zeropoint.numerics.fake_quantize import FakeQuantize, FixedQParamsFakeQuantize, FusedMovingAvgObsFakeQuantize
from zeropoint.numerics.observers import (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from zeropoint.passes.make_observers import make_observers

aten = torch.ops.aten
NOTHING = quantizers.ByHand(lambda model: None)


def nodes(count):
    graph = Graph()
    x = graph.placeholder("x")
    return [graph.call_function(aten.relu.default, (x,)) for _ in range(count)]


def made(specs, **fixed):
    plan = Plan({Site(node): spec for node, spec in specs.items()})
    observers = make_observers(None, plan, resolve(plan), NOTHING, **fixed)
    return [observers[Site(node)] for node in specs]


def only(spec, **fixed):
    return made({nodes(1)[0]: spec}, **fixed)[0]


def test_a_measured_spec_passes_its_fields():
    observer = only(quantizers.activation(quant_min=-100))
    assert isinstance(observer, MinMaxObserver)
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.int8, -100, 127)
    assert observer.qscheme == torch.per_tensor_affine


class Ema(MovingAveragePerChannelMinMaxObserver):
    """A subclass whose name says nothing."""


class Passing(PerChannelMinMaxObserver):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)


class Choosing(FakeQuantize):
    def __init__(self, **settings):
        super().__init__(observer=PerChannelMinMaxObserver, **settings)


class Defaulting(FakeQuantize):
    def __init__(self, observer=Passing, **settings):
        super().__init__(observer, **settings)


@pytest.mark.parametrize(
    "constructor",
    [
        Ema,
        Ema.with_args(averaging_constant=0.1),
        Passing,
        Choosing,
        Defaulting,
        FakeQuantize.with_args(observer=Ema),
        PerChannelMinMaxObserver,
        PerChannelMinMaxObserver.with_args(eps=2**-12),
        PerChannelMinMaxObserver.with_args(eps=2**-12).with_args(reduce_range=False),
        functools.partial(PerChannelMinMaxObserver, eps=2**-12),
        lambda **fields: PerChannelMinMaxObserver(**fields),
        FakeQuantize.with_args(observer=PerChannelMinMaxObserver),
        FakeQuantize.with_args(observer=PerChannelMinMaxObserver.with_args(eps=2**-12)),
        FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver),
    ],
    ids=[
        "subclass",
        "subclass with_args",
        "passing on",
        "fake choosing",
        "fake defaulting",
        "fake of a subclass",
        "class",
        "with_args",
        "with_args twice",
        "partial",
        "function",
        "fake",
        "fake with_args",
        "fused",
    ],
)
def test_the_channel_axis_arrives_whatever_the_constructor(constructor):
    observer = only(quantizers.weight(ch_axis=1, observer_or_fake_quant_ctr=constructor))
    assert observer.ch_axis == 1
    observer(torch.arange(6.0).reshape(2, 3))
    assert observer.calculate_qparams()[0].shape == (3,)


def test_an_observer_without_channels_is_not_given_an_axis():
    observer = only(quantizers.activation(ch_axis=0))
    assert isinstance(observer, MinMaxObserver)


@pytest.mark.parametrize("package", ["torch.ao.quantization", "torchao.quantization.pt2e"])
@pytest.mark.parametrize("name", ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_observers_of_other_packages(package, name):
    module = pytest.importorskip(package)
    kind = getattr(module, name)
    subclass = type("Renamed", (kind,), {})
    for constructor in (kind, subclass, subclass.with_args(eps=1e-6), module.FakeQuantize.with_args(observer=subclass)):
        observer = only(quantizers.weight(ch_axis=1, observer_or_fake_quant_ctr=constructor))
        assert observer.ch_axis == 1
    for other in ("MinMaxObserver", "HistogramObserver", "FakeQuantize"):  # They have no such argument.
        observer = only(
            quantizers.activation(qscheme=None, ch_axis=0, observer_or_fake_quant_ctr=getattr(module, other))
        )
        assert getattr(observer, "ch_axis", -1) == -1


def test_fixed_specs():
    spec = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 3, 0, 255, torch.per_tensor_affine)
    observer = only(spec)
    assert isinstance(observer, FixedQParamsObserver)
    assert [t.item() for t in observer.calculate_qparams()] == [1 / 256, 3]
    fake = only(spec, fixed=lambda **k: FixedQParamsFakeQuantize(FixedQParamsObserver.with_args(**k)))
    assert isinstance(fake, FixedQParamsFakeQuantize)


def product(observers):
    scales = [observer.calculate_qparams()[0] for observer in observers]
    return scales[0] * scales[-1], torch.zeros(1, dtype=torch.int32)


def derived(*sources):
    return DerivedQuantizationSpec(list(sources), product, torch.int32, qscheme=torch.per_tensor_affine)


def fixed(scale):
    return FixedQParamsQuantizationSpec(torch.int8, scale, 0)


def test_derived_specs_compute_with_the_observers_that_they_name():
    a, b, c = nodes(3)
    observer = made({c: derived(a, b), a: fixed(0.5), b: fixed(0.25)})[0]
    assert observer.calculate_qparams()[0].item() == 0.125
    assert observer.obs_or_fqs[0].scale.item() == 0.5


@pytest.mark.parametrize("seed", range(6))
def test_derived_specs_of_derived_specs_in_any_order(seed):
    a, b, c, d = nodes(4)
    specs = {a: fixed(0.5), b: derived(a, a), c: derived(b, a), d: derived(b, c, a)}
    items = list(specs.items())
    random.Random(seed).shuffle(items)
    observers = dict(zip(dict(items), made(dict(items)), strict=True))
    assert [observers[n].calculate_qparams()[0].item() for n in (b, c, d)] == [0.25, 0.125, 0.125]


def test_a_source_that_derives_from_an_earlier_source_is_no_circle():
    a, b, c, d = nodes(4)
    observers = made({d: derived(b, c), c: derived(b, a), b: derived(a, a), a: fixed(0.5)})
    assert observers[0].calculate_qparams()[0].item() == 0.03125


def test_derived_specs_in_a_circle():
    a, b = nodes(2)
    with pytest.raises(AnnotationError, match="derived specs form a circle"):
        made({a: derived(b), b: derived(a)})


def test_a_long_chain_of_derived_specs_needs_no_recursion():
    chain = nodes(3000)
    specs = {node: derived(source) for node, source in zip(chain[1:], chain, strict=False)}
    assert len(made(dict(reversed({chain[0]: fixed(0.5), **specs}.items())))) == 3000


def test_sites_of_a_group_have_one_observer():
    model = models.exported(models.branches)
    quantizers.static(model)
    from zeropoint.annotate.read import read_plan

    plan = read_plan(model)
    observers = make_observers(model, plan, resolve(plan), NOTHING)
    cat = models.find(model, "cat")
    assert len({id(observers[site]) for site in observers if site.node is cat}) == 1


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(torch.int8, lambda: None),
        quantizers.activation(observer_or_fake_quant_ctr=MinMaxObserver.with_args(unknown=1)),
        quantizers.activation(qscheme=torch.per_channel_affine, ch_axis=0),
    ],
)
def test_an_observer_that_refuses_its_arguments(spec):
    with pytest.raises(SpecError, match=r"^relu_default: "):
        only(spec)


@pytest.mark.parametrize("name", ["MinMaxObserver", "HistogramObserver"])
@pytest.mark.parametrize("package", ["zeropoint.numerics.observers", "torchao.quantization.pt2e"])
def test_what_an_observer_cannot_do_is_an_error_that_names_both(name, package):
    kind = getattr(pytest.importorskip(package), name)
    by_channel = quantizers.activation(qscheme=torch.per_channel_symmetric, ch_axis=0, observer_or_fake_quant_ctr=kind)
    words = rf"relu_default: .*{name}.*torch.per_channel_symmetric"
    with pytest.raises(SpecError, match=words):
        only(by_channel)
    with pytest.raises(SpecError, match=words):
        only(quantizers.weight(observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=kind)))
    if name == "HistogramObserver":
        with pytest.raises(SpecError, match=r"relu_default: .*HistogramObserver.*is_dynamic=True"):
            only(quantizers.activation(is_dynamic=True, observer_or_fake_quant_ctr=kind))


def test_what_is_built_must_be_an_observer():
    with pytest.raises(
        SpecError, match=r"relu_default: .*built a dict. Give the class of an observer or fake quantizer"
    ):
        only(quantizers.activation(observer_or_fake_quant_ctr=dict))


@dataclass(frozen=True, eq=False, slots=True)
class Guessed(QuantizationSpecBase):
    dtype: torch.dtype


def test_a_spec_of_no_known_kind():
    with pytest.raises(AnnotationError, match=r"relu_default: Guessed is no spec that an observer is made from"):
        only(Guessed(torch.int8))
