"""Sums over the sites of a batch, all at once: a call for each site would cost more than what it adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from zeropoint.report.compared_sites import CLIPPED_STEPS, Sums


@dataclass(frozen=True, eq=False, slots=True)
class SiteSample:
    """Some values of an activation that has one scale, in a batch.

    Args:
        sums: what they are added to.
        reference: in the float model, flat.
        before, after: what is quantized in the quantized model, and that dequantized; both of the same places.
        factor: one of how many values each is.
        scale, zero_point: of the integers.
        limits: the smallest and the largest of them.
    """

    sums: Sums
    reference: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    factor: int
    scale: float
    zero_point: int
    limits: tuple[int, int]

    def add(self) -> None:
        """Adds them by themselves."""
        self.sums.add(self.reference, self.after, self.factor)
        self.sums.add_own(self.before, self.after, torch.tensor(self.scale), self.factor)
        self.sums.add_codes((self.after / self.scale).round() + self.zero_point, *self.limits)


@torch.no_grad()
def add_samples(samples: list[SiteSample]) -> None:
    """Adds the samples of a batch: together, but for those with values that are not finite."""
    if not samples:
        return
    stacked = _Stacked(samples)
    is_finite = stacked.is_finite()
    for sample in (each for each, finite in zip(samples, is_finite, strict=True) if not finite):
        sample.add()
    if not any(is_finite):
        return
    if not all(is_finite):
        stacked = _Stacked([each for each, finite in zip(samples, is_finite, strict=True) if finite])
    stacked.add_errors()
    stacked.add_own()
    stacked.add_codes()


class _Stacked:
    """Samples as rows, the shorter ones filled up with zeros."""

    def __init__(self, samples: list[SiteSample]) -> None:
        self.samples = samples
        self.reference = _rows([each.reference for each in samples])
        self.before = _rows([each.before for each in samples])
        self.after = _rows([each.after for each in samples])

    def is_finite(self) -> list[bool]:
        """Returns of which rows the sum is finite: of none that holds NaN or infinity."""
        return (self.reference + self.before + self.after).sum(1).isfinite().tolist()

    def add_errors(self) -> None:
        """Adds how far the quantized model is from the float one."""
        error = self.after - self.reference
        columns = (_powers(self.reference), _powers(self.after), _powers(error), error.abs().amax(1))
        for sample, signal, actual, noise, largest in zip(self.samples, *(c.tolist() for c in columns), strict=True):
            sums, factor = sample.sums, sample.factor
            sums.signal += factor * signal
            sums.actual += factor * actual
            sums.error += factor * noise
            sums.largest = max(sums.largest, largest)
            sums.count += factor * sample.reference.numel()

    def add_own(self) -> None:
        """Adds what rounding did."""
        error = self.after - self.before
        steps = error.abs() / error.new_tensor([each.scale for each in self.samples])[:, None]
        is_clipped = steps > CLIPPED_STEPS
        clipped = error * is_clipped
        columns = (_powers(self.before), _powers(error), steps.amax(1), is_clipped.sum(1), _powers(clipped))
        for sample, signal, noise, largest, count, lost in zip(
            self.samples, *(c.tolist() for c in columns), strict=True
        ):
            sums, factor = sample.sums, sample.factor
            sums.own_signal += factor * signal
            sums.own_error += factor * noise
            sums.largest_steps = max(sums.largest_steps, largest)
            sums.clipped += factor * count
            sums.clipped_error += factor * lost

    def add_codes(self) -> None:
        """Marks the codes that the samples use."""
        columns = zip(*((s.scale, s.zero_point, *s.limits) for s in self.samples), strict=True)
        scale, zero_point, low, high = (self.after.new_tensor(column)[:, None] for column in columns)
        codes = ((self.after / scale).round_().add_(zero_point).clamp_(low, high) - low).to(torch.int64)
        for sample, row in zip(self.samples, codes, strict=True):
            sample.sums.mark(row[: sample.after.numel()], *sample.limits)


def _rows(samples: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence([each.float() for each in samples], batch_first=True)


def _powers(rows: torch.Tensor) -> torch.Tensor:
    """Returns the sum of squares of each row."""
    return (rows * rows).sum(1)
