"""The result of ``quantize`` in words."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from zeropoint.passes.round_biases import BiasRounding
from zeropoint.report.coverage import CoverageRow


def coverage_lines(rows: Iterable[CoverageRow], most: int = 12) -> list[str]:
    """Returns what runs in integers by operator, and what stays float, with the reasons."""
    rows = list(rows)
    integer = Counter(row.operator for row in rows if row.is_quantized)
    reasons: dict[tuple[str, str], list[CoverageRow]] = defaultdict(list)
    for row in rows:
        if not row.is_quantized:
            reasons[row.operator, row.reason].append(row)
    named = ", ".join(f"{name} {count}" for name, count in integer.most_common()) or "nothing"
    lines = [f"integer   {sum(integer.values())} of {len(rows)} operators: {named}"]
    for (operator, reason), found in list(reasons.items())[:most]:
        times = f" ({len(found)} times)" if len(found) > 1 else ""
        lines.append(f"float     {found[0].node} ({operator}){times}: {reason}")
    if len(reasons) > most:
        lines.append(f"          ... and {len(reasons) - most} more reasons: see coverage")
    return lines


def bias_lines(biases: Iterable[BiasRounding]) -> list[str]:
    """Returns a line per bias that lost channels: rounded to 0, or clipped to int32."""
    lines: list[str] = []
    for bias in biases:
        if bias.overflowed:
            lines.append(f"warning   bias of {bias.node}: clipped to int32 in channels {_some(bias.overflowed)}")
        if bias.to_zero:
            lines.append(f"note      bias of {bias.node}: rounds to 0 in channels {_some(bias.to_zero)}")
    return lines


def size_line(float_bytes: int, integer_bytes: int, unit: str) -> str:
    """Returns two sizes in bytes and their ratio."""
    ratio = integer_bytes / float_bytes if float_bytes else math.nan
    return f"{unit:<10}{float_bytes:,} -> {integer_bytes:,} bytes ({ratio:.3f})"


def decibels(value: float) -> str:
    """Returns a ratio in dB as text; equal tensors have no finite one, and without tensors there is none."""
    if math.isnan(value):
        return "no float output"
    return "equal bit for bit" if value == math.inf else f"{value:.1f} dB"


def _some(channels: tuple[int, ...]) -> str:
    text = ", ".join(str(c) for c in channels[:8])
    return text + (f" and {len(channels) - 8} more" if len(channels) > 8 else "")
