"""The ``quantized_decomposed`` operators, which converted graphs are written in.

torch registers them when ``torch.ao.quantization.fx._decomposed`` is imported. Should a torch no longer have that
module, ``define_ops`` registers operators of the same names and schemas, which compute with ``affine``. They give the
same bits, with three exceptions: the two that ``affine`` names; and the choice of scale and zero point per tensor is
made in float32 for 16-bit inputs too. float8 types are torch's alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zeropoint.core.dtypes import checked_range
from zeropoint.core.errors import SpecError
from zeropoint.numerics.affine import (
    ZeroPointAdded,
    check_floats,
    check_integers,
    check_qparams_shape,
    dequantize_unchecked,
    quantize_unchecked,
)
from zeropoint.numerics.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerToken
from zeropoint.numerics.qparams import FLOAT32_EPS, choose_qparams

NAMESPACE = "quantized_decomposed"
TORCH_MODULE = "torch.ao.quantization.fx._decomposed"
"""Importing it registers the operators: torch 2.0 to at least 2.13."""


@dataclass(frozen=True, slots=True)
class _Definition:
    """An operator of the fallback: ``compute`` for values, ``shape`` for what a meta or fake tensor gives."""

    name: str
    schema: str
    compute: Callable[..., Any]
    shape: Callable[..., Any]


def ensure_registered() -> Any:
    """Returns ``torch.ops.quantized_decomposed`` with its operators registered: by torch, else by ``define_ops``."""
    try:
        importlib.import_module(TORCH_MODULE)
    except ModuleNotFoundError as error:
        if error.name is None or not TORCH_MODULE.startswith(error.name):
            raise
    define_ops(NAMESPACE)
    return getattr(torch.ops, NAMESPACE)


def define_ops(namespace: str) -> tuple[str, ...]:
    """Registers the operators of this file that ``torch.ops.<namespace>`` lacks, and returns their qualified names.

    An operator that is registered already is left as it is, so a second call registers nothing.
    """
    missing = tuple(d for d in _DEFINITIONS if not _is_registered(namespace, d.name))
    for definition in missing:
        qualified = f"{namespace}::{definition.name}"
        torch.library.define(qualified, definition.schema)
        torch.library.impl(qualified, "default", definition.compute)
        torch.library.register_fake(qualified, definition.shape)
    return tuple(f"{namespace}::{d.name}" for d in missing)


def _is_registered(namespace: str, name: str) -> bool:
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    return found is not None and (overload or "default") in found.overloads()


def _checked_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    granularity: Granularity,
    integers: tuple[int, int, torch.dtype],
    zero_point_added: ZeroPointAdded,
) -> torch.Tensor:
    quant_min, quant_max, dtype = integers
    checked_range(dtype, quant_min, quant_max)
    check_qparams_shape("scale", scale, granularity, x.shape, "quantize")
    check_qparams_shape("zero_point", zero_point, granularity, x.shape, "quantize")
    result = quantize_unchecked(x, scale, zero_point, granularity, quant_min, quant_max, zero_point_added)
    return result.to(dtype)


def _checked_dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    granularity: Granularity,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    check_integers(q, "dequantize")
    if q.dtype != dtype:
        raise SpecError(f"the integers are {q.dtype}, the operator says {dtype}", where="dequantize")
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int64)
    check_qparams_shape("scale", scale, granularity, q.shape, "dequantize")
    check_qparams_shape("zero_point", zero_point, granularity, q.shape, "dequantize")
    return dequantize_unchecked(q, scale, zero_point, granularity, torch.float32 if out_dtype is None else out_dtype)


def _float32(x: torch.Tensor) -> torch.Tensor:
    check_floats(x, "quantize")
    return x.float()


def _quantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    step, zero = torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point)
    return _quantize_per_tensor_tensor(x, step, zero, quant_min, quant_max, dtype)


def _quantize_per_tensor_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    step, zero = scale.reshape(()), zero_point.reshape(())
    return _checked_quantize(_float32(x), step, zero, PerTensor(), (quant_min, quant_max, dtype), "after_rounding")


def _dequantize_per_tensor(
    q: torch.Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    step, zero = torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point)
    return _checked_dequantize(q, step, zero, PerTensor(), dtype, out_dtype)


def _dequantize_per_tensor_tensor(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _checked_dequantize(q, scale, zero_point, PerTensor(), dtype, out_dtype)


def _quantize_per_channel(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    integers = (quant_min, quant_max, dtype)
    return _checked_quantize(_float32(x), scales, zero_points, PerAxis(axis), integers, "after_rounding")


def _dequantize_per_channel(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _checked_dequantize(q, scales, zero_points, PerAxis(axis), dtype, out_dtype)


def _quantize_per_token(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    return _checked_quantize(x, scales, zero_points, PerToken(), (quant_min, quant_max, dtype), "before_rounding")


def _dequantize_per_token(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return _checked_dequantize(q, scales, zero_points, PerToken(), dtype, output_dtype)


def _group(x: torch.Tensor, scales: torch.Tensor, group_size: int) -> PerGroup:
    """Returns the groups along a row; one scale for a row shorter than the group (GPTQ's last columns) is that row."""
    length = x.shape[-1]
    return PerGroup(length if group_size > length and scales.shape[-1] == 1 else group_size)


def _quantize_per_channel_group(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
) -> torch.Tensor:
    group, integers = _group(x, scales, group_size), (quant_min, quant_max, dtype)
    return _checked_quantize(x, scales, zero_points, group, integers, "before_rounding")


def _dequantize_per_channel_group(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return _checked_dequantize(q, scales, zero_points, _group(q, scales, group_size), dtype, output_dtype)


def _choose_qparams(
    x: torch.Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    checked_range(dtype, quant_min, quant_max)
    low, high = _float32(x).aminmax()
    scale, zero_point = choose_qparams(low, high, quant_min, quant_max, symmetric=False, eps=eps)
    return scale.double().reshape(1), zero_point.reshape(1)


def _choose_qparams_symmetric(
    x: torch.Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    checked_range(dtype, quant_min, quant_max)
    low, high = _float32(x).aminmax()
    middle = 128 if dtype == torch.uint8 else 0
    scale, zero_point = choose_qparams(
        low, high, quant_min, quant_max, symmetric=True, eps=eps, symmetric_zero_point=middle
    )
    return scale.double().reshape(1), zero_point.reshape(1)


def _choose_qparams_per_token_asymmetric(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The zero point is taken from the end of the range where its error is smaller, as XNNPACK does at run time.

    Source: XNNPACK src/xnnpack/quantization.h, xnn_f32_qd8_asymmetric_quantization_params. ``dtype`` is not used: the
    range is that of int8.
    """
    quant_min, quant_max = -128, 127
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / float(quant_max - quant_min)).clamp(min=FLOAT32_EPS)
    at_low, at_high = low / scale, high / scale
    zero_point = torch.where((quant_min + at_low) + (quant_max + at_high) > 0, quant_min - at_low, quant_max - at_high)
    return scale.double(), zero_point.clamp(quant_min, quant_max).round().to(torch.int64)


def _like(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Returns a tensor like ``x`` of the last dtype among the arguments: that of the result in these schemas."""
    return torch.empty_like(x, dtype=[a for a in arguments if isinstance(a, torch.dtype)][-1])


def _dequantized_like(q: torch.Tensor, *_: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32 if out_dtype is None else out_dtype)


def _qparams_per_tensor(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(1, dtype=torch.float64), x.new_empty(1, dtype=torch.int64)


def _qparams_per_token(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], 1)
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


_TENSOR_QPARAMS = "Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, ScalarType dtype"
_NUMBER_QPARAMS = "Tensor input, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype"
_OUT = ", *, ScalarType? out_dtype=None"
_RANGE = "int quant_min, int quant_max, ScalarType dtype"
_SCALES = "Tensor input, Tensor scales, Tensor zero_points"
_OPTIONAL = "Tensor input, Tensor scales, Tensor? zero_points"
_CHOOSE = "(Tensor input, int quant_min, int quant_max, float eps, ScalarType dtype) -> (Tensor, Tensor)"

_DEFINITIONS = tuple(
    _Definition(*row)
    for row in (
        ("quantize_per_tensor", f"({_NUMBER_QPARAMS}) -> Tensor", _quantize_per_tensor, _like),
        ("quantize_per_tensor.tensor", f"({_TENSOR_QPARAMS}) -> Tensor", _quantize_per_tensor_tensor, _like),
        ("dequantize_per_tensor", f"({_NUMBER_QPARAMS}{_OUT}) -> Tensor", _dequantize_per_tensor, _dequantized_like),
        (
            "dequantize_per_tensor.tensor",
            f"({_TENSOR_QPARAMS}{_OUT}) -> Tensor",
            _dequantize_per_tensor_tensor,
            _dequantized_like,
        ),
        ("quantize_per_channel", f"({_SCALES}, int axis, {_RANGE}) -> Tensor", _quantize_per_channel, _like),
        (
            "dequantize_per_channel",
            f"({_OPTIONAL}, int axis, {_RANGE}{_OUT}) -> Tensor",
            _dequantize_per_channel,
            _dequantized_like,
        ),
        ("quantize_per_token", f"({_SCALES}, {_RANGE}) -> Tensor", _quantize_per_token, _like),
        (
            "dequantize_per_token",
            f"({_SCALES}, {_RANGE}, ScalarType output_dtype) -> Tensor",
            _dequantize_per_token,
            _like,
        ),
        (
            "quantize_per_channel_group",
            f"({_SCALES}, {_RANGE}, int group_size) -> Tensor",
            _quantize_per_channel_group,
            _like,
        ),
        (
            "dequantize_per_channel_group",
            f"({_OPTIONAL}, {_RANGE}, int group_size, ScalarType output_dtype) -> Tensor",
            _dequantize_per_channel_group,
            _like,
        ),
        ("choose_qparams.tensor", _CHOOSE, _choose_qparams, _qparams_per_tensor),
        ("choose_qparams_symmetric.tensor", _CHOOSE, _choose_qparams_symmetric, _qparams_per_tensor),
        (
            "choose_qparams_per_token_asymmetric",
            "(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
            _choose_qparams_per_token_asymmetric,
            _qparams_per_token,
        ),
    )
)

_OPS = ensure_registered()

QUANTIZE_PER_TENSOR = _OPS.quantize_per_tensor.default
QUANTIZE_PER_TENSOR_TENSOR = _OPS.quantize_per_tensor.tensor
QUANTIZE_PER_CHANNEL = _OPS.quantize_per_channel.default
QUANTIZE_PER_TOKEN = _OPS.quantize_per_token.default
QUANTIZE_PER_CHANNEL_GROUP = _OPS.quantize_per_channel_group.default

DEQUANTIZE_PER_TENSOR = _OPS.dequantize_per_tensor.default
DEQUANTIZE_PER_TENSOR_TENSOR = _OPS.dequantize_per_tensor.tensor
DEQUANTIZE_PER_CHANNEL = _OPS.dequantize_per_channel.default
DEQUANTIZE_PER_TOKEN = _OPS.dequantize_per_token.default
DEQUANTIZE_PER_CHANNEL_GROUP = _OPS.dequantize_per_channel_group.default

CHOOSE_QPARAMS = _OPS.choose_qparams.tensor
CHOOSE_QPARAMS_SYMMETRIC = _OPS.choose_qparams_symmetric.tensor
CHOOSE_QPARAMS_PER_TOKEN_ASYMMETRIC = _OPS.choose_qparams_per_token_asymmetric.default

QUANTIZE_OPS = (
    QUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR_TENSOR,
    QUANTIZE_PER_CHANNEL,
    QUANTIZE_PER_TOKEN,
    QUANTIZE_PER_CHANNEL_GROUP,
)
"""Real values to integers. Argument 0 is the tensor, 1 the scale, 2 the zero point."""

DEQUANTIZE_OPS = (
    DEQUANTIZE_PER_TENSOR,
    DEQUANTIZE_PER_TENSOR_TENSOR,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TOKEN,
    DEQUANTIZE_PER_CHANNEL_GROUP,
)
"""Integers to real values. Argument 0 is the tensor, 1 the scale, 2 the zero point."""

CHOOSE_QPARAMS_OPS = (CHOOSE_QPARAMS, CHOOSE_QPARAMS_SYMMETRIC, CHOOSE_QPARAMS_PER_TOKEN_ASYMMETRIC)
"""Return ``(scale, zero_point)`` of argument 0, at run time."""
