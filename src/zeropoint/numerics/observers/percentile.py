"""An observer that leaves out the outermost values."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.errors import SpecError
from zeropoint.core.specs import SYMMETRIC
from zeropoint.numerics.observers.histogram import Range, StreamingHistogram


class PercentileObserver(StreamingHistogram):
    """The range that holds ``percentile`` percent of the values; the rest is clipped.

    Affine: half of the rest lies on either side. Symmetric: the range ``-t..t`` that holds them. The values of a bin
    count as spread evenly over it. As ONNX Runtime's percentile calibration (quantization/calibrate.py), with linear
    interpolation in the bin where that takes the bin's edge.

    Args:
        percentile: in percent, 50 < percentile <= 100.
        bins: number of bins, in which the percentile is found.
        args, settings: those of the base.

    Raises:
        SpecError: ``percentile`` is not in its range.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 2048, *args: Any, **settings: Any) -> None:
        super().__init__(bins, *args, **settings)
        if not 50 < percentile <= 100:
            what = f"percentile={percentile} is no share of the values to keep, in percent"
            raise SpecError(what, where=type(self).__name__, remedy="Choose 50 < percentile <= 100.")
        self.percentile = percentile

    def chosen_range(self) -> Range:
        edges, share = self.edges(), self.percentile / 100
        below = torch.nn.functional.pad(self.histogram.double().cpu().cumsum(0), (1, 0))
        below = below / below[-1]
        if self.qscheme in SYMMETRIC:
            distances = edges.abs().sort().values
            within = interpolate(distances, edges, below) - interpolate(-distances, edges, below)
            limit = interpolate(torch.tensor([share]).double(), within, distances)
            low, high = -limit, limit
        else:
            cut = (1 - share) / 2
            low, high = interpolate(torch.tensor([cut, 1 - cut]).double(), below, edges).split(1)
        return low[0].to(self.min_val), high[0].to(self.max_val)


def interpolate(x: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Returns y at each ``x`` on the line through the points ``(xs, ys)``, level beyond its ends; 1-d tensors.

    ``xs`` never falls; where it stays level, the first of its points counts.
    """
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    rise = (xs[right] - xs[right - 1]).clamp(min=torch.finfo(xs.dtype).tiny)
    share = ((x - xs[right - 1]) / rise).clamp(0, 1)
    return torch.lerp(ys[right - 1], ys[right], share)
