"""What is wrong with a site, in words."""

from __future__ import annotations

import torch
from torch.fx import Node

from zeropoint.numerics import ops
from zeropoint.report.compared_sites import Site, Sums
from zeropoint.report.lockstep import Lockstep, attribute

WIDE = 8.0
"""A channel whose largest value is so many times the median one's makes the scale too coarse for the others."""
MOSTLY = 0.5


def grid_of(site: Site, run: Lockstep) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of a site, flat; empty where they are found at run time."""
    if site.is_dynamic:
        return torch.empty(0), torch.empty(0)
    scale, zero_point = (_value(each, run) for each in site.dequantizes[0].args[1:3])
    return scale, zero_point if zero_point.numel() else torch.zeros_like(scale)


def _value(argument: object, run: Lockstep) -> torch.Tensor:
    if isinstance(argument, Node):
        return attribute(run.model, str(argument.target)) if argument.op == "get_attr" else torch.empty(0)
    return torch.empty(0) if argument is None else torch.tensor(argument)


def spread_scale(site: Site, scale: torch.Tensor) -> torch.Tensor | None:
    """Returns a scale of a shape that broadcasts with the tensor; None where it has another layout."""
    if scale.numel() == 1:
        return scale.reshape(())
    value, operator = site.source.meta.get("val"), site.dequantizes[0]
    if value is None:
        return None
    if operator.target is ops.DEQUANTIZE_PER_CHANNEL:
        axis = operator.args[3]
        return scale.reshape([-1 if each == axis % value.dim() else 1 for each in range(value.dim())])  # type: ignore[operator]
    if operator.target is ops.DEQUANTIZE_PER_CHANNEL_GROUP and scale.dim() == value.dim():
        return scale.repeat_interleave(int(value.shape[-1]) // scale.shape[-1], -1)
    return None


def channel_spread(value: torch.Tensor, axis: int) -> tuple[float, int]:
    """Returns how many times the median channel's largest value the largest channel's is, and which that is."""
    if value.dim() < 2 or not value.numel():
        return 1.0, 0
    others = [each for each in range(value.dim()) if each != axis % value.dim()]
    largest = torch.maximum(value.detach().amax(others), -value.detach().amin(others))
    channel = int(largest.argmax())
    median = float(largest.median())
    return (float(largest[channel]) / median if median else float("inf")), channel


def reason(site: Site, sums: Sums, spread: tuple[float, int] | None, clipped: float, unused: float) -> str:
    """Returns what is wrong with a site in a sentence."""
    ratio, channel = spread if spread is not None else (1.0, 0)
    is_coarse = len(site.dequantizes[0].args) and site.dequantizes[0].target in (
        ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR
    )  # fmt: skip
    if sums.clipped_error > MOSTLY * sums.own_error > 0:
        return (
            f"{clipped:.3%} of its values are clipped, by up to {sums.largest_steps:.0f} steps: its range is too small"
        )
    if is_coarse and ratio > WIDE:
        return f"its one scale is too coarse: channel {channel} is {ratio:.0f} times the median channel"
    if unused > MOSTLY:
        return (
            f"its scale is too coarse: {unused:.0%} of the integers are never used, some values are far from the others"
        )
    return "its rounding is an ordinary one, and what follows amplifies it"
