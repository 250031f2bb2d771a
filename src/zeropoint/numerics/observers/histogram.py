"""Observers that keep a histogram: its range grows with the data, its size does not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from zeropoint.core.dtypes import integer_range
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import PER_TENSOR
from zeropoint.numerics.observers.base import UniformQuantizationObserverBase, fingerprint, in_memory_order
from zeropoint.numerics.observers.greedy_search import MOST_BINS, Bins, greedy_bins
from zeropoint.numerics.observers.range_search import least_error_range
from zeropoint.numerics.scratch import scratch

UPSAMPLE_RATE = 16
"""Into how many parts a bin is cut when the histogram moves to a wider range; the field's value."""

PIECE = 2**19
"""Elements that are counted at once on a CPU: 2 MB of float32, which stay in the cache."""

LARGE = 2**17
"""Elements from which on that is faster than ``torch.histc``: its dozen calls take 0.1 ms between the operators of a
model, which leave neither their code nor their data in the cache."""

LANES = 4
"""Histograms that neighbouring elements are counted in by turns: a processor waits for a count before it adds to it
again, and half of the values after a relu are 0."""

EXACT_COUNT = 2**24
"""Other devices count one by one in float32, which is exact up to here; larger tensors are counted in parts."""

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""float32 numbers; the smallest that is normal."""

SHRINK = 2.0**-32
"""What wide ranges are multiplied by before their values are counted: a power of 2, so that nothing is rounded."""

Range = tuple[torch.Tensor, torch.Tensor]


class StreamingHistogram(UniformQuantizationObserverBase):
    """Counts the values of all tensors in ``bins`` equal bins from the smallest to the largest value.

    A tensor costs one ``torch.aminmax`` and one ``count``. When it widens the range, the old counts move to the
    new bins as the field's HistogramObserver moves them, float32 rounding included.

    A subclass says in ``chosen_range`` what range to quantize; the scale and zero point are kept until statistics
    change.

    Args:
        bins: number of bins.
        args, settings: those of the base.
    """

    schemes = PER_TENSOR
    supports_dynamic = False
    histogram: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, bins: int = 2048, *args: Any, **settings: Any) -> None:
        if bins < 1:
            raise SpecError(f"bins={bins}", where=type(self).__name__, remedy="Choose bins >= 1.")
        self.bins = bins
        super().__init__(*args, **settings)
        self._qparams: tuple[object, Range] | None = None

    def _register_statistics(self, factory: dict[str, Any]) -> None:
        self.register_buffer("histogram", torch.zeros(self.bins, **factory))
        self.register_buffer("min_val", torch.tensor(torch.inf, **factory))
        self.register_buffer("max_val", torch.tensor(-torch.inf, **factory))

    def observe(self, x: torch.Tensor) -> None:
        x = in_memory_order(x)
        if x.dtype != torch.float32:
            x = x.float()
        ends = torch.aminmax(x)
        least, greatest = ends[0].item(), ends[1].item()
        before = self.min_val.item(), self.max_val.item()
        if before[0] <= least and greatest <= before[1]:
            self.histogram.add_(count(x, self.bins, *before))
            return
        self.require_finite(least, greatest)
        after = min(least, before[0]), max(greatest, before[1])
        counts = count(x, self.bins, *after)
        if before[0] <= before[1]:
            counts = counts + moved(self.histogram, before, after)
        self.histogram.copy_(counts)
        self.min_val.fill_(after[0])
        self.max_val.fill_(after[1])

    def calculate_qparams(self) -> Range:
        """Returns ``(scale, zero_point)``, each of shape ``(1,)``.

        Raises:
            CalibrationError: no tensor was observed.
        """
        self._require_range(self.min_val, self.max_val)
        mark = self._mark()
        if self._qparams is None or self._qparams[0] != mark:
            self._qparams = mark, self._calculate_qparams(*self.chosen_range())
        scale, zero_point = self._qparams[1]
        return scale.clone(), zero_point.clone()

    def _mark(self) -> object:
        """Returns a value that changes with the statistics."""
        return tuple(fingerprint(buffer) for buffer in (self.histogram, self.min_val, self.max_val, self.eps))

    def chosen_range(self) -> Range:
        """Returns the smallest and the largest value to be quantized without clipping."""
        raise NotImplementedError

    def least_error_range(self) -> Range:
        """Returns the range for which quantizing to the observer's integers makes the least squared error."""
        low, high = least_error_range(self, self.histogram.double().cpu()[None], self.edges()[None])
        return low[0].to(self.min_val), high[0].to(self.max_val)

    def edges(self) -> torch.Tensor:
        """Returns the edges of the bins, ``(bins + 1,)``, float64, on the CPU."""
        low, high = self.min_val.item(), self.max_val.item()
        return torch.linspace(low, high, self.bins + 1, dtype=torch.float64)

    def reset(self) -> None:
        super().reset()
        self.histogram.zero_()
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.bins = self.histogram.shape[-1]


