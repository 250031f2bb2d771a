"""Observers that choose the range of least mean squared error, with the levels that the quantizer will really have."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.numerics.observers.base import UniformQuantizationObserverBase
from zeropoint.numerics.observers.histogram import Range, StreamingHistogram
from zeropoint.numerics.observers.minmax import channel_blocks
from zeropoint.numerics.observers.range_search import COARSE, SERIAL, least_error_range

CHUNK = 2**21
"""How many elements are worked on at once: bounds the memory of wide tensors, and stays in the cache."""


class MSEObserver(StreamingHistogram):
    """The range for which quantizing makes the least mean squared error, rounding and clipping together.

    The error is that of the scale and zero point that the range gives, eps and scheme included; the values of a bin
    count as spread evenly over it. Found by a search over shares of the whole range (``range_search``), never worse
    than the whole range. (Banner et al. 2019, section 3, minimise the same sum for assumed distributions.)

    Arguments and errors as in StreamingHistogram.
    """

    def chosen_range(self) -> Range:
        return self.least_error_range()


class PerChannelMSEObserver(UniformQuantizationObserverBase):
    """The range of least mean squared error of each channel; for weights. See MSEObserver.

    Keeps a histogram ``(channels, bins)`` over each channel's own range; counts move to a wider range in proportion.

    Args:
        ch_axis: axis of the channels; None: 0.
        bins: number of bins of each channel.
        args, settings: those of the base.
    """

    schemes = PER_CHANNEL
    supports_dynamic = False
    histogram: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, ch_axis: int | None = 0, bins: int = 512, *args: Any, **settings: Any) -> None:
        if bins < 1:
            raise SpecError(f"bins={bins}", where=type(self).__name__, remedy="Choose bins >= 1.")
        super().__init__(*args, **settings)
        self.ch_axis = 0 if ch_axis is None else require_integer("ch_axis", ch_axis, type(self).__name__)
        self.bins = bins

    def _register_statistics(self, factory: dict[str, Any]) -> None:
        for name in ("histogram", "min_val", "max_val"):
            self.register_buffer(name, torch.tensor([], **factory))

    def observe(self, x: torch.Tensor) -> None:
        blocks = channel_blocks(x, self.ch_axis, self.where)
        rows = blocks.transpose(0, 1).reshape(blocks.shape[1], -1).to(self.min_val)
        low, high = rows.amin(1), rows.amax(1)
        self.require_finite(low.amin().item(), high.amax().item())
        if self.min_val.numel() == 0:
            self._set(count_rows(rows, low, high, self.bins), low, high)
            return
        self._require_shape(self.min_val, low)
        low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        old = moved_rows(self.histogram, (self.min_val, self.max_val), (low, high))
        self._set(count_rows(rows, low, high, self.bins) + old, low, high)

    def _set(self, histogram: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        for buffer, value in ((self.histogram, histogram), (self.min_val, low), (self.max_val, high)):
            buffer.resize_(value.shape).copy_(value)

    def calculate_qparams(self) -> Range:
        """Returns ``(scale, zero_point)``, each of shape ``(channels,)``.

        Raises:
            CalibrationError: no tensor was observed.
        """
        self._require_range(self.min_val, self.max_val)
        at_once = SERIAL if self.min_val.device.type == "cpu" else CHUNK
        rows = max(1, at_once // (len(COARSE) * (self.bins + 1)))
        lows, highs = self.min_val.split(rows), self.max_val.split(rows)
        chosen = [
            least_error_range(self, histogram.double(), row_edges(low.double(), high.double(), self.bins))
            for histogram, low, high in zip(self.histogram.split(rows), lows, highs, strict=True)
        ]
        low, high = (torch.cat(ends).to(self.min_val) for ends in zip(*chosen, strict=True))
        return self._calculate_qparams(low, high)

    def reset(self) -> None:
        super().reset()
        for buffer in (self.histogram, self.min_val, self.max_val):
            buffer.resize_(0)


def count_rows(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bins: int) -> torch.Tensor:
    """Returns the histogram of each row between its own ``low`` and ``high``: ``(rows, bins)``, of their dtype."""
    counts: list[torch.Tensor] = []
    step = max(1, CHUNK // rows.shape[1])
    per_value = bins / (high - low).clamp(min=torch.finfo(rows.dtype).tiny)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        index = ((rows[part] - low[part, None]) * per_value[part, None]).to(torch.int64).clamp_(0, bins - 1)
        index += bins * torch.arange(len(index), device=rows.device)[:, None]
        counts.append(index.flatten().bincount(minlength=len(index) * bins).reshape(-1, bins))
    return torch.cat(counts).to(rows.dtype)


def moved_rows(histogram: torch.Tensor, before: Range, after: Range) -> torch.Tensor:
    """Returns each row's counts over its wider range ``after``; a bin's count is split in proportion."""
    bins = histogram.shape[1]
    width = (before[1] - before[0]).clamp(min=torch.finfo(histogram.dtype).tiny)[:, None]
    edges = row_edges(*after, bins)
    position = ((edges - before[0][:, None]) / width * bins).clamp(0, bins)
    index = position.to(torch.int64).clamp_(max=bins - 1)
    below = torch.nn.functional.pad(histogram.cumsum(1), (1, 0))
    at_edge = below.gather(1, index) + (position - index) * histogram.gather(1, index)
    at_edge[:, 0], at_edge[:, -1] = 0, below[:, -1]
    return at_edge.diff(dim=1)


def row_edges(low: torch.Tensor, high: torch.Tensor, bins: int) -> torch.Tensor:
    """Returns the edges of ``bins`` equal bins from each ``low`` to each ``high``: ``(rows, bins + 1)``."""
    share = torch.linspace(0, 1, bins + 1, dtype=low.dtype, device=low.device)
    return torch.lerp(low[:, None], high[:, None], share)
