"""Observers of the smallest and largest value: per tensor, per channel, per group; running or moving average.

The scale and zero point of a range are those of ``zeropoint.numerics.qparams``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import PER_CHANNEL, PER_TENSOR
from zeropoint.numerics.observers.base import UniformQuantizationObserverBase, in_memory_order, is_plain
from zeropoint.numerics.qparams import USUAL, rounded

Range = tuple[torch.Tensor, torch.Tensor]


class _RangeObserver(UniformQuantizationObserverBase):
    """Keeps ``min_val`` and ``max_val``, of the shape that ``batch_range`` gives. Costs one pass over each tensor."""

    min_val: torch.Tensor
    max_val: torch.Tensor
    last: tuple[float, float] | None = None
    """Ends of ``batch_range`` of the tensor observed last, of an observer of whole tensors."""

    def observe(self, x: torch.Tensor) -> None:
        self._take(*self.batch_range(x))

    def _take(self, low: torch.Tensor, high: torch.Tensor) -> None:
        if low.dim() == 0:
            smallest, largest = low.item(), high.item()
            self.require_finite(smallest, largest)
            self.__dict__["last"] = smallest, largest
        else:
            self.require_finite(low.amin().item(), high.amax().item())
        low, high = low.to(self.min_val), high.to(self.max_val)
        if self.batches > 0 or self._has_range():
            self._require_shape(self.min_val, low)
            low, high = self.merged(low, high)
        elif low.shape != self.min_val.shape:
            self.min_val.resize_(low.shape)
            self.max_val.resize_(high.shape)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def _has_range(self) -> bool:
        return self.min_val.numel() > 0 and bool((self.min_val <= self.max_val).all())

    def batch_range(self, x: torch.Tensor) -> Range:
        """Returns the smallest and the largest values of ``x``, of its dtype."""
        raise NotImplementedError

    def merged(self, low: torch.Tensor, high: torch.Tensor) -> Range:
        """Returns the range so far joined with that of a new tensor."""
        return torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)

    def calculate_qparams(self) -> Range:
        """Returns ``(scale, zero_point)`` of the range so far.

        Raises:
            CalibrationError: no tensor was observed.
        """
        return self._calculate_qparams(self.min_val, self.max_val)

    def last_range(self) -> tuple[float, float] | None:
        """Returns the smallest and largest value of the tensor that was observed last.

        None where that is not known: a class of the user's may observe another tensor than it is called with.
        """
        is_ours = all(getattr(type(self), name) is getattr(MinMaxObserver, name) for name in _LOOKS)
        return self.last if is_ours else None

    def qparams_in_numbers(self) -> tuple[float, int] | None:
        """Returns what ``calculate_qparams`` does, faster; None where they are many, or not of the usual size."""
        is_ours = all(getattr(type(self), name) is getattr(_RangeObserver, name) for name in _QPARAMS)
        return self._in_numbers(self.min_val, self.max_val) if is_ours else None

    def reset(self) -> None:
        super().reset()
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)


_LOOKS = ("forward", "observe", "batch_range")
_QPARAMS = ("calculate_qparams", "_calculate_qparams")


class _MovingAverage(_RangeObserver):
    """Moves the range by ``averaging_constant`` of the way to that of each new tensor; the first one counts whole.

    Args:
        averaging_constant: in (0, 1]; 1 keeps the last tensor's range only.
        args, settings: those of the observer without the average.
    """

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not 0 < averaging_constant <= 1:
            what = f"averaging_constant={averaging_constant} is no share"
            raise SpecError(what, where=type(self).__name__, remedy="Choose 0 < averaging_constant <= 1.")
        if self.is_dynamic and averaging_constant != 1:
            what = f"is_dynamic=True needs averaging_constant=1, not {averaging_constant}"
            remedy = "A dynamic range is that of one tensor: set averaging_constant=1."
            raise SpecError(what, where=type(self).__name__, remedy=remedy)
        self.averaging_constant = averaging_constant

    def merged(self, low: torch.Tensor, high: torch.Tensor) -> Range:
        share = self.averaging_constant
        return self.min_val + share * (low - self.min_val), self.max_val + share * (high - self.max_val)


class MinMaxObserver(_RangeObserver):
    """The smallest and the largest value of all tensors. Statistics of shape ``()``; arguments as in the base."""

    schemes = PER_TENSOR

    def _register_statistics(self, factory: dict[str, Any]) -> None:
        self.register_buffer("min_val", torch.tensor(torch.inf, **factory))
        self.register_buffer("max_val", torch.tensor(-torch.inf, **factory))

    def batch_range(self, x: torch.Tensor) -> Range:
        low, high = torch.aminmax(in_memory_order(x))
        return low, high


class MovingAverageMinMaxObserver(_MovingAverage, MinMaxObserver):
    """The moving average of the smallest and the largest value. ``averaging_constant`` comes first."""

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        **settings: Any,
    ) -> None:
        named = {"eps": eps, "is_dynamic": is_dynamic, **settings}
        super().__init__(averaging_constant, dtype, qscheme, reduce_range, quant_min, quant_max, **named)

    def _take(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Does in numbers what operators take ten times as long for: training steps of small models consist of it."""
        is_ours = type(self).merged is _MovingAverage.merged
        if not is_ours or low.dtype != torch.float32 or low.dim() > 0 or not is_plain(self.min_val):
            return super()._take(low, high)
        new, known = (low.item(), high.item()), (self.min_val.item(), self.max_val.item())
        self.require_finite(*new)
        if self.batches > 0 or known[0] <= known[1]:
            if not all(-USUAL < value < USUAL for value in (*new, *known)):
                return super()._take(low, high)
            moved = tuple(_moved(*pair, self.averaging_constant) for pair in zip(known, new, strict=True))
        else:
            moved = new
        self.min_val.fill_(moved[0])
        self.max_val.fill_(moved[1])
        self.__dict__["last"] = new
        return None