class HistogramObserver(StreamingHistogram):
    """The range that makes the L2 error of quantizing small, out of a histogram.

    Integers that fill their dtype: the field's greedy search, equal to torchao's HistogramObserver to the last bit.
    Fewer integers, e.g. 4 bits held in int8: the range of least error, as MSEObserver has it. (torchao's search lays
    2**bits(dtype) cells whatever quant_min and quant_max are, so it clips too little; and a greedy search with few
    cells often stops at its first step.) The same where the errors that the greedy search compares overflow float32,
    as they do for values from some 1e10 (with far outliers) or 1e14 on: torchao clips nearly all of such data.

    Arguments and errors as in StreamingHistogram.
    """

    def chosen_range(self) -> Range:
        if self._is_within_half_a_step():  # Every range within it gets the scale eps, and no steps of zero point.
            return self.min_val, self.max_val
        if not self.searches_greedily():
            return self.least_error_range()
        return self._range_of(*greedy_bins(self.counts()[None], [self.bin_width()], self.levels()))

    def searches_greedily(self) -> bool:
        """True where the range is searched: the integers fill their dtype, and it does not lie within half a step."""
        fills_dtype = (self.quant_min, self.quant_max) == integer_range(self.dtype)
        return fills_dtype and not self._is_within_half_a_step()

    def _is_within_half_a_step(self) -> bool:
        return max(-self.min_val.item(), self.max_val.item()) < self.eps.item() / 2

    def counts(self) -> torch.Tensor:
        """Returns the histogram as it is searched: float32, on the CPU."""
        return self.histogram.float().cpu()

    def bin_width(self) -> float:
        """Returns the width of a bin, in units of the values."""
        return (self.max_val.item() - self.min_val.item()) / self.bins

    def levels(self) -> int:
        """Returns how many integers there are."""
        return self.quant_max - self.quant_min + 1

    def take(self, found: Bins | None) -> None:
        """Keeps the scale and zero point of what a search found, unless they are an error, until statistics change."""
        with contextlib.suppress(CalibrationError):  # Who asks for them is told.
            self._qparams = self._mark(), self._calculate_qparams(*self._range_of(found))

    def _range_of(self, found: Bins | None) -> Range:
        if found is None:
            return self.least_error_range()
        bin_width = (self.max_val - self.min_val) / self.bins
        return self.min_val + bin_width * found[0], self.min_val + bin_width * (found[1] + 1)


def histograms_in(observers: Iterable[Any]) -> list[HistogramObserver]:
    """Returns those whose range is searched as here, each once; a class of the user's may choose it otherwise."""
    return list({id(each): each for each in observers if _searches_as_here(each)}.values())


def _searches_as_here(observer: Any) -> bool:
    return type(observer) is HistogramObserver and "chosen_range" not in vars(observer)


