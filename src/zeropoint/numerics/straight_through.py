"""Rounding to integers and back, with gradients that pass as if nothing was rounded (Bengio et al. 2013).

``y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``; as everywhere in torch,
``x / scale`` is ``x * (1 / scale)`` in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")
Known: TypeAlias = tuple[float, float]
"""Smallest and largest value."""
INFINITY = np.float32(np.inf)
USUAL = (2.0**-100, 2.0**100)
"""Of scales between these, neither the reciprocal nor its products with integers leave float32."""
EXACT = 2**24
"""Up to here float32 holds every integer."""
PASS_INSIDE = torch.ops.aten.hardtanh_backward.default
"""Returns its first argument where the second lies between two bounds, else 0."""
FEW = 2**15
"""Fewer elements take less time than the 60 us of a function with gradients of its own."""


def with_signature(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function, whose signature is then known: torch asks for it in each call, for 15 us."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    known: Known | None = None,
) -> torch.Tensor:
    """Returns ``y``; the gradient of ``x`` is that of ``y`` where it was not clamped, else 0.

    On CPU, a few vectorized operators give the bits of torch's kernels, which go element by element, in a fifth of
    their time (torch 2.13); for ``FEW`` elements a kernel is faster.

    Args:
        x: float tensor.
        scale: float32, ``(1,)``, or one per index of ``axis``.
        zero_point: int32, or float32 for a float zero point; as many.
        quant_min, quant_max: range of the integers, inclusive.
        axis: of the channels; None: one scale for all.
        known: the smallest and the largest value of ``x``, where that is known: if neither is clamped, nothing is.
    """
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu" and not zero_point.is_floating_point()
    pays = x.numel() >= FEW and max(-quant_min, quant_max) <= EXACT // 2 and not torch.compiler.is_compiling()
    zero = _one_value(zero_point) if is_plain and pays else None
    if zero is not None and axis is not None:
        factors = _factors(x, scale, axis)
        return _Rounded.apply(x, *factors, quant_min - zero, quant_max - zero)[0]  # type: ignore[index]
    if zero is not None and USUAL[0] < (step := scale.item()) < USUAL[1]:
        return _by_one(x, step, quant_min - zero, quant_max - zero, known)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)


def _one_value(zero_point: torch.Tensor) -> float | None:
    """Returns the zero point that all channels have; None where they have different ones."""
    first = zero_point[0].item()
    return first if len(zero_point) == 1 or bool((zero_point == first).all()) else None


def _by_one(x: torch.Tensor, scale: float, low: float, high: float, known: Known | None) -> torch.Tensor:
    inverse = float(np.float32(1 / scale))
    if known is not None and low <= _steps(known[0], inverse) and _steps(known[1], inverse) <= high:
        return _Unclamped.apply(x, inverse, scale)  # type: ignore[return-value]
    return _Clamped.apply(x, inverse, scale, low, high)  # type: ignore[return-value]


def _steps(x: float, inverse: float) -> float:
    """Returns ``round(x * inverse)`` in float32, as torch has it: one operation in float64 rounds to the same."""
    product = x * inverse
    return product if abs(product) > EXACT else float(np.rint(np.float32(product)))


def _limits(inverse: float, low: float, high: float) -> tuple[float, float]:
    """Returns the largest float32 that is rounded to less than ``low``, the smallest to more than ``high``."""
    below, above = np.float32((low - 0.5) / inverse), np.float32((high + 0.5) / inverse)
    while _steps(float(below), inverse) < low:
        below = np.nextafter(below, INFINITY)
    while _steps(float(below), inverse) >= low:
        below = np.nextafter(below, -INFINITY)
    while _steps(float(above), inverse) > high:
        above = np.nextafter(above, -INFINITY)
    while _steps(float(above), inverse) <= high:
        above = np.nextafter(above, INFINITY)
    return float(below), float(above)


class _Unclamped(torch.autograd.Function):
    """Returns the rounded tensor, of which nothing is to be clamped: the gradient passes as it is."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(x: torch.Tensor, inverse: float, scale: float) -> torch.Tensor:
        return torch.mul(x, inverse).round_().mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Nothing is needed on the way back."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return gradients[0], None, None


