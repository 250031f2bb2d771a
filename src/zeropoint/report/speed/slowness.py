"""Why a quantized file is not faster than the float one: what speaks for it, with the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from zeropoint.report.speed.borders import Borders
from zeropoint.report.speed.speed import processor_notes
from zeropoint.report.speed.work import NodeWork, integer_and_float

SMALL_MS = 0.2
"""Below it, a call of the runtime and starting its threads is much of the time."""
LARGE_SHARE = 0.2
"""From this share of the multiply-accumulates on, float ones are named as a reason."""
NOISE = 1.5
"""Where the 90th percentile is so many times the median, other work on the machine disturbs the times."""
COSTS = "each costs a pass over its values"


def reasons(
    work: Sequence[NodeWork],
    borders: Borders,
    *,
    float_ms: float,
    spread: float,
    delegates: tuple[int, int],
    outside: Sequence[tuple[str, int]],
) -> tuple[str, ...]:
    """Returns sentences that say why a quantized file is not faster, the weightiest first; one at least.

    Args:
        work: the multiply-accumulates of the model, by node.
        borders: its conversions at run time.
        float_ms: the median time of the float file, in ms.
        spread: the 90th percentile of the quantized file's times over their median.
        delegates: pieces on the delegate, of the float file and of the quantized one.
        outside: operators that the quantized file has outside of it, with how often.
    """
    found = [
        *_of_work(work),
        *_of_conversions(borders),
        *_of_pieces(delegates, outside),
        *_of_size(work, float_ms),
        *_of_noise(spread),
    ]
    nothing = "nothing in the graph or of the processor explains it: look at the times of the runs, on an idle machine"
    return tuple(found) or (nothing,)


def _of_work(work: Sequence[NodeWork]) -> Iterator[str]:
    integer, floating = integer_and_float(work)
    whole = integer + floating
    if not whole:
        yield "no operator multiplies and accumulates, which is where int8 gains"
        return
    if not integer:
        yield f"none of the {whole:,} multiply-accumulates are in integers: int8 makes the file smaller, not faster"
        return
    if floating >= LARGE_SHARE * whole:
        yield f"{floating / whole:.0%} of the multiply-accumulates stay float ({floating:,} of {whole:,})"
    depthwise = [node for node in work if node.is_integer and node.is_depthwise]
    share = sum(node.multiply_accumulates for node in depthwise) / whole
    yield from processor_notes(len(depthwise), f"of {len(work)} layers, {share:.0%} of the multiply-accumulates")


def _of_conversions(borders: Borders) -> Iterator[str]:
    if borders.islands:
        count, operators = len(borders.islands), Counter(name for each in borders.islands for name in each.operators)
        named = ", ".join(f"{name} {times}" for name, times in operators.most_common(4))
        verb = "groups of float operators stand" if count > 1 else "group of float operators stands"
        crossed = f"{borders.entries} values are quantized and {borders.exits} dequantized at a border"
        yield f"{count} {verb} between integer ones ({named}): {crossed}, and {COSTS}"
    if borders.requantizations:
        count = borders.requantizations
        yield f"{count} requantization{'s' * (count > 1)}: integers are brought to another scale, and {COSTS}"


def _of_pieces(delegates: tuple[int, int], outside: Sequence[tuple[str, int]]) -> Iterator[str]:
    if delegates[1] > max(1, delegates[0]):
        yield f"the file runs in {delegates[1]} pieces on the delegate, the float file in {delegates[0]}"
    if outside:
        named = ", ".join(f"{name} {count}" for name, count in outside[:6])
        yield f"operators run outside of the delegate, in slow portable kernels: {named}"


def _of_size(work: Sequence[NodeWork], float_ms: float) -> Iterator[str]:
    if float_ms < SMALL_MS:
        whole = sum(node.multiply_accumulates for node in work)
        yield (
            f"the model is small: float takes {float_ms:.3g} ms for {whole:,} multiply-accumulates, "
            "and much of that is the cost of a call, which int8 does not change"
        )


def _of_noise(spread: float) -> Iterator[str]:
    if spread > NOISE:
        yield f"the times vary: their 90th percentile is {spread:.1f} times their median, so the machine was busy"
