"""Were there enough samples? How far the ranges of activations still moved at the end of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SETTLED_STEPS = 4.0
"""A range whose ends moved by no more steps in the second half of the data has settled: 1.6 % of 256 steps."""


@dataclass(frozen=True, slots=True)
class RangeConvergence:
    """How the range of an activation grew, in float, from the first half of the batches to all of them.

    Args:
        site: what is quantized.
        half: smallest and largest value in the first half of the batches.
        full: the same in all of them.
        moved_steps: how far the end that moved most went in the second half, in steps of the site's scale: by so much
            a range chosen by the smallest and largest value of half of the batches is off.
        last_batch: the last batch that widened the range.
    """

    site: str
    half: tuple[float, float]
    full: tuple[float, float]
    moved_steps: float
    last_batch: int

    @property
    def is_settled(self) -> bool:
        """True when the second half of the batches moved the range by few steps."""
        return self.moved_steps <= SETTLED_STEPS


@dataclass(frozen=True, slots=True)
class Convergence:
    """Were there enough samples?

    Args:
        batches: how many batches were seen.
        ranges: one for each activation whose range is fixed, that which moved most first.
    """

    batches: int
    ranges: tuple[RangeConvergence, ...]

    @property
    def is_settled(self) -> bool | None:
        """True when no range moved much in the second half; None where one batch cannot tell."""
        return None if self.batches < 2 else all(each.is_settled for each in self.ranges)

    def __str__(self) -> str:
        if self.is_settled is None:
            return "samples   one batch does not tell whether it is enough: give two or more"
        if not self.ranges:
            return "samples   no activation has a range that was measured"
        worst, moving = self.ranges[0], sum(not each.is_settled for each in self.ranges)
        if self.is_settled:
            return (
                f"samples   enough: the second half of {self.batches} batches moved no range by more than "
                f"{worst.moved_steps:.1f} steps"
            )
        return (
            f"samples   too few: the second half of {self.batches} batches still moved {moving} of {len(self.ranges)} "
            f"ranges by more than {SETTLED_STEPS:.0f} steps, that of {worst.site} by {worst.moved_steps:.0f}, last in "
            f"batch {worst.last_batch}; calibrate with more data"
        )


def range_convergence(site: str, ranges: Sequence[tuple[float, float]], scale: float) -> RangeConvergence:
    """Returns how a range grew over the batches; ``ranges`` are the smallest and largest value of each."""
    half = _joined(ranges[: (len(ranges) + 1) // 2])
    low, high, last = *ranges[0], 0
    for index, (small, large) in enumerate(ranges):
        if small < low or large > high:
            low, high, last = min(low, small), max(high, large), index
    moved = max(half[0] - low, high - half[1]) / scale
    return RangeConvergence(site, half, (low, high), moved, last)


def _joined(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the smallest and largest of all."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)
