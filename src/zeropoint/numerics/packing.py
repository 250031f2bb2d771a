"""4-bit integers, two to a byte."""

from __future__ import annotations

import torch

from zeropoint.core.errors import SpecError

INT4_RANGE = (-8, 7)
UINT4_RANGE = (0, 15)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Returns the values packed two to a byte along the last axis, the first of each pair in the low nibble.

    A signed value keeps its two's complement bits. Where the last axis is odd, the high nibble of its last byte is 0.

    Args:
        values: int8 tensor in -8..7 or uint8 tensor in 0..15, shape ``(..., n)``.

    Returns:
        uint8 tensor of shape ``(..., ceil(n / 2))``.

    Raises:
        SpecError: another dtype, a scalar, or a value that does not fit 4 bits.
    """
    _check_packable(values)
    nibbles = values.view(torch.uint8) & 0xF
    if values.shape[-1] % 2 == 1:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the ``length`` values along the last axis that ``pack_int4`` packed.

    Args:
        packed: uint8 tensor of shape ``(..., ceil(length / 2))``.
        length: size of the last axis before packing; even or odd.
        dtype: int8 (values -8..7) or uint8 (values 0..15).

    Returns:
        tensor of ``dtype``, shape ``(..., length)``.

    Raises:
        SpecError: ``packed`` is not uint8, or its last axis does not hold ``length`` values.
    """
    nibble_range(dtype)
    if packed.dtype != torch.uint8:
        raise SpecError(f"packed values are {packed.dtype}, not torch.uint8", where="unpack_int4")
    if packed.ndim == 0 or packed.shape[-1] != (length + 1) // 2:
        found = tuple(packed.shape)
        what = f"shape {found} cannot hold {length} values in its last axis: needed are {(length + 1) // 2} bytes"
        raise SpecError(what, where="unpack_int4")
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]
    if dtype == torch.uint8:
        return nibbles.contiguous()
    return (nibbles ^ 8).view(torch.int8) - 8


def nibble_range(dtype: torch.dtype) -> tuple[int, int]:
    """Returns the range of 4-bit values held in ``dtype``: -8..7 for int8, 0..15 for uint8.

    Raises:
        SpecError: another dtype.
    """
    match dtype:
        case torch.int8:
            return INT4_RANGE
        case torch.uint8:
            return UINT4_RANGE
        case _:
            remedy = "Use torch.int8 for signed, torch.uint8 for unsigned values."
            raise SpecError(f"4-bit values are not held in {dtype}", remedy=remedy)


def _check_packable(values: torch.Tensor) -> None:
    low, high = nibble_range(values.dtype)
    if values.ndim == 0:
        raise SpecError("a scalar has no axis to pack along", where="pack_int4", remedy="Reshape it to (1,).")
    outside = values[(values < low) | (values > high)]
    if outside.numel():
        remedy = f"Quantize with quant_min={low}, quant_max={high}."
        raise SpecError(f"value {int(outside[0])} does not fit {low}..{high}", where="pack_int4", remedy=remedy)
