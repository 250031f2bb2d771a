"""Batch norm of what a layer with scaled weights gives, as training quantized layers computes it, in one step."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.numerics.straight_through import with_signature

aten = torch.ops.aten
SAFE = (1e-12, 1e12)
"""Scales between these have squares that float32 holds with room."""


def unscaled_batch_norm(
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """Returns ``batch_norm(y / scale + bias)`` of a batch, and updates the running statistics.

    With ``m, v`` the mean and variance of a channel of ``y``, it is ``sign(scale) weight (y - m) / sqrt(v + eps
    scale^2) + shift``: neither the quotient nor its gradients are tensors of the size of ``y``, of which autograd would
    make six. ``bias`` moves the running mean only; its gradient is 0, and that of ``scale`` is what ``eps`` leaves.

    Args:
        y: ``(batch, channels, ...)``.
        scale, running_mean, running_var: ``(channels,)``.
        bias, weight, shift: ``(channels,)``; None: 0, 1 and 0.
        momentum: share of the new statistics, 0 to 1.
        eps: what is added to the variance of the quotient.
    """
    parameters = (scale, bias, weight, shift, running_mean, running_var)
    if not eps > 0 or not _is_plain(y, parameters):
        return _by_steps(y, scale, bias, weight, shift, (running_mean, running_var), momentum, eps)
    with torch.no_grad():
        mean, variance = aten.batch_norm_update_stats(y, None, None, momentum)
        count, square = y.numel() // y.shape[1], scale * scale
        running_mean.mul_(1 - momentum).addcdiv_(mean, scale, value=momentum)
        if bias is not None:
            running_mean.add_(bias, alpha=momentum)
        running_var.mul_(1 - momentum).addcdiv_(variance, square, value=momentum * count / (count - 1))
        spread = variance.add_(square, alpha=eps)
    return _Unscaled.apply(y, scale, weight, shift, bias, mean, spread, eps)  # type: ignore[return-value]


def _is_plain(y: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> bool:
    if type(y) is not torch.Tensor or y.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if y.numel() <= y.shape[1] or any(each is not None and each.dtype != torch.float32 for each in (y, *parameters)):
        return False
    assert parameters[0] is not None
    least, most = torch.aminmax(parameters[0].detach().abs())
    return SAFE[0] <= least.item() and most.item() <= SAFE[1]


def _by_steps(
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    momentum: float,
    eps: float,
) -> torch.Tensor:
    view = [1, -1, *[1] * (y.dim() - 2)]
    quotient = y / scale.reshape(view)
    if bias is not None:
        quotient = quotient + bias.reshape(view)
    return torch.batch_norm(quotient, weight, shift, *statistics, True, momentum, eps, True)


class _Unscaled(torch.autograd.Function):
    """The value is that of batch norm in eval mode with the batch's own statistics; the gradient is that of a batch."""

    @staticmethod
    @with_signature
    def forward(
        y: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        spread: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        del bias, eps
        return aten.native_batch_norm(y, _signed(scale, weight), shift, mean, spread, False, 0.0, 0.0)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        del output
        y, scale, weight, shift, bias, mean, spread, eps = inputs
        ctx.save_for_backward(y, scale, weight, shift, bias, mean, spread)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        y, scale, weight, shift, bias, mean, spread = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *_again(ctx.needs_input_grad, (y, scale, weight, shift, bias), gradients[0], ctx.eps),
                None,
                None,
                None,
            )
        factor, inverse = _signed(scale, weight), spread.rsqrt()
        wanted = [ctx.needs_input_grad[0], True, ctx.needs_input_grad[3]]
        of_y, of_factor, of_shift = aten.native_batch_norm_backward(
            gradients[0], y, factor, None, None, mean, inverse, True, 0.0, wanted
        )
        of_scale = of_factor * factor * scale * inverse.square() * -ctx.eps
        of_weight = None if weight is None else of_factor * scale.sign()
        of_bias = None if bias is None else torch.zeros_like(bias)
        return of_y, of_scale, of_weight, of_shift if wanted[2] else None, of_bias, None, None, None


def _signed(scale: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return scale.sign() if weight is None else weight * scale.sign()


def _again(
    needed: tuple[bool, ...], inputs: tuple[torch.Tensor | None, ...], gradient: torch.Tensor, eps: float
) -> list[torch.Tensor | None]:
    """Returns the gradients of the inputs as functions of the inputs, for gradients of gradients."""
    y, scale, weight, shift, bias = inputs
    assert y is not None
    assert scale is not None
    result = _by_steps(y, scale, bias, weight, shift, (None, None), 0.0, eps)
    some = [each for each, is_needed in zip(inputs, needed, strict=False) if is_needed and each is not None]
    found = iter(torch.autograd.grad(result, some, gradient, create_graph=True))
    return [
        next(found) if is_needed and each is not None else None for each, is_needed in zip(inputs, needed, strict=False)
    ]
