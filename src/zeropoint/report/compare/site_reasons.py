"""What is wrong with a site, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from zeropoint.graph.bind import bind
from zeropoint.numerics import ops
from zeropoint.report.compare.compared_sites import Site, Sums
from zeropoint.report.compare.lockstep import Lockstep, attribute

WIDE = 8.0
"""A channel whose largest value is so many times the median one's makes the scale too coarse for the others."""
TINY = 4.0
"""A channel whose largest value is fewer steps of the scale is rounded coarsely, or away."""
MOSTLY = 0.5


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the channels of a tensor are apart.

    Args:
        widest, ratio: the channel with the largest value, and how many times the median channel's that is.
        smallest, steps: the channel whose largest value is the fewest steps of its scale, and how many; channels of
            zeros are left out. Infinity where no scale is known.
    """

    widest: int = 0
    ratio: float = 1.0
    smallest: int = 0
    steps: float = math.inf


def grid_of(site: Site, run: Lockstep) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of a site, flat; empty where they are found at run time."""
    if site.is_dynamic:
        return torch.empty(0), torch.empty(0)
    given = bind(site.dequantizes[0])
    scale, zero_point = (_value(given.get(name, given.get(f"{name}s")), run) for name in ("scale", "zero_point"))
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
    if scale.dim() == value.dim():  # One for each group or block.
        for axis, count in enumerate(scale.shape):
            scale = scale.repeat_interleave(int(value.shape[axis]) // count, axis)
        return scale
    return None


def channel_spread(value: torch.Tensor, axis: int, scale: torch.Tensor | None = None) -> Spread:
    """Returns how far the channels along an axis are apart; ``scale`` is one value, or one for each channel."""
    if value.dim() < 2 or not value.numel():
        return Spread()
    others = [each for each in range(value.dim()) if each != axis % value.dim()]
    largest = torch.maximum(value.detach().amax(others), -value.detach().amin(others))
    widest, median = int(largest.argmax()), float(largest.median())
    ratio = float(largest[widest]) / median if median else math.inf
    if scale is None or scale.numel() not in (1, largest.numel()):
        return Spread(widest, ratio)
    steps = torch.where(largest > 0, largest / scale.reshape(-1).to(largest.device), math.inf)
    smallest = int(steps.argmin())
    return Spread(widest, ratio, smallest, float(steps[smallest]))


def reason(site: Site, sums: Sums, spread: Spread, clipped: float, unused: float) -> str:
    """Returns what is wrong with a site in a sentence."""
    is_coarse = site.dequantizes[0].target in (ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR)
    if sums.clipped_error > MOSTLY * sums.own_error > 0:
        return _of_clipped(site, sums, clipped)
    if is_coarse and spread.ratio > WIDE:
        times = f"{spread.ratio:.0f} times the median channel"
        return f"its one scale is too coarse: channel {spread.widest} is {times}"
    if site.kind == "weight" and spread.steps < TINY:
        scale = "its one scale" if is_coarse else "its scale"
        return f"channel {spread.smallest} is tiny for {scale}: its largest value is {spread.steps:.2g} steps"
    if unused > MOSTLY:
        return (
            f"its scale is too coarse: {unused:.0%} of the integers are never used, some values are far from the others"
        )
    return "its rounding is an ordinary one, and what follows amplifies it"


def _of_clipped(site: Site, sums: Sums, clipped: float) -> str:
    steps = f"by up to {sums.largest_steps:.0f} steps"
    if site.kind == "weight":
        return f"{clipped:.3%} of its values are off {steps}: trained after that float model, or its range is too small"
    return f"{clipped:.3%} of its values are clipped, {steps}: its range is too small"
