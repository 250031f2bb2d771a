"""Scale and zero point of a range of real values."""

from __future__ import annotations

import numpy as np
import torch

from zeropoint.core.dtypes import plain_dtype
from zeropoint.core.specs import SYMMETRIC

FLOAT32_EPS = float(torch.finfo(torch.float32).eps)
"""Smallest scale where the user gives none, as in PyTorch's observers."""
USUAL = 1e37
"""Differences of numbers below are float32."""


def choose_qparams(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    eps: float = FLOAT32_EPS,
    symmetric_zero_point: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale (float32) and zero point (int64) that cover ``[min_val, max_val]`` and hold zero exactly.

    The range is widened to hold 0. Symmetric: ``scale = max(|min|, |max|) / ((quant_max - quant_min) / 2)``. Affine:
    ``scale = (max - min) / (quant_max - quant_min)``, ``zero_point = quant_min - round(min / scale)``, clamped to the
    range (Jacob et al. 2018, section 2.1; rounding half to even, float32 arithmetic as in PyTorch's observers).

    Args:
        min_val, max_val: float tensors of one shape: ``()`` per tensor, ``(channels,)`` per channel, any per group.
        quant_min, quant_max: range of the integers, inclusive.
        symmetric: the zero point is ``symmetric_zero_point``, the middle of the integers.
        eps: smallest scale returned.

    Returns:
        ``(scale, zero_point)`` of the shape of ``min_val``.
    """
    low, high = min_val.clamp(max=0).float(), max_val.clamp(min=0).float()
    if symmetric:
        scale = torch.maximum(-low, high) / (float(quant_max - quant_min) / 2)
        scale = scale.clamp(min=eps)
        return scale, torch.full_like(scale, symmetric_zero_point, dtype=torch.int64)
    scale = ((high - low) / float(quant_max - quant_min)).clamp(min=eps)
    zero_point = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, zero_point.clamp(quant_min, quant_max)


def choose_qparams_in_numbers(
    low: float,
    high: float,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    eps: float,
    symmetric_zero_point: int,
) -> tuple[float, int]:
    """Returns what ``choose_qparams`` does, to the bit, of one range of less than ``USUAL``: in a tenth of the time.

    A sum, product or quotient of float32 in float64, rounded, is that in float32 (Figueroa 1995).
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(rounded(max(-low, high) / rounded((quant_max - quant_min) / 2)), rounded(eps)), symmetric_zero_point
    scale = max(rounded(rounded(high - low) / rounded(quant_max - quant_min)), rounded(eps))
    zero_point = quant_min - round(rounded(low / scale))
    return scale, min(max(zero_point, quant_min), quant_max)


def rounded(value: float) -> float:
    """Returns the nearest float32."""
    return float(np.float32(value))


def choose_float_qparams(
    min_val: torch.Tensor, max_val: torch.Tensor, quant_min: int, quant_max: int, *, eps: float = FLOAT32_EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and **float** zero point of ``[min_val, max_val]``, which need not hold zero.

    The scheme ``torch.per_channel_affine_float_qparams`` of embeddings: ``x = (q - zero_point) * scale``.
    """
    scale = (max_val - min_val).float() / float(quant_max - quant_min)
    scale = torch.where(scale > eps, scale, torch.ones_like(scale))
    return scale, -min_val.float() / scale


def choose_qparams_by_scheme(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    quant_min: int,
    quant_max: int,
    qscheme: torch.qscheme,
    *,
    eps: float,
    symmetric_zero_point: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what ``choose_qparams`` or ``choose_float_qparams`` does, whichever the scheme asks for."""
    limits = quant_min, quant_max
    if qscheme == torch.per_channel_affine_float_qparams:
        return choose_float_qparams(min_val, max_val, *limits, eps=eps)
    symmetric, middle = qscheme in SYMMETRIC, symmetric_zero_point
    return choose_qparams(min_val, max_val, *limits, symmetric=symmetric, eps=eps, symmetric_zero_point=middle)


def symmetric_zero_point(dtype: torch.dtype, quant_min: int, quant_max: int, *, custom_range: bool) -> int:
    """Returns the zero point of a symmetric scheme: 0 for signed types, the middle of the range for unsigned ones."""
    match plain_dtype(dtype):
        case torch.uint8:
            return (quant_min + quant_max) // 2 if custom_range or dtype == torch.quint4x2 else 128
        case torch.uint16:
            return 2**15
        case _:
            return 0
