"""Affine quantization: real values to integers and back, at every granularity.

    q = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)        x' = (q - zero_point) * scale

Rounding is half to even. The arithmetic is that of the ``quantized_decomposed`` operators, bit for bit
(torch/ao/quantization/fx/_decomposed.py): per tensor the reciprocal is taken in float64 and rounded to float32; else it
is taken in the dtype of the scale, and the product is float32, or float64 for a float64 scale. Four differences, of
which ``quantize_unchecked`` and ``dequantize_unchecked`` have the first two:

* Where ``quant_min`` or ``quant_max`` is no float32 number (the range of int32), torch clamps to the rounded bound and
  its conversion to an integer overflows; here the result is the bound.
* Integers and zero points are subtracted without overflow, whatever their dtypes; torch wraps in int8 or int32, and
  has no subtraction for uint16.
* Zero points and integers of int32 that float32 cannot hold are added and subtracted exactly; torch rounds them first.
* Real values of float16 and bfloat16 are those of float32, rounded once; torch rounds each step per tensor, so that
  integers of 16 bits overflow in float16.

NaN has no integer: what it becomes is not specified, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from zeropoint.core.arguments import require_integer, require_positive
from zeropoint.core.dtypes import FLOAT_DTYPES, INTEGER_DTYPES, checked_range, integer_range, plain_dtype
from zeropoint.core.errors import SpecError
from zeropoint.numerics.granularity import Granularity, PerTensor, block_counts, block_size, qparams_shape
from zeropoint.numerics.qparams import FLOAT32_EPS, choose_qparams

QuantizationScheme: TypeAlias = Literal["symmetric", "affine"]
"""symmetric: the zero point is the middle of the integers; affine: it is measured."""

ZeroPointAdded: TypeAlias = Literal["after_rounding", "before_rounding"]
"""When the zero point is added. ``quantize_per_token`` and ``quantize_per_channel_group`` add it before rounding, so
that a tie goes to the even **integer**; the other operators after, so that a tie goes to the even number of steps."""

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What can be quantized: the operators compute in float32."""

FLOAT32_INTEGERS = 2**24
"""Up to here float32 holds every integer."""

_PER_TENSOR = PerTensor()


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int,
    dtype: torch.dtype,
    *,
    quant_min: int | None = None,
    quant_max: int | None = None,
    granularity: Granularity = _PER_TENSOR,
    zero_point_added: ZeroPointAdded = "after_rounding",
) -> torch.Tensor:
    """Returns the integers of ``x``; values outside of the range, infinities too, become the nearest bound.

    Args:
        x: float32, float16 or bfloat16 tensor of any shape; the two short types are converted to float32 first.
        scale: positive; a number, or a tensor of ``qparams_shape(granularity, x.shape)``. The same values in one
            dimension, or with every axis kept (``block_counts``), are accepted too.
        zero_point: integers of the same shape within the range, or one number for all. A float tensor (any values) is
            accepted with ``zero_point_added="before_rounding"``: the scheme ``per_channel_affine_float_qparams``.
        dtype: int8, uint8, int16, uint16 or int32. 4-bit values: int8 with -8..7 or uint8 with 0..15.
        quant_min, quant_max: range of the integers, inclusive; None: the bound of ``dtype``.

    Returns:
        tensor of ``dtype``, shape of ``x``.

    Raises:
        SpecError: a dtype, range, shape, scale or zero point that cannot hold; the message says the value.
    """
    low, high = checked_range(dtype, quant_min, quant_max)
    check_floats(x, "quantize")
    scale, zero_point = checked_qparams(x.shape, scale, zero_point, granularity, (low, high), "quantize")
    if zero_point.is_floating_point() and zero_point_added == "after_rounding":
        remedy = 'Pass zero_point_added="before_rounding", or integers.'
        raise SpecError(f"zero_point is {zero_point.dtype}", where="quantize", remedy=remedy)
    if max(-low, high) > FLOAT32_INTEGERS and not zero_point.is_floating_point():
        zero_point = zero_point.double()  # Sums with it are float64, which holds every int32.
    integers = quantize_unchecked(x.float(), scale, zero_point, granularity, low, high, zero_point_added)
    return integers.to(plain_dtype(dtype))


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int,
    *,
    granularity: Granularity = _PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Returns the real values of integers, ``(q - zero_point) * scale``.

    Args:
        q: tensor of an integer storage dtype, any shape.
        scale, zero_point: as in ``quantize``.
        dtype: float32, float16, bfloat16 or float64. The short types get the float32 value, rounded once.

    Returns:
        tensor of ``dtype``, shape of ``q``.

    Raises:
        SpecError: a dtype, shape, scale or zero point that cannot hold; the message says the value.
    """
    check_integers(q, "dequantize")
    if dtype not in FLOAT_DTYPES:
        remedy = "Use torch.float32, float64, float16 or bfloat16; for the integers themselves, they are the argument."
        raise SpecError(f"dtype={dtype} is no type of real values", where="dequantize", remedy=remedy)
    integers = integer_range(q.dtype)
    scale, zero_point = checked_qparams(q.shape, scale, zero_point, granularity, integers, "dequantize")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    is_wide = q.dtype == torch.int32 and not zero_point.is_floating_point()
    if is_wide and scale.dtype in (torch.float32, torch.float64):
        return _dequantize_wide(q, scale, zero_point, granularity, compute).to(dtype)
    return dequantize_unchecked(q, scale, zero_point, granularity, compute).to(dtype)


def choose_qparams_blockwise(
    x: torch.Tensor,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
    *,
    scheme: QuantizationScheme = "affine",
    eps: float = FLOAT32_EPS,
    symmetric_zero_point: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale (float32) and zero point (int64) that cover the smallest and largest value of each block.

    Args:
        x: float tensor of any shape with at least one element.
        quant_min, quant_max: range of the integers, inclusive.
        eps: smallest scale returned.
        symmetric_zero_point: the zero point where ``scheme`` is ``"symmetric"``.

    Returns:
        ``(scale, zero_point)`` of ``qparams_shape(granularity, x.shape)``. NaN and infinity in a block give a scale
        that is not finite.

    Raises:
        SpecError: ``x`` is empty or holds no floats, ``eps`` is not above 0, or the granularity does not go with its
            shape.
    """
    check_floats(x, "choose_qparams")
    require_positive("eps", eps, "choose_qparams")
    if x.numel() == 0:
        raise SpecError(f"x of shape {tuple(x.shape)} has no element to measure", where="choose_qparams")
    view, qparams_view = _views(x.shape, block_size(granularity, x.shape))
    reduced = [axis for axis, count in enumerate(qparams_view) if count == 1]
    blocks = x.reshape(view)
    low, high = (blocks.amin(reduced), blocks.amax(reduced)) if reduced else (blocks, blocks)
    shape, symmetric = qparams_shape(granularity, x.shape), scheme == "symmetric"
    ends = (low.reshape(shape), high.reshape(shape))
    return choose_qparams(
        *ends, quant_min, quant_max, symmetric=symmetric, eps=eps, symmetric_zero_point=symmetric_zero_point
    )