class _Clamped(torch.autograd.Function):
    """Returns the rounded tensor. On the way back ``x`` itself tells where it was clamped: nothing else is kept."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(x: torch.Tensor, inverse: float, scale: float, low: float, high: float) -> torch.Tensor:
        return torch.mul(x, inverse).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.bounds = inputs[1], *inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return PASS_INSIDE(gradients[0], x, *_limits(*ctx.bounds)), None, None, None, None


def _factors(x: torch.Tensor, scale: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``1 / scale`` and ``scale`` as they are multiplied with ``x``."""
    inverse = scale.reciprocal()
    view = [1] * x.dim()
    view[axis] = -1
    return inverse.reshape(view), scale.reshape(view)


class _Rounded(torch.autograd.Function):
    """Returns the rounded tensor, and the integers less the zero point before they are clamped to ``low`` and ``high``.

    Those are kept for the way back: comparing with them there takes a fifth of the time of making a mask here.
    """

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        x: torch.Tensor, inverse: Any, scale: Any, low: float, high: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.mul(x, inverse).round_()
        return steps.clamp(low, high).mul_(scale), steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.bounds = inputs[3] - 0.5, inputs[4] + 0.5

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (steps,) = ctx.saved_tensors
        return PASS_INSIDE(gradients[0], steps, *ctx.bounds), None, None, None, None


def learned_fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Returns ``y`` with the gradients of learned step sizes too.

    That of the scale is ``round(v) - v`` for ``v = x / scale`` that was not clamped, else the bound less the zero point
    (Esser et al. 2020, section 2.1); that of the zero point is ``-scale`` where it was clamped (Bhalgat et al. 2020,
    section 3.1). torch's own kernels take -29 for a zero point of -30 on the way back (torch 2.13).

    Args:
        x, quant_min, quant_max, axis: as in ``fake_quantize``.
        scale, zero_point: float32; the zero point is rounded, and clamped to the range.
        factor: by which both of these gradients are multiplied.
    """
    view = [1] * x.dim()
    if axis is not None:
        view[axis] = -1
    return _Learned.apply(x, scale.reshape(view), zero_point.reshape(view), quant_min, quant_max, factor)[0]  # type: ignore[index]


def _steps_of(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the integers, less the zero point, before they are clamped, in a tensor of its own."""
    return torch.mul(x.float(), 1 / scale).round_()


def _bounds(zero_point: torch.Tensor, quant_min: int, quant_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what they are clamped to."""
    zero = zero_point.round().clamp(quant_min, quant_max)
    return quant_min - zero, quant_max - zero


class _Learned(torch.autograd.Function):
    """Returns the rounded tensor, and where it was not clamped. ``scale`` and ``zero_point`` broadcast to ``x``."""

    @staticmethod
    @with_signature
    def forward(
        x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del factor
        steps = _steps_of(x, scale)
        kept = steps.clamp(*_bounds(zero_point, quant_min, quant_max))
        inside = steps.eq(kept)
        return kept.mul_(scale).to(x.dtype), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        learns = any(ctx.needs_input_grad[1:3])  # Else the scale may be written before the way back: it is observed.
        x, scale, zero_point = inputs[:3] if learns else (None, None, None)
        ctx.save_for_backward(x, scale, zero_point, output[1])  # Not the result, which ``y += x`` may write to.
        ctx.limits, ctx.factor = inputs[3:5], inputs[5]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero_point, inside = ctx.saved_tensors
        of_x = torch.where(inside, gradients[0], 0)  # To multiply by a mask takes three times as long.
        of_scale = of_zero_point = terms = None
        if ctx.needs_input_grad[1]:  # In place: memory that is new takes longer than the arithmetic.
            terms = _steps_of(x, scale).clamp_(*_bounds(zero_point, *ctx.limits)).mul_(scale).mul_(gradients[0])
            terms.addcmul_(x.float(), of_x, value=-1)  # The gradient times (round(v) - v), or the bound, times scale.
            of_scale = terms.sum_to_size(scale.shape) / scale * ctx.factor
        if ctx.needs_input_grad[2]:
            into = None if torch.is_grad_enabled() else terms  # It is, where gradients of gradients are asked for.
            clamped = torch.sub(gradients[0], of_x, out=into).float().sum_to_size(scale.shape)
            of_zero_point = clamped * scale * -ctx.factor
        return of_x, of_scale, of_zero_point, None, None, None
