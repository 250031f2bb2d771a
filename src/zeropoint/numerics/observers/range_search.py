"""The range of a histogram that makes the squared error of quantizing least, exactly integrated, for many rows at once.

The values of a bin count as spread evenly over it. With rounding to the nearest of the levels ``first + k * step``,
``0 <= k < levels``, the squared error up to x has the primitive ``step**3 * (k / 12 + u**3 / 3)`` with
``t = (x - first) / step``, ``k = clamp(round(t), 0, levels - 1)``, ``u = t - k``; beyond the outer levels it goes on
as the cube that clipping costs. So one evaluation at each edge of a bin gives the error, whatever falls into a bin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from zeropoint.core.specs import SYMMETRIC
from zeropoint.numerics.observers.base import UniformQuantizationObserverBase

Ranges = tuple[torch.Tensor, torch.Tensor]
Start = Literal["whole", "longer", "best"]
RangeError = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

COARSE = tuple(2.0 ** (-0.75 * k) for k in range(15))
"""Shares of the whole range that are tried first: down to about one bin of 2048."""

FINE = (0.75, 0.125, 0.03125)
"""Spans, in powers of two to either side, of the ever finer trials around the best share."""

TRIALS = 13
"""Trials in one span."""

# 15 trials of 2048 bins are fewer elements than torch hands to its threads, which would cost more than they gain.
SERIAL = 2**15
"""How many elements to work on at once on a CPU."""

LOW, HIGH, BOTH = (True, False), (False, True), (True, True)
"""Which ends of the range a trial moves."""


def least_error_range(
    observer: UniformQuantizationObserverBase, histogram: torch.Tensor, edges: torch.Tensor
) -> Ranges:
    """Returns the ends of the range of least error, ``(rows,)`` each, for the observer's integers and scheme.

    Args:
        histogram: ``(rows, bins)``, float64.
        edges: edges of the bins, ``(rows, bins + 1)``, float64.
    """
    error = quantizing_error(observer, histogram, edges)
    low, high = edges[:, 0], edges[:, -1]
    if observer.qscheme in SYMMETRIC:
        return best_symmetric_range(torch.maximum(-low, high), error)
    return best_range(low, high, median(histogram, edges), error)


def quantizing_error(
    observer: UniformQuantizationObserverBase, histogram: torch.Tensor, edges: torch.Tensor
) -> RangeError:
    """Returns the function that gives the summed squared error of quantizing for each range."""
    levels = observer.quant_max - observer.quant_min + 1

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero_point = (value.double() for value in observer.qparams_of_range(low, high))
        return square_error(histogram, edges, (observer.quant_min - zero_point) * scale, scale, levels)

    return error


def square_error(
    histogram: torch.Tensor, edges: torch.Tensor, first: torch.Tensor, step: torch.Tensor, levels: int
) -> torch.Tensor:
    """Returns the summed squared error of rounding to ``levels`` levels, for each trial of each row.

    Args:
        histogram: counts, ``(rows, bins)``, float64.
        edges: edges of the bins, rising, ``(rows, bins + 1)``, float64.
        first, step: lowest level and distance of the levels, ``(rows, trials)``, float64.

    Returns:
        ``(rows, trials)``, float64.
    """
    width = edges.diff(dim=1)
    density = torch.where(width > 0, histogram / width, 0)
    weight = -torch.nn.functional.pad(density, (1, 1)).diff(dim=1)
    t = (edges.unsqueeze(1) - first.unsqueeze(2)).div_(step.unsqueeze(2))
    # round(t), halves up: torch's round and min(dim) hand even few elements to threads, and wait for them.
    k = (t + 0.5).clamp_(0, levels - 1)
    k -= k.frac()
    primitive = k.add_(t.sub_(k).pow_(3), alpha=4)
    return primitive.mul_(weight.unsqueeze(1)).sum(2) * step.pow(3) / 12


def best_range(low: torch.Tensor, high: torch.Tensor, centre: torch.Tensor, error: RangeError) -> Ranges:
    """Returns the ``(low, high)`` within the given ones, around ``centre``, at which ``error`` is least, per row.

    First both ends move together, by equal shares and to equal distances, then each alone, over shares of the whole
    from 1 down to 1/2048; then ever finer around the best. Only a trial that lowers the error is taken: the result is
    never worse than the whole range.

    Args:
        low, high, centre: ``(rows,)``, float64, ``low <= centre <= high``.
        error: takes ``(rows, trials)`` lows and highs, returns ``(rows, trials)`` errors.

    Returns:
        The two ends, ``(rows,)`` each.
    """
    search = _Search(low, high, centre, error)
    search.move(BOTH, COARSE, "whole")
    search.move(BOTH, COARSE, "longer")
    for _ in range(2):
        search.move(LOW, COARSE, "whole")
        search.move(HIGH, COARSE, "whole")
    for span in FINE:
        search.move(LOW, _around(span), "best")
        search.move(HIGH, _around(span), "best")
    return search.best()


def best_symmetric_range(largest: torch.Tensor, error: RangeError) -> Ranges:
    """Returns the ``(-t, t)``, ``0 < t <= largest``, at which ``error`` is least, per row; as best_range does."""
    search = _Search(-largest, largest, torch.zeros_like(largest), error)
    search.move(BOTH, COARSE, "whole")
    for span in FINE:
        search.move(BOTH, _around(span), "best")
    return search.best()


def _around(span: float) -> tuple[float, ...]:
    return tuple(2.0 ** (span * (2 * k / (TRIALS - 1) - 1)) for k in range(TRIALS))


class _Search:
    """The best range so far of each row, as the shares of the way from the centre to the low and the high end."""

    def __init__(self, low: torch.Tensor, high: torch.Tensor, centre: torch.Tensor, error: RangeError) -> None:
        self.centre, self.below, self.above = centre[:, None], (centre - low)[:, None], (high - centre)[:, None]
        self.shares = torch.ones(2, len(centre), 1, dtype=centre.dtype, device=centre.device)
        self.error = error
        self.least = error(*self._ranges(self.shares))

    def _ranges(self, shares: torch.Tensor) -> Ranges:
        return self.centre - self.below * shares[0], self.centre + self.above * shares[1]

    def best(self) -> Ranges:
        low, high = self._ranges(self.shares)
        return low.squeeze(1), high.squeeze(1)

    def move(self, ends: tuple[bool, bool], factors: tuple[float, ...], start: Start) -> None:
        """Tries ``factors`` times where it starts, for the given ends.

        ``whole``: from both ends of the range; ``longer``: from the end farther away, at equal distances to both
        sides; ``best``: from the best shares so far.
        """
        factor = self.shares.new_tensor(factors)
        match start:
            case "best":
                base = self.shares
            case "whole":
                base = torch.ones_like(self.shares)
            case "longer":
                base = torch.maximum(self.below, self.above) / torch.stack([self.below, self.above])
        moving = torch.tensor(ends, device=factor.device).reshape(2, 1, 1)
        trials = torch.where(moving, (base * factor).clamp(max=1), self.shares)
        errors = self.error(*self._ranges(trials))
        index = errors.argmin(1, keepdim=True)
        least = errors.gather(1, index)
        better = least < self.least
        self.shares = torch.where(better, trials.gather(2, index.expand(2, -1, -1)), self.shares)
        self.least = torch.where(better, least, self.least)


def median(histogram: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Returns the middle of the bin that holds each row's median: ``(rows,)`` of ``(rows, bins)`` and its edges."""
    counts = histogram.cumsum(1)
    index = torch.searchsorted(counts, counts[:, -1:] / 2).clamp_(max=histogram.shape[1] - 1)
    return ((edges.gather(1, index) + edges.gather(1, index + 1)) / 2).squeeze(1)
