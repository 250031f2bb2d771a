"""The field's search for the range of a histogram, with the same float32 arithmetic, without its Python loops.

``NormMinimization::NonlinearQuantizationParamsSearch`` of caffe2/quantization/server/norm_minimization.cc, as
``torch.ao`` and torchao's HistogramObserver follow it: quantiles close in from both ends in steps of 1e-5, and the
first step that makes the L2 error larger ends the search. The bins that a step reaches do not depend on errors, so
they come from binary search in the cumulative histogram, and runs of steps that reach no new bin are skipped. Many
histograms are searched side by side: a step of one is less work than the calls that it takes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zeropoint.numerics.scratch import scratch

Side = Literal["left", "right"]
Bins = tuple[int, int]
"""First and last bin of a range, inclusive."""

STEP = 1e-5
"""Share of the values that one step of a quantile leaves out."""
AT_ONCE = 4
"""Steps of a lone histogram whose errors are computed together: most searches take three to eight, and a call costs as
much as its sums."""
STEPS = 32
"""Steps of several histograms together: the more there are, the fewer of each, down to one, so that none is in vain."""
AHEAD = 16
"""Steps whose bins are looked up together."""
MOST_BINS = 3 * 2**17
"""Bins that are searched side by side at most: their intermediate results take 10 MB, which are kept."""


@functools.cache
def _quantiles() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the lower and the upper quantile after 1, 2, ... steps, summed one by one as the field's loop does."""
    steps = np.full(round(1 / STEP) + 2, STEP)
    return np.add.accumulate(steps), np.subtract.accumulate(np.concatenate([[1.0], steps]))[1:]


def quantile_path(histogram: torch.Tensor) -> Iterator[Bins]:
    """Yields the ever smaller ranges of bins, first and last inclusive, that the search tries.

    Args:
        histogram: float32 counts, shape ``(bins,)``, on the CPU.
    """
    total = histogram.sum().item()
    counts: NDArray[np.float32] = histogram.cumsum(0).numpy()
    lower, upper = _quantiles()
    left, right = _Reached(counts, lower, total, "left"), _Reached(counts, upper, total, "right")
    start, end, i, j = 0, len(counts) - 1, 0, 0
    while start < end and j < len(upper) and (lower[i - 1] if i else 0.0) < (upper[j - 1] if j else 1.0):
        to_start, to_end = _within(left.bin(i), start, end), _within(right.bin(j) - 1, start, end)
        if to_start - start > end - to_end:
            start, i = to_start, i + 1
        elif to_end < end:
            end, j = to_end, j + 1
        else:
            j = _first_below(counts[end], total, j + 1)
            continue
        yield start, end


def _first_below(count: np.float32, total: float, j: int) -> int:
    """Returns the first step from ``j`` on whose upper quantile is below ``count``: only then does the end move."""
    upper = _quantiles()[1]
    # Rounding moves the quotient by less than one step; the loop makes up for the three that are taken off.
    j = max(j, int((1 - float(count) / total) / STEP) - 3)
    while j < len(upper) and np.float32(upper[j] * total) >= count:
        j += 1
    return j