def quantize_unchecked(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    granularity: Granularity,
    quant_min: int,
    quant_max: int,
    zero_point_added: ZeroPointAdded,
) -> torch.Tensor:
    """Returns the integers of ``x`` as a float tensor; no value is read, so a compiler can trace it."""
    if granularity == _PER_TENSOR:
        view, qparams_view, inverse = x.shape, (), (1.0 / scale.double()).to(x.dtype)
    else:
        (view, qparams_view), inverse = _views(x.shape, block_size(granularity, x.shape)), 1.0 / scale
    steps = x.reshape(view) * inverse.reshape(qparams_view)
    shift = zero_point.reshape(qparams_view)
    if shift.dtype == torch.float64:  # One value alone would not make the sum float64.
        steps = steps.double()
    match zero_point_added:
        case "after_rounding":
            integers = torch.round(steps) + shift
        case "before_rounding":
            integers = torch.round(steps + shift)
    return _saturated(integers, quant_min, quant_max).reshape(x.shape)


def dequantize_unchecked(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, granularity: Granularity, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the real values of integers; no value is read, so a compiler can trace it."""
    if granularity == _PER_TENSOR:
        return _dequantize_per_tensor(q, scale, zero_point, dtype)
    view, qparams_view = _views(q.shape, block_size(granularity, q.shape))
    exact = torch.int64 if q.dtype == torch.int32 else torch.int32
    shift = zero_point if zero_point.is_floating_point() else zero_point.to(exact)
    steps = q.to(exact).reshape(view) - shift.reshape(qparams_view)
    return (steps * scale.reshape(qparams_view)).to(dtype).reshape(q.shape)


def _dequantize_per_tensor(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Arithmetic in ``dtype``, as torch's operator: each step of a 16-bit type is taken in float32, then rounded."""
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    steps = (q.to(dtype).to(compute) - zero_point.reshape(()).to(compute)).to(dtype)
    return (steps.to(compute) * scale.reshape(()).to(compute)).to(dtype)


def _dequantize_wide(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, granularity: Granularity, dtype: torch.dtype
) -> torch.Tensor:
    """For int32: float32 holds neither all integers nor all differences. Up to 2**24 the bits are the same."""
    if granularity == _PER_TENSOR:
        view, qparams_view, scale = q.shape, (), scale.to(dtype)
    else:
        view, qparams_view = _views(q.shape, block_size(granularity, q.shape))
    steps = q.to(torch.int64).reshape(view) - zero_point.reshape(qparams_view)
    return (steps.double() * scale.double().reshape(qparams_view)).to(dtype).reshape(q.shape)


def _saturated(integers: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    """Clamps; in float64 where the float type cannot hold the bounds, since a bound that is rounded up overflows."""
    consecutive = 2 / torch.finfo(integers.dtype).eps
    if max(abs(quant_min), abs(quant_max)) > consecutive:
        integers = integers.double()
    return integers.clamp(quant_min, quant_max)


def _views(shape: Sequence[int], blocks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the shapes in which a tensor and its scale broadcast: an axis of several blocks becomes two axes."""
    view: list[int] = []
    qparams_view: list[int] = []
    for size, block in zip(shape, blocks, strict=True):
        if block == size:
            view, qparams_view = [*view, size], [*qparams_view, 1]
        elif block == 1:
            view, qparams_view = [*view, size], [*qparams_view, size]
        else:
            view, qparams_view = [*view, size // block, block], [*qparams_view, size // block, 1]
    return view, qparams_view


def checked_qparams(
    shape: Sequence[int],
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int,
    granularity: Granularity,
    integers: tuple[int, int],
    where: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point as tensors of the right number of elements and values."""
    if not isinstance(scale, torch.Tensor):
        scale = torch.tensor(require_positive("scale", scale, where), dtype=torch.float64)
    if not isinstance(zero_point, torch.Tensor):
        zero_point = torch.full_like(scale, require_integer("zero_point", zero_point, where), dtype=torch.int64)
    if not zero_point.is_floating_point():
        zero_point = zero_point.to(torch.int64)
    check_qparams_shape("scale", scale, granularity, shape, where)
    check_qparams_shape("zero_point", zero_point, granularity, shape, where)
    if _is_readable(scale) and _is_readable(zero_point):
        _check_scale(scale, where)
        _check_zero_point(zero_point, *integers, where)
    return scale, zero_point


def check_qparams_shape(
    name: str, qparams: torch.Tensor, granularity: Granularity, shape: Sequence[int], where: str
) -> None:
    """Refuses a scale or zero point with the wrong number of elements or the wrong axes for a tensor of this shape.

    Raises:
        SpecError: the message says both shapes.
    """
    counts, needed = block_counts(granularity, shape), qparams_shape(granularity, shape)
    found = tuple(qparams.shape)
    if found in (counts, needed):
        return
    flat = 1
    for count in counts:
        flat = flat * count
    if found == (flat,) or (flat == 1 and qparams.numel() == 1):
        return
    what = f"{name} has shape {found}; {granularity} of a tensor of shape {tuple(shape)} needs {needed}"
    raise SpecError(what, where=where, remedy=f"Give {name} one value for each block.")


def _is_readable(tensor: torch.Tensor) -> bool:
    """False for a tensor without values: on the meta device, fake, or being traced."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _check_scale(scale: torch.Tensor, where: str) -> None:
    narrow = scale.detach().float()
    wrong = ~((narrow > 0) & narrow.isfinite() & (1.0 / narrow).isfinite())
    if wrong.any():
        value = scale[wrong].flatten()[0].item()
        remedy = "A scale is positive and finite, and so is its reciprocal in float32."
        raise SpecError(f"scale={value} is not usable", where=where, remedy=remedy)


def _check_zero_point(zero_point: torch.Tensor, quant_min: int, quant_max: int, where: str) -> None:
    if zero_point.is_floating_point():
        return
    wrong = (zero_point < quant_min) | (zero_point > quant_max)
    if wrong.any():
        value = zero_point[wrong].flatten()[0].item()
        raise SpecError(f"zero_point={value} lies outside of {quant_min}..{quant_max}", where=where)


def check_floats(x: Any, where: str) -> None:
    """Refuses what is no tensor of ``INPUT_DTYPES``.

    Raises:
        SpecError: the message says what it is.
    """
    if not isinstance(x, torch.Tensor):
        raise SpecError(f"x is {type(x).__name__}, not a tensor", where=where, remedy="Give torch.tensor(x).")
    if x.dtype not in INPUT_DTYPES:
        remedy = "Convert it with x.float()."
        raise SpecError(f"x is {x.dtype}, not float32, float16 or bfloat16", where=where, remedy=remedy)


def check_integers(q: Any, where: str) -> None:
    """Refuses what is no tensor of an integer storage type.

    Raises:
        SpecError: the message says what it is.
    """
    if not isinstance(q, torch.Tensor):
        what = f"the integers are {type(q).__name__}, not a tensor"
        raise SpecError(what, where=where, remedy="Give torch.tensor(integers, dtype=torch.int8).")
    if q.dtype not in INTEGER_DTYPES:
        allowed = ", ".join(str(d) for d in INTEGER_DTYPES)
        raise SpecError(f"the integers are {q.dtype}", where=where, remedy=f"Use one of {allowed}.")
