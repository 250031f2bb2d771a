"""The integer types that tensors are quantized to, and their ranges."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import SpecError

INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
"""Storage types of quantized tensors. 4-bit values are held in int8 / uint8 with a narrower range."""

FLOAT8_DTYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
"""Float types that have a scale, as integers do; for observers of other packages."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that an observer without statistics may have: float16 rounds to it and back, the others leave float."""

LEGACY_DTYPES = {
    torch.qint8: torch.int8,
    torch.quint8: torch.uint8,
    torch.qint32: torch.int32,
    torch.quint4x2: torch.uint8,
}
"""torch's older quantized types, and the plain type that holds the same integers."""


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the plain integer dtype of a legacy ``torch.q*`` dtype; any other dtype as it is."""
    return LEGACY_DTYPES.get(dtype, dtype)


def is_float(value: object) -> bool:
    """True for a tensor of real values."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def check_dtype(dtype: Any, where: str = "") -> None:
    """Refuses a dtype that a tensor neither is quantized to nor stays float by.

    Raises:
        SpecError: says the dtype, and which there are.
    """
    if not isinstance(dtype, torch.dtype):
        raise SpecError(f"dtype is {dtype!r}, not a torch.dtype", where=where, remedy="Use e.g. torch.int8.")
    if plain_dtype(dtype) not in INTEGER_DTYPES + FLOAT8_DTYPES + FLOAT_DTYPES:
        allowed = ", ".join(str(d) for d in INTEGER_DTYPES)
        remedy = f"Use one of {allowed}; for 4 bits torch.int8 with quant_min=-8, quant_max=7; torch.float32 for float."
        raise SpecError(f"dtype={dtype} is no type to quantize to", where=where, remedy=remedy)


def integer_range(dtype: torch.dtype) -> tuple[int, int]:
    """Returns the smallest and largest value of an integer dtype.

    Raises:
        SpecError: ``dtype`` is not one that tensors are quantized to.
    """
    if dtype == torch.quint4x2:
        return 0, 15
    plain = plain_dtype(dtype)
    if plain not in INTEGER_DTYPES:
        allowed = ", ".join(str(d) for d in INTEGER_DTYPES)
        raise SpecError(f"cannot quantize to {dtype}", remedy=f"Use one of {allowed}.")
    info = torch.iinfo(plain)
    return int(info.min), int(info.max)


def checked_range(dtype: torch.dtype, quant_min: int | None, quant_max: int | None) -> tuple[int, int]:
    """Returns ``(quant_min, quant_max)`` with the dtype's own bounds where one is None.

    Raises:
        SpecError: a bound is no integer, or the range is empty or does not fit the dtype.
    """
    low, high = integer_range(dtype)
    chosen_low = low if quant_min is None else require_integer("quant_min", quant_min)
    chosen_high = high if quant_max is None else require_integer("quant_max", quant_max)
    if not low <= chosen_low < chosen_high <= high:
        raise SpecError(
            f"quant_min={chosen_low}, quant_max={chosen_high} is no range within {dtype}",
            remedy=f"Choose {low} <= quant_min < quant_max <= {high}.",
        )
    return chosen_low, chosen_high
