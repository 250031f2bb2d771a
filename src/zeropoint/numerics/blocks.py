"""Quantize a large constant in pieces that stay in the processor's cache."""

from __future__ import annotations

import torch

from zeropoint.numerics.scratch import scratch

BLOCK = 2**18
"""Elements of a piece: 1 MB of float32. Smaller ones spend their time in calls, larger ones leave the cache: a weight
of 3072 x 768 takes 0.5 ns an element in pieces of 30,000, 0.2 in these, 0.3 whole (two threads: 0.5, 0.15, 0.2)."""


@torch.no_grad()
def quantize_in_blocks(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the integers of a float32 tensor: ``clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)``.

    Equal to ``quantized_decomposed.quantize_per_tensor`` and ``quantize_per_channel`` bit for bit, for integer types
    of at most 16 bits and integer zero points, and several times as fast.

    Args:
        x: any shape.
        scale, zero_point: shape ``(1,)``, or ``(channels,)`` along ``axis``.
        axis: channel axis; None: per tensor.
    """
    moved = x.reshape(1, -1) if axis is None else x.movedim(axis, 0)
    rows = moved.reshape(moved.shape[0], -1)
    inverse = (1.0 / scale.double()).float() if axis is None else 1.0 / scale
    shift = zero_point.to(torch.float32) if bool(zero_point.any()) else None
    integers = torch.empty(rows.shape, dtype=dtype, device=x.device)
    count, size = max(1, BLOCK // max(1, rows.shape[1])), min(rows.shape[1], BLOCK)
    space = _space(min(count, rows.shape[0]) * size, x.device).reshape(-1, max(1, size))
    for top in range(0, rows.shape[0], count):
        group = slice(top, top + count)
        for left in range(0, rows.shape[1], max(1, size)):
            source = rows[group, left : left + size]
            piece = torch.mul(source, inverse[group, None], out=space[: source.shape[0], : source.shape[1]])
            piece.round_()
            if shift is not None:
                piece.add_(shift[group, None])
            piece.clamp_(quant_min, quant_max)
            integers[group, left : left + size].copy_(piece)
    shaped = integers.reshape(moved.shape)
    return shaped.reshape(x.shape) if axis is None else shaped.movedim(0, axis).contiguous()


def _space(size: int, device: torch.device) -> torch.Tensor:
    return scratch(size, torch.float32) if device.type == "cpu" else torch.empty(size, device=device)