def _moved(value: float, to: float, share: float) -> float:
    """Returns ``value + share * (to - value)`` in float32."""
    return rounded(value + rounded(rounded(share) * rounded(to - value)))


class _ManyRanges(_RangeObserver):
    """Keeps one range for each channel or group; how many is known from the first tensor."""

    schemes = PER_CHANNEL
    supports_dynamic = False

    def _register_statistics(self, factory: dict[str, Any]) -> None:
        self.register_buffer("min_val", torch.tensor([], **factory))
        self.register_buffer("max_val", torch.tensor([], **factory))

    def reset(self) -> None:
        super().reset()
        self.min_val.resize_(0)
        self.max_val.resize_(0)


class PerChannelMinMaxObserver(_ManyRanges):
    """The smallest and the largest value of each channel. Statistics of shape ``(channels,)``.

    Args:
        ch_axis: axis of the channels; None: 0.
        args, settings: those of the base.
    """

    def __init__(self, ch_axis: int | None = 0, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ch_axis = 0 if ch_axis is None else require_integer("ch_axis", ch_axis, type(self).__name__)

    def batch_range(self, x: torch.Tensor) -> Range:
        blocks = channel_blocks(x, self.ch_axis, self.where)
        return outer_amin(blocks), outer_amax(blocks)


class MovingAveragePerChannelMinMaxObserver(_MovingAverage, PerChannelMinMaxObserver):
    """The moving average of each channel's range. ``averaging_constant`` comes first, then ``ch_axis``."""

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int | None = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        **settings: Any,
    ) -> None:
        named = {"eps": eps, "is_dynamic": is_dynamic, **settings}
        super().__init__(averaging_constant, ch_axis, dtype, qscheme, reduce_range, quant_min, quant_max, **named)


class PerGroupMinMaxObserver(_ManyRanges):
    """The smallest and the largest value of each ``group_size`` neighbours on the last axis.

    Statistics of shape ``(*x.shape[:-1], x.shape[-1] // group_size)``: x keeps its shape from batch to batch.

    Args:
        group_size: how many values share a scale; it divides the last axis.
        args, settings: those of the base; ``qscheme`` is a per-channel one.
    """

    def __init__(self, group_size: int = 128, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if require_integer("group_size", group_size, type(self).__name__) < 1:
            what = f"group_size={group_size} is no number of values"
            raise SpecError(what, where=type(self).__name__, remedy="Choose group_size >= 1.")
        self.group_size = group_size
        self.ch_axis = -1

    def batch_range(self, x: torch.Tensor) -> Range:
        if x.dim() == 0 or x.shape[-1] % self.group_size:
            what = f"group_size={self.group_size} does not divide the last axis of shape {tuple(x.shape)}"
            raise CalibrationError(what, where=self.where, remedy="Choose a group_size that divides it.")
        groups = x.unflatten(-1, (-1, self.group_size))
        return groups.amin(-1), groups.amax(-1)


class MovingAveragePerGroupMinMaxObserver(_MovingAverage, PerGroupMinMaxObserver):
    """The moving average of each group's range. ``averaging_constant`` comes first, then ``group_size``."""


def channel_blocks(x: torch.Tensor, ch_axis: int, where: str) -> torch.Tensor:
    """Returns ``x`` as ``(before, channels, after)``, a view where memory allows.

    Raises:
        CalibrationError: ``x`` has no such axis.
    """
    if not -x.dim() <= ch_axis < x.dim():
        what = f"ch_axis={ch_axis} is no axis of a tensor of shape {tuple(x.shape)}"
        raise CalibrationError(what, where=where, remedy="Choose the channel axis of this operator's tensor.")
    axis = ch_axis % x.dim()
    return x.reshape(math.prod(x.shape[:axis]), x.shape[axis], -1)


# The inner axis first, each a plain reduction: several times faster than torch.aminmax with a dim, or than two axes
# at once (0.3 against 3 to 9 ns per element).
def outer_amin(blocks: torch.Tensor) -> torch.Tensor:
    """Returns the smallest value of each channel of ``(before, channels, after)``."""
    rows = blocks.squeeze(2) if blocks.shape[2] == 1 else blocks.amin(2)
    return rows.amin(0)


def outer_amax(blocks: torch.Tensor) -> torch.Tensor:
    """Returns the largest value of each channel of ``(before, channels, after)``."""
    rows = blocks.squeeze(2) if blocks.shape[2] == 1 else blocks.amax(2)
    return rows.amax(0)