def _within(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


class _Reached:
    """The bins that the steps of a quantile reach, looked up ``AHEAD`` steps at a time.

    Args:
        counts: cumulative histogram, ``total`` its end.
        quantiles: after 1, 2, ... steps.
        side: of equal counts, as ``searchsorted`` has it.
    """

    def __init__(self, counts: NDArray[np.float32], quantiles: NDArray[np.float64], total: float, side: Side) -> None:
        self.counts, self.quantiles, self.total = counts, quantiles, total
        self.side: Side = side
        self.first, self.bins = -AHEAD, list[int]()

    def bin(self, step: int) -> int:
        """Returns the bin that a step, counted from 0, reaches."""
        if not self.first <= step < self.first + AHEAD:
            self.first = step - step % AHEAD
            ahead = self.quantiles[self.first : self.first + AHEAD] * self.total
            self.bins = self.counts.searchsorted(ahead.astype(np.float32), self.side).tolist()
        return self.bins[step - self.first]


@dataclass(frozen=True, eq=False, slots=True)
class Densities:
    """Histograms as the errors of ranges are computed from them.

    Args:
        density: counts over the width of a bin, float32, ``(rows, bins)``.
        bin_width: float64, ``(rows, 1)``, above 0.
    """

    density: torch.Tensor
    bin_width: torch.Tensor

    @classmethod
    def of(cls, histograms: torch.Tensor, bin_widths: Sequence[float]) -> Densities:
        """Returns those of counts ``(rows, bins)`` in bins of one width in each row."""
        widths = torch.tensor(bin_widths, dtype=torch.float64, device="cpu")[:, None]
        return cls(histograms / widths.float(), widths)

    def rows(self, indices: Sequence[int]) -> Densities:
        """Returns the rows of these indices, which may be repeated."""
        chosen = torch.tensor(indices, device="cpu")
        return Densities(self.density[chosen], self.bin_width[chosen])


def cell_errors(of: Densities, ranges: Sequence[Bins], cells: int) -> torch.Tensor:
    """Returns the L2 error of rounding to the centres of ``cells`` equal cells over the bins of each row's range.

    The values of a bin count as spread evenly over it; what lies outside of the cells goes to the outer two.
    float32, in the field's order of operations, since the search compares errors that may differ in the last bit.

    Args:
        ranges: first and last bin of each row, inclusive.

    Returns:
        float32, shape ``(rows,)``.
    """
    start, end = torch.tensor(ranges, device="cpu").T[:, :, None]
    exact_width, step = of.bin_width * (end - start + 1) / cells, of.bin_width.float()
    width, middle = exact_width.float(), (exact_width / 2).float()
    cube = middle * middle * middle
    begin, finish, first, last, part, quotients = _space(*of.density.shape)
    torch.sub(torch.arange(of.density.shape[1], dtype=torch.float32, device="cpu"), start, out=begin).mul_(step)
    torch.add(begin, step, out=finish)
    _cells_of(begin, width, cells, quotients, first)
    _cells_of(finish, width, cells, quotients, last)
    from_begin = begin.sub_(torch.add(first, 0.5, out=part).mul_(width))
    to_finish = finish.sub_(torch.mul(last, width, out=part).add_(middle))
    torch.mul(from_begin, from_begin, out=part).mul_(from_begin)
    error = torch.sub(cube, part, out=begin).div_(3).mul_(of.density)
    torch.mul(of.density, (cube + cube) / 3, out=part).mul_(last.sub_(first).sub_(1))
    error.add_(part)
    torch.mul(to_finish, to_finish, out=part).mul_(to_finish).add_(cube).div_(3).mul_(of.density)
    return error.add_(part).sum(1)


def _space(rows: int, bins: int) -> tuple[torch.Tensor, ...]:
    """Returns five float32 tensors ``(rows, bins)`` and one of float64, in whose memory the fifth of them lies.

    Fresh memory for them takes longer than what is computed in it.
    """
    whole = scratch(3 * rows * bins, torch.float64)
    parts = whole.view(torch.float32).view(6, rows, bins).unbind()
    return *parts[:5], whole[2 * rows * bins :].view(rows, bins)


def _cells_of(
    places: torch.Tensor, width: torch.Tensor, cells: int, quotients: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes the cell of each place. The quotient of two float32 in float64 is never rounded across an integer."""
    out.copy_(torch.div(places, width.double(), out=quotients).floor_().clamp_(0, cells - 1))


class _Search:
    """The search of one histogram, as far as it went."""

    def __init__(self, histogram: torch.Tensor) -> None:
        self.path = quantile_path(histogram)
        self.chosen: Bins | None = (0, len(histogram) - 1)
        self.least = float("inf")
        self.goes_on = True

    def take(self, ends: Bins, error: float) -> None:
        """Goes one step further on the path, unless the search has ended."""
        if not self.goes_on:
            return
        if error > self.least:
            self.goes_on = False
        elif not 0 < error < float("inf"):
            self.goes_on, self.chosen = False, None
        else:
            self.chosen, self.least = ends, error


def greedy_bins(histograms: torch.Tensor, bin_widths: Sequence[float], cells: int) -> list[Bins | None]:
    """Returns the first and the last bin of the range that the search ends with, for each of some histograms.

    None where float32 cannot hold the errors that it compares, cubes of the values: NaN and infinity never end it, nor
    does 0, so that it would run to the end and keep next to nothing.

    Args:
        histograms: float32 counts, shape ``(rows, bins)``, on the CPU; together at most ``MOST_BINS``, for the memory.
        bin_widths: the width of the bins of each, in units of the values. One of width 0 keeps its whole range.
    """
    searches, densities = [_Search(histogram) for histogram in histograms], Densities.of(histograms, bin_widths)
    going = [row for row, width in enumerate(bin_widths) if width > 0]
    while going:
        at_once = AT_ONCE if len(going) == 1 else max(1, STEPS // len(going))
        steps = [(row, ends) for row in going for ends in itertools.islice(searches[row].path, at_once)]
        going = list(dict.fromkeys(row for row, _ in steps))
        if steps:
            errors = cell_errors(densities.rows([row for row, _ in steps]), [ends for _, ends in steps], cells)
            for (row, ends), error in zip(steps, errors.tolist(), strict=True):
                searches[row].take(ends, error)
        going = [row for row in going if searches[row].goes_on]
    return [search.chosen for search in searches]
