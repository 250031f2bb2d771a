"""The four kinds of spec that an annotation holds: measured, fixed, shared and derived.

Field names and their order are those of the PT2E annotation API. Specs are frozen, hashable and compare by value:
two specs are equal when all their fields are, the arguments of the observer included, and a legacy dtype is that of the
same integers. A range of None is not equal to the whole range of the dtype, though both quantize alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from zeropoint.core.arguments import require_bool, require_integer, require_positive
from zeropoint.core.dtypes import INTEGER_DTYPES, check_dtype, integer_range, plain_dtype
from zeropoint.core.errors import SpecError

EdgeOrNode: TypeAlias = tuple[Node, Node] | Node
"""An edge ``(producer, consumer)``: what the consumer reads; or a node: what it returns."""

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def constructor_key(constructor: Any) -> object:
    """Returns a hashable value, equal for constructors that build equal observers.

    Unwraps ``functools.partial`` and any ``with_args`` wrapper (an object whose ``p`` is a partial), nested ones too.
    A value that cannot be hashed counts by identity, and a tensor does.
    """
    partial = constructor if isinstance(constructor, functools.partial) else getattr(constructor, "p", None)
    if isinstance(partial, functools.partial):
        late = getattr(constructor, "callable_args", {})
        positional = tuple(constructor_key(value) for value in partial.args)
        return constructor_key(partial.func), positional, _items_key(partial.keywords), _items_key(late)
    return ("identity", id(constructor)) if isinstance(constructor, torch.Tensor) else _value_key(constructor)


def _items_key(items: dict[str, Any]) -> frozenset[tuple[str, object]]:
    return frozenset((name, constructor_key(value)) for name, value in items.items())


def _value_key(value: Any) -> object:
    try:
        hash(value)
    except TypeError:
        return "identity", id(value)
    return value


class QuantizationSpecBase:
    """What one tensor is quantized to, or where that is found."""

    __slots__ = ()

    def key(self) -> tuple[object, ...]:
        """Returns the hashable value by which specs are compared."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return type(self).__name__, *(_field_key(name, value) for name, value in named)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, QuantizationSpecBase) and self.key() == other.key())

    def __hash__(self) -> int:
        return hash(self.key())


def _field_key(name: str, value: Any) -> object:
    match name:
        case "observer_or_fake_quant_ctr":
            return constructor_key(value)
        case "dtype":
            return plain_dtype(value)
        case "derived_from":
            return tuple(value)
        case _:
            return _value_key(value)


def _check_dtype_and_range(dtype: Any, quant_min: float | None, quant_max: float | None) -> None:
    check_dtype(dtype, "spec")
    bounds = {"quant_min": quant_min, "quant_max": quant_max}
    given = {name: require_integer(name, value, "spec") for name, value in bounds.items() if value is not None}
    if len(given) == 2 and given["quant_min"] > given["quant_max"]:
        raise SpecError(f"quant_min={quant_min} is larger than quant_max={quant_max}", where="spec")
    if plain_dtype(dtype) in INTEGER_DTYPES:
        low, high = integer_range(dtype)
        for name, value in given.items():
            if not low <= value <= high:
                remedy = f"Choose a value in {low}..{high}, or another dtype."
                raise SpecError(f"{name}={value} does not fit {dtype}", where="spec", remedy=remedy)
        given = {"quant_min": low, "quant_max": high, **given}
    if len(given) == 2 and given["quant_min"] == given["quant_max"]:
        what = f"quant_min and quant_max are both {given['quant_min']}"
        raise SpecError(what, where="spec", remedy="Choose quant_min < quant_max: a range has two integers at least.")


def _check_scheme(qscheme: Any, ch_axis: int | None, is_dynamic: bool) -> None:
    require_bool("is_dynamic", is_dynamic, "spec")
    if ch_axis is not None and require_integer("ch_axis", ch_axis, "spec") < 0:
        raise SpecError(f"ch_axis={ch_axis} is negative", where="spec", remedy="Count axes from 0.")
    if qscheme is not None and qscheme not in PER_TENSOR + PER_CHANNEL:
        allowed = ", ".join(str(s) for s in PER_TENSOR + PER_CHANNEL)
        raise SpecError(f"qscheme={qscheme!r} is unknown", where="spec", remedy=f"Use one of {allowed}.")
    if is_dynamic and qscheme in PER_CHANNEL:
        remedy = f"Use one of {', '.join(str(s) for s in PER_TENSOR)}."
        raise SpecError(f"is_dynamic=True does not go with {qscheme}", where="spec", remedy=remedy)


