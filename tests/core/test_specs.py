"""Specs are values: equal when they would quantize equally."""

import functools

import models
import pytest
import torch

from zeropoint.core.errors import SpecError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
    constructor_key,
)
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers import HistogramObserver, MinMaxObserver

INT8 = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)


def like(**changes):
    fields = {name: getattr(INT8, name) for name in INT8.__dataclass_fields__}
    return QuantizationSpec(**{**fields, **changes})


def test_specs_with_equal_fields_are_equal():
    assert like() == INT8
    assert len({like(), INT8}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.int16}, {"quant_min": -127}, {"quant_max": 126}, {"qscheme": torch.per_tensor_symmetric},
        {"ch_axis": 0}, {"is_dynamic": True}, {"observer_or_fake_quant_ctr": HistogramObserver},
        {"observer_or_fake_quant_ctr": MinMaxObserver.with_args(eps=2**-12)},
    ],
)  # fmt: skip
def test_a_spec_that_differs_in_anything_is_another(changes):
    assert like(**changes) != INT8
    assert len({like(**changes), INT8}) == 2


def test_observers_made_separately_with_equal_arguments_are_equal():
    one, other = (like(observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


def test_nested_constructors_are_compared_by_value():
    def fake(constant):
        observer = MinMaxObserver.with_args(eps=constant)
        return like(observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer))

    assert fake(0.5) == fake(0.5)
    assert fake(0.5) != fake(0.25)


def test_constructors_of_any_kind_have_a_key():
    partial = functools.partial(MinMaxObserver, eps=1.0)
    assert constructor_key(partial) == constructor_key(functools.partial(MinMaxObserver, eps=1.0))
    assert constructor_key(partial) == constructor_key(MinMaxObserver.with_args(eps=1.0))
    unhashable = functools.partial(MinMaxObserver, factory_kwargs={"device": "cpu"})
    assert constructor_key(unhashable) == constructor_key(unhashable)
    hash(constructor_key(unhashable))


def test_a_legacy_dtype_equals_the_plain_one():
    assert like(dtype=torch.qint8) == INT8


def test_kinds_are_different():
    fixed = FixedQParamsQuantizationSpec(torch.int8, 0.5, 0)
    node = models.find(models.exported(models.linear), "linear")
    assert len({INT8, fixed, SharedQuantizationSpec(node), SharedQuantizationSpec((node, node))}) == 4
    assert SharedQuantizationSpec(node) == SharedQuantizationSpec(node)
    assert INT8 != "INT8"


def test_derived_specs_can_be_hashed_though_they_hold_a_list():
    node = models.find(models.exported(models.linear), "linear")

    def product(observers):
        raise NotImplementedError

    one, other = (DerivedQuantizationSpec([(node, node), node], product, torch.int32) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1


def test_specs_are_frozen_and_printable():
    with pytest.raises(AttributeError):
        INT8.dtype = torch.int16
    assert "torch.int8" in repr(INT8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_min": 5, "quant_max": 3}, "quant_min=5 is larger than quant_max=3"),
        ({"quant_min": -129}, r"quant_min=-129 does not fit torch.int8. Choose a value in -128..127"),
        ({"quant_max": 255}, "quant_max=255 does not fit torch.int8"),
        ({"ch_axis": -1}, "ch_axis=-1 is negative. Count axes from 0"),
        ({"dtype": "int8"}, "dtype is 'int8', not a torch.dtype"),
        ({"qscheme": "affine"}, "qscheme='affine' is unknown. Use one of torch.per_tensor_affine"),
        ({"qscheme": torch.per_channel_symmetric, "is_dynamic": True}, "is_dynamic=True does not go with"),
        ({"observer_or_fake_quant_ctr": None}, "observer_or_fake_quant_ctr=None is not callable"),
    ],
)
def test_fields_that_contradict_one_another(changes, words):
    with pytest.raises(SpecError, match=words) as error:
        like(**changes)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("scale", "zero_point", "words"),
    [
        (0.0, 0, "scale=0.0 is not a positive finite number"),
        (float("inf"), 0, "scale=inf"),
        (float("nan"), 0, "scale=nan"),
        (1.0, -200, "zero_point=-200 is below quant_min=-128"),
        (1.0, 200, "zero_point=200 is above quant_max=127"),
    ],
)
def test_fixed_values_that_cannot_be(scale, zero_point, words):
    with pytest.raises(SpecError, match=words):
        FixedQParamsQuantizationSpec(torch.int8, scale, zero_point, -128, 127)


def test_derived_from_must_be_a_list():
    with pytest.raises(SpecError, match="derived_from is not a list"):
        DerivedQuantizationSpec(3, lambda observers: None, torch.int32)