def search_together(observers: Iterable[HistogramObserver]) -> None:
    """Searches the ranges of observers side by side, in half the time; each keeps the scale and zero point.

    Those without data, and those that search otherwise, are left out.
    """
    alike: dict[tuple[int, int], list[HistogramObserver]] = {}
    for observer in observers:
        if observer.min_val.item() <= observer.max_val.item() and observer.searches_greedily():
            alike.setdefault((observer.bins, observer.levels()), []).append(observer)
    for (bins, levels), group in alike.items():
        rows = max(1, MOST_BINS // bins)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            histograms = torch.stack([observer.counts() for observer in part])
            widths = [observer.bin_width() for observer in part]
            for observer, found in zip(part, greedy_bins(histograms, widths, levels), strict=True):
                observer.take(found)


def count(x: torch.Tensor, bins: int, low: float, high: float) -> torch.Tensor:
    """Returns how many values of float32 ``x``, all within ``low..high``, fall into each bin: ``(bins,)``, float32.

    The bins are those of ``torch.histc``, ``(x - low) * bins / (high - low)`` in float32, the last with ``high`` in it.
    That function takes three times as long for a large tensor on a CPU; it is left the ranges whose bins are no normal
    numbers. Where the product would overflow, and ``torch.histc`` puts nearly all values into an outer bin, the values
    are made smaller first.
    """
    span, size = high - low, x.numel()
    if span > LARGEST / bins:
        return count(x * SHRINK, bins, low * SHRINK, high * SHRINK)
    if span == 0:
        return torch.histc(x.flatten()[:1], bins, min=low, max=high) * size
    if size < LARGE:
        return torch.histc(x, bins, min=low, max=high)
    if x.device.type == "cpu" and span >= SMALLEST * bins:
        return _count_in_pieces(x.flatten(), bins, low, high)
    parts = [torch.histc(part, bins, min=low, max=high) for part in x.flatten().split(EXACT_COUNT)]
    return functools.reduce(torch.add, parts)


def _count_in_pieces(x: torch.Tensor, bins: int, low: float, high: float) -> torch.Tensor:
    lanes = LANES if LANES * (bins + 1) <= 2**15 else 1
    counts: torch.Tensor | None = None
    for piece in x.split(PIECE) if x.numel() > PIECE else (x,):
        index = scratch(piece.numel(), torch.int16 if lanes > 1 else torch.int32)
        index.copy_(_places(piece, bins, low, high))
        if lanes > 1:
            _spread(index, bins + 1)
        of_piece = torch.bincount(index, minlength=lanes * (bins + 1))
        counts = of_piece if counts is None else counts.add_(of_piece)
    assert counts is not None
    total = counts.view(lanes, bins + 1).sum(0)
    total[bins - 1] += total[bins]  # What ``high`` itself is counted in.
    return total[:bins].float()


def _places(x: torch.Tensor, bins: int, low: float, high: float) -> torch.Tensor:
    """Returns where in ``0..bins`` each value lies, as float32."""
    span = float(np.float32(high) - np.float32(low))
    place = scratch(x.numel(), torch.float32)
    above = torch.sub(x, low, out=place) if low else x
    if bins & (bins - 1) == 0:  # Multiplying by a power of 2 does not round.
        return torch.div(above, span / bins, out=place)
    return torch.mul(above, bins, out=place).div_(span)


def _spread(index: torch.Tensor, size: int) -> None:
    """Adds ``size``, 2 ``size``, 3 ``size`` to the last three of each four int16 indices, by one addition of int64."""
    rest = index.numel() % LANES
    whole = index[:-rest] if rest else index
    whole.view(torch.int64).add_(_lane_offsets(size))


@functools.cache
def _lane_offsets(size: int) -> int:
    return sum(lane * size << 16 * lane for lane in range(LANES))


def moved(histogram: torch.Tensor, before: tuple[float, float], after: tuple[float, float]) -> torch.Tensor:
    """Returns the counts of ``histogram``, over the range ``before``, in as many bins over the wider range ``after``.

    Each bin is cut into ``UPSAMPLE_RATE`` equal parts, and a part goes whole to the bin that its middle falls into.
    float32 arithmetic in the field's order, so that the counts are equal to torchao's.
    """
    bins = len(histogram)
    if before[0] == before[1]:
        return count(histogram.new_tensor([before[0]]), bins, *after) * histogram.sum()
    parts = histogram.repeat_interleave(UPSAMPLE_RATE) / UPSAMPLE_RATE
    ends = histogram.new_tensor(before)
    half = 0.5 * ((ends[1] - ends[0]) / len(parts))
    middles = torch.linspace(*before, len(parts) + 1, device=histogram.device)[:-1] + half
    edges = torch.linspace(*after, bins + 1, device=histogram.device)
    target = (torch.bucketize(middles, edges, right=True) - 1).clamp_(0, bins - 1)
    return torch.bincount(target, weights=parts, minlength=bins)