def _check_constructor(constructor: Any) -> None:
    what, remedy = f"observer_or_fake_quant_ctr={constructor!r}", "Give a class, or e.g. MinMaxObserver.with_args(...)."
    if not callable(constructor):
        raise SpecError(f"{what} is not callable", where="spec", remedy=remedy)
    if isinstance(constructor, torch.nn.Module):
        raise SpecError(f"{what} is built already; each tensor has one of its own", where="spec", remedy=remedy)


def _check_fixed(scale: Any, zero_point: Any, low: int | None, high: int | None) -> None:
    """``low`` and ``high`` are bounds of the zero point."""
    require_positive("scale", scale, "fixed spec")
    number, remedy = require_integer("zero_point", zero_point, "fixed spec"), "Choose one that the range holds."
    if low is not None and number < low:
        raise SpecError(f"zero_point={zero_point} is below quant_min={low}", where="fixed spec", remedy=remedy)
    if high is not None and number > high:
        raise SpecError(f"zero_point={zero_point} is above quant_max={high}", where="fixed spec", remedy=remedy)


@dataclass(frozen=True, eq=False, slots=True)
class QuantizationSpec(QuantizationSpecBase):
    """Quantize with a scale and zero point that an observer or fake quantizer measures.

    Args:
        dtype: storage type, e.g. ``torch.int8``. A float type means: observe nothing, leave float; ``torch.float16``:
            round to it and back.
        observer_or_fake_quant_ctr: class or ``with_args`` wrapper; called with the other fields to build the observer.
        quant_min, quant_max: range of the integers, inclusive; None: the whole range of ``dtype``.
        qscheme: a ``torch.per_tensor_*`` or ``torch.per_channel_*`` scheme.
        ch_axis: channel axis of a per-channel scheme, counted from 0.
        is_dynamic: choose scale and zero point from each input at run time.

    Raises:
        SpecError: a field cannot hold, or the fields contradict one another.
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        _check_dtype_and_range(self.dtype, self.quant_min, self.quant_max)
        _check_scheme(self.qscheme, self.ch_axis, self.is_dynamic)
        _check_constructor(self.observer_or_fake_quant_ctr)


@dataclass(frozen=True, eq=False, slots=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """Quantize with the given scale and zero point, e.g. 1/256 and 0 for a sigmoid's output.

    Raises:
        SpecError: the scale is not positive, the zero point lies outside of the range, or the scheme is per channel.
    """

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        _check_dtype_and_range(self.dtype, self.quant_min, self.quant_max)
        _check_scheme(self.qscheme, None, self.is_dynamic)
        if self.qscheme in PER_CHANNEL:
            remedy = f"Use one of {', '.join(str(s) for s in PER_TENSOR)}."
            raise SpecError(f"qscheme={self.qscheme} with one scale for all", where="fixed spec", remedy=remedy)
        is_integer = plain_dtype(self.dtype) in INTEGER_DTYPES
        low, high = integer_range(self.dtype) if is_integer else (None, None)
        low = low if self.quant_min is None else self.quant_min
        high = high if self.quant_max is None else self.quant_max
        _check_fixed(self.scale, self.zero_point, low, high)


@dataclass(frozen=True, eq=False, slots=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """Quantize with the scale and zero point of another edge or node."""

    edge_or_node: EdgeOrNode


@dataclass(frozen=True, eq=False, slots=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """Quantize with a scale and zero point computed from those of other edges or nodes, e.g. a bias.

    Args:
        derived_from: the edges and nodes whose observers ``derive_qparams_fn`` is given, in order.
        derive_qparams_fn: takes the list of observers, returns tensors ``(scale, zero_point)``.
    """

    derived_from: Sequence[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        _check_dtype_and_range(self.dtype, self.quant_min, self.quant_max)
        _check_scheme(self.qscheme, self.ch_axis, self.is_dynamic)
        if not isinstance(self.derived_from, Iterable):
            raise SpecError("derived_from is not a list of edges and nodes", where="derived spec")
        if not callable(self.derive_qparams_fn):
            what, remedy = f"derive_qparams_fn={self.derive_qparams_fn!r} is not callable", "Give a function."
            raise SpecError(what, where="derived spec", remedy=remedy)


def is_spec(value: Any) -> bool:
    """Returns whether a value is a spec of this package, or has the attributes of one of another's."""
    kinds = ("edge_or_node", "derive_qparams_fn", "observer_or_fake_quant_ctr", "zero_point")
    return isinstance(value, QuantizationSpecBase) or any(hasattr(value, name) for name in kinds)
