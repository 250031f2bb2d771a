"""The integer types that tensors are quantized to, and their ranges."""

from __future__ import annotations

import torch

from zeropoint.core.errors import SpecError

INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
"""Storage types of quantized tensors. 4-bit values are held in int8 / uint8 with a narrower range."""

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
        SpecError: the range is empty or does not fit the dtype.
    """
    low, high = integer_range(dtype)
    chosen_low = low if quant_min is None else int(quant_min)
    chosen_high = high if quant_max is None else int(quant_max)
    if not low <= chosen_low < chosen_high <= high:
        raise SpecError(
            f"quant_min={chosen_low}, quant_max={chosen_high} is no range within {dtype}",
            remedy=f"Choose {low} <= quant_min < quant_max <= {high}.",
        )
    return chosen_low, chosen_high
