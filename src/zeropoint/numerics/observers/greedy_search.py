"""The field's search for the range of a histogram, with the same float32 arithmetic, without its Python loops.

``NormMinimization::NonlinearQuantizationParamsSearch`` of caffe2/quantization/server/norm_minimization.cc, as
``torch.ao`` and torchao's HistogramObserver follow it: quantiles close in from both ends in steps of 1e-5, and the
first step that makes the L2 error larger ends the search. The bins that a step reaches do not depend on errors, so
they come from binary search in the cumulative histogram, and runs of steps that reach no new bin are skipped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STEP = 1e-5
"""Share of the values that one step of a quantile leaves out."""
AT_ONCE = 4
"""Steps whose errors are computed together: most searches take three to six, and a call costs as much as its sums."""


@functools.cache
def _quantiles() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the lower and the upper quantile after 1, 2, ... steps, summed one by one as the field's loop does."""
    steps = np.full(round(1 / STEP) + 2, STEP)
    return np.add.accumulate(steps), np.subtract.accumulate(np.concatenate([[1.0], steps]))[1:]


def quantile_path(histogram: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yields the ever smaller ranges of bins, first and last inclusive, that the search tries.

    Args:
        histogram: float32 counts, shape ``(bins,)``, on the CPU.
    """
    total = histogram.sum().item()
    counts: NDArray[np.float32] = histogram.cumsum(0).numpy()
    lower, upper = _quantiles()
    start, end, i, j = 0, len(counts) - 1, 0, 0
    while start < end and j < len(upper) and (lower[i - 1] if i else 0.0) < (upper[j - 1] if j else 1.0):
        left, right = np.float32(lower[i] * total), np.float32(upper[j] * total)
        to_start = _within(counts.searchsorted(left, "left"), start, end)
        to_end = _within(counts.searchsorted(right, "right") - 1, start, end)
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


def _within(value: Any, low: int, high: int) -> int:
    return min(max(int(value), low), high)


def cell_errors(
    histogram: NDArray[np.float32], bin_width: float, ranges: Sequence[tuple[int, int]], cells: int
) -> NDArray[np.float32]:
    """Returns the L2 error of rounding to the centres of ``cells`` equal cells over the bins of each range.

    The values of a bin count as spread evenly over it; what lies outside of the cells goes to the outer two.
    float32, in the field's order of operations, since the search compares errors that may differ in the last bit; the
    sum is torch's, which adds in another order than numpy's.

    Args:
        histogram: counts, ``(bins,)``.
        bin_width: width of a bin, in units of the values, above 0.
        ranges: first and last bin of each, inclusive.
    """
    one, three = np.float32(1), np.float32(3)
    start, end = np.array(ranges).T[:, :, None]
    exact_width = bin_width * (end - start + 1) / cells
    width, middle, step = exact_width.astype(np.float32), (exact_width / 2).astype(np.float32), np.float32(bin_width)
    begin = (np.arange(len(histogram)) - start).astype(np.float32) * step
    finish = begin + step
    first, last = _cells_of(begin, width, cells), _cells_of(finish, width, cells)
    density = histogram / step
    cube = middle * middle * middle
    from_begin = begin - (first + np.float32(0.5)) * width
    to_finish = finish - (last * width + middle)
    norm = density * ((cube - from_begin * from_begin * from_begin) / three)
    norm += (last - first - one) * (density * ((cube + cube) / three))
    norm += density * ((to_finish * to_finish * to_finish + cube) / three)
    return torch.from_numpy(norm).sum(1).numpy()


def _cells_of(places: NDArray[np.float32], width: NDArray[np.float32], cells: int) -> NDArray[np.float32]:
    """Returns the cell of each place. The quotient of two float32 in float64 is never rounded across an integer."""
    quotients = places / width.astype(np.float64)
    return np.clip(np.floor(quotients, out=quotients), 0, cells - 1).astype(np.float32)


def greedy_bins(histogram: torch.Tensor, bin_width: float, cells: int) -> tuple[int, int] | None:
    """Returns the first and the last bin of the range that the search ends with.

    None where float32 cannot hold the errors that it compares, cubes of the values: NaN and infinity never end it, nor
    does 0, so that it would run to the end and keep next to nothing.
    """
    chosen, least = (0, len(histogram) - 1), float("inf")
    path = quantile_path(histogram)
    while bin_width > 0 and (ranges := list(itertools.islice(path, AT_ONCE))):
        with np.errstate(all="ignore"):
            errors = cell_errors(histogram.numpy(), bin_width, ranges, cells).tolist()
        for ends, error in zip(ranges, errors, strict=True):
            if error > least:
                return chosen
            if not 0 < error < float("inf"):
                return None
            chosen, least = ends, error
    return chosen
