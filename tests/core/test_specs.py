"""Specs are values: equal when all their fields are."""

import copy
import functools

import models
import numpy as np
import pytest
import torch

from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES, INTEGER_DTYPES, LEGACY_DTYPES
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
    constructor_key,
)
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers import HistogramObserver, MinMaxObserver, PlaceholderObserver

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


@pytest.mark.parametrize("argument", [[1, 2], {"device": "cpu"}, torch.ones(2), np.ones(2)])
def test_positional_arguments_of_constructors_count_by_identity_where_they_have_no_hash(argument):
    def spec(value):
        return like(observer_or_fake_quant_ctr=functools.partial(MinMaxObserver, value))

    one, other = spec(argument), spec(copy.copy(argument))
    assert one == spec(argument) != other
    assert len({one, other, spec(argument)}) == 2


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
        ({"observer_or_fake_quant_ctr": MinMaxObserver()}, r"is built already.*Give a class, or .*with_args"),
        ({"observer_or_fake_quant_ctr": FakeQuantize()}, "is built already"),
        ({"quant_min": 3, "quant_max": 3}, "quant_min and quant_max are both 3. Choose quant_min < quant_max"),
        ({"quant_min": 127, "quant_max": None}, "quant_min and quant_max are both 127"),
        ({"quant_min": -1.5}, "quant_min=-1.5 is no integer. Give an int"),
        ({"quant_max": True}, "quant_max=True is no integer"),
        ({"quant_max": "127"}, "quant_max='127' is no integer"),
        ({"quant_max": float("nan")}, "quant_max=nan is no integer"),
        ({"ch_axis": "0"}, "ch_axis='0' is no integer"),
        ({"ch_axis": 1.5}, "ch_axis=1.5 is no integer"),
        ({"is_dynamic": "yes"}, "is_dynamic='yes' is no bool. Give True or False"),
    ],
)
def test_fields_that_contradict_one_another(changes, words):
    with pytest.raises(SpecError, match=words) as error:
        like(**changes)
    assert isinstance(error.value, ValueError)


IMPOSSIBLE = (torch.int64, torch.bool, torch.complex64, torch.int4, torch.uint4, torch.float8_e8m0fnu, torch.uint32)


@pytest.mark.parametrize("dtype", IMPOSSIBLE, ids=str)
@pytest.mark.parametrize("observer", [MinMaxObserver, PlaceholderObserver])
def test_types_that_nothing_is_quantized_to(dtype, observer):
    words = f"dtype={dtype} is no type to quantize to. Use one of torch.int8, .*for 4 bits torch.int8 with quant_min=-8"
    with pytest.raises(SpecError, match=words):
        QuantizationSpec(dtype, observer)
    with pytest.raises(SpecError, match=words):
        DerivedQuantizationSpec([], len, dtype)
    with pytest.raises(SpecError, match=words):
        FixedQParamsQuantizationSpec(dtype, 1.0, 0)


@pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, *LEGACY_DTYPES, *FLOAT8_DTYPES, *FLOAT_DTYPES], ids=str)
def test_types_of_measured_specs(dtype):
    assert QuantizationSpec(dtype, PlaceholderObserver).dtype == dtype


def test_numbers_of_other_packages_are_numbers():
    spec = like(quant_min=np.int64(-8), quant_max=7.0, ch_axis=np.int32(1))
    assert (spec.quant_min, spec.quant_max, spec.ch_axis) == (-8, 7, 1)
    FixedQParamsQuantizationSpec(torch.int8, torch.tensor(0.5), torch.tensor([3]))
    FixedQParamsQuantizationSpec(torch.int8, np.float32(0.5), np.int64(3))


@pytest.mark.parametrize(
    ("scale", "zero_point", "words"),
    [
        (0.0, 0, "scale=0.0 is not a positive finite number"),
        (float("inf"), 0, "scale=inf"),
        (float("nan"), 0, "scale=nan"),
        (1.0, -200, "zero_point=-200 is below quant_min=-128"),
        (1.0, 200, "zero_point=200 is above quant_max=127"),
        ("x", 0, "scale='x' is not a positive finite number"),
        (True, 0, "scale=True is not a positive finite number"),
        (torch.ones(3), 0, "is not a positive finite number"),
        (1.0, 1.5, "zero_point=1.5 is no integer"),
        (1.0, False, "zero_point=False is no integer"),
    ],
)
def test_fixed_values_that_cannot_be(scale, zero_point, words):
    with pytest.raises(SpecError, match=words):
        FixedQParamsQuantizationSpec(torch.int8, scale, zero_point, -128, 127)


def test_a_fixed_zero_point_lies_in_the_range_of_the_dtype():
    with pytest.raises(SpecError, match="zero_point=300 is above quant_max=127"):
        FixedQParamsQuantizationSpec(torch.int8, 1.0, 300)
    with pytest.raises(SpecError, match="zero_point=-1 is below quant_min=0"):
        FixedQParamsQuantizationSpec(torch.quint8, 1.0, -1, None, 100)


def test_one_fixed_scale_is_no_scale_per_channel():
    words = "qscheme=torch.per_channel_affine with one scale for all. Use one of torch.per_tensor_affine"
    with pytest.raises(SpecError, match=words):
        FixedQParamsQuantizationSpec(torch.int8, 1.0, 0, qscheme=torch.per_channel_affine)


def test_a_derived_spec_has_a_function():
    with pytest.raises(SpecError, match="derive_qparams_fn=3 is not callable"):
        DerivedQuantizationSpec([], 3, torch.int32)


@pytest.mark.parametrize("role", ["input_activation", "output_activation", "weight", "bias"])
def test_a_configuration_holds_specs(role):
    roles = dict.fromkeys(("input_activation", "output_activation", "weight", "bias"), INT8)
    assert QuantizationConfig(**{**roles, role: None})
    with pytest.raises(SpecError, match=f"QuantizationConfig: {role}=3 is no quantization spec. Give a Quantiz"):
        QuantizationConfig(**{**roles, role: 3})
    with pytest.raises(SpecError, match="is_qat=1 is no bool"):
        QuantizationConfig(**roles, is_qat=1)


def test_derived_from_must_be_a_list():
    with pytest.raises(SpecError, match="derived_from is not a list"):
        DerivedQuantizationSpec(3, lambda observers: None, torch.int32)
