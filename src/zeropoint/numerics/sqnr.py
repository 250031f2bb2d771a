"""How far a tensor is from its reference."""

from __future__ import annotations

import math

import torch


def sqnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Returns the signal to quantization noise ratio in dB: ``10 log10(sum(ref^2) / sum((ref - actual)^2))``.

    Where both hold the same infinity, or both NaN, they are equal, and the other elements decide. Infinite for equal
    tensors; minus infinity where the shapes differ or where one alone is NaN or infinite.
    """
    if reference.shape != actual.shape:
        return -math.inf
    signal, other = reference.detach().double(), actual.detach().double()
    same = (signal == other) | (signal.isnan() & other.isnan())
    noise_power = float((signal - other).masked_fill(same, 0.0).square().sum())
    if noise_power == 0.0:
        return math.inf
    if not math.isfinite(noise_power):
        return -math.inf
    signal_power = float(signal[signal.isfinite()].square().sum())
    return 10 * math.log10(signal_power / noise_power) if signal_power else -math.inf
