"""What a float and a quantized file take on the runtime, in numbers and in words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from zeropoint.report.speed.borders import Borders
from zeropoint.report.speed.slowness import reasons
from zeropoint.report.speed.work import NodeWork, integer_and_float
from zeropoint.report.summary import size_line

NO_GAIN = 0.9
"""From this share of the float time on, the quantized file counts as not faster."""
MOST_FLOAT = 3
"""Float layers that are named, those of the most work."""


@dataclass(frozen=True, slots=True)
class FileFigures:
    """One file on the runtime.

    Args:
        size: its bytes.
        seconds: of each run, in their order.
        peak_bytes: by how much the peak of resident memory of a process of its own grew while it read the file, whose
            bytes are included, loaded it and ran it; None where the system does not tell.
        delegates: pieces that run on the backend's delegate.
        outside: operators outside of it, with how often.
    """

    size: int
    seconds: tuple[float, ...]
    peak_bytes: int | None
    delegates: int
    outside: tuple[tuple[str, int], ...]

    @property
    def median_ms(self) -> float:
        """The median of the runs, in ms."""
        return statistics.median(self.seconds) * 1e3

    @property
    def p90_ms(self) -> float:
        """What nine of ten runs did not exceed, in ms."""
        ordered = sorted(self.seconds)
        return ordered[-(-len(ordered) * 9 // 10) - 1] * 1e3


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A float and a quantized file of one model, on the same inputs. Printing it gives the text.

    Args:
        float_file: the float one.
        quantized_file: the other.
        warmup: runs of each file before those that were timed.
        threads: of the runtime.
        processor: the name of the processor's integer dot product instruction; empty where none is known.
        work: the multiply-accumulates of the quantized model, by node.
        borders: its conversions at run time.
    """

    float_file: FileFigures
    quantized_file: FileFigures
    warmup: int
    threads: int
    processor: str
    work: tuple[NodeWork, ...]
    borders: Borders

    @property
    def runs(self) -> int:
        """How often each file was run and timed."""
        return len(self.quantized_file.seconds)

    @property
    def ratio(self) -> float:
        """The median over the rounds of the quantized file's time over the float one's in the same round."""
        pairs = zip(self.quantized_file.seconds, self.float_file.seconds, strict=True)
        return statistics.median(quantized / float_s for quantized, float_s in pairs)

    @property
    def integer_macs(self) -> int:
        """Multiply-accumulates in integers."""
        return integer_and_float(self.work)[0]

    @property
    def float_macs(self) -> int:
        """Multiply-accumulates in float."""
        return integer_and_float(self.work)[1]

    @property
    def why(self) -> tuple[str, ...]:
        """Sentences that say why the quantized file is not faster; empty where it takes less than 0.9 of the time."""
        if self.ratio < NO_GAIN:
            return ()
        ours, floats = self.quantized_file, self.float_file
        return reasons(
            self.work, self.borders, float_ms=floats.median_ms, spread=ours.p90_ms / ours.median_ms,
            delegates=(floats.delegates, ours.delegates), outside=ours.outside,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as dictionaries, lists, texts and numbers."""
        files = {"float": self.float_file, "quantized": self.quantized_file}
        return {
            **{name: {**asdict(f), "median_ms": f.median_ms, "p90_ms": f.p90_ms} for name, f in files.items()},
            "ratio": self.ratio,
            "runs": self.runs,
            "warmup": self.warmup,
            "threads": self.threads,
            "processor": self.processor,
            "multiply_accumulates": {"integer": self.integer_macs, "float": self.float_macs},
            "work": [asdict(node) for node in self.work],
            "borders": asdict(self.borders),
            "why": list(self.why),
        }

    def to_json(self) -> str:
        """Returns all figures as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        ours, floats = self.quantized_file, self.float_file
        latency = (
            f"float {floats.median_ms:.3g} ms, quantized {ours.median_ms:.3g} ms: {self.ratio:.2f} of the float time"
        )
        runs = f"{self.runs} alternating runs after {self.warmup}, {_times(self.threads, 'thread')}"
        left = ", ".join(f"{name} {count}" for name, count in ours.outside) or "nothing"
        return "\n".join(
            [
                f"latency   {latency}",
                f"          medians of {runs}",
                f"          90th percentile: float {floats.p90_ms:.3g} ms, quantized {ours.p90_ms:.3g} ms",
                size_line(floats.size, ours.size, "file"),
                f"memory    {_memory_text(floats.peak_bytes, ours.peak_bytes)}",
                *self._work_lines(),
                f"borders   {_borders_text(self.borders)}",
                f"delegates float {floats.delegates}, quantized {ours.delegates}; left outside: {left}",
                f"processor integer dot product: {self.processor or 'none known'}",
                *(f"why       {sentence}" for sentence in self.why),
            ]
        )

    def _work_lines(self) -> list[str]:
        whole = self.integer_macs + self.float_macs
        if not whole:
            return ["work      no operator of the model multiplies and accumulates"]
        integer = f"{self.integer_macs:,} multiply-accumulates in integers ({self.integer_macs / whole:.1%})"
        lines = [f"work      {integer}, {self.float_macs:,} in float"]
        named = most_float(self.work)
        return lines + (
            [f"          in float, the most: {', '.join(_node_text(node) for node in named)}"] if named else []
        )


def most_float(work: Iterable[NodeWork]) -> list[NodeWork]:
    """Returns the float nodes of the most work."""
    floats = [node for node in work if not node.is_integer and node.multiply_accumulates]
    return sorted(floats, key=lambda node: -node.multiply_accumulates)[:MOST_FLOAT]


def _node_text(node: NodeWork) -> str:
    place = f" in {node.module}" if node.module else ""
    return f"{node.node} ({node.operator}{place}) {node.multiply_accumulates:,}"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _memory_text(float_bytes: int | None, quantized_bytes: int | None) -> str:
    if float_bytes is None or quantized_bytes is None:
        return "not measured: this system does not tell the peak of a process"
    what = "growth of a process's peak as it reads, loads and runs it"
    return f"float {float_bytes / 1e6:.1f} MB, quantized {quantized_bytes / 1e6:.1f} MB: {what}"


def _borders_text(borders: Borders) -> str:
    entries = f"{_times(borders.entries, 'float value')} quantized, {borders.exits} dequantized"
    islands = _times(len(borders.islands), "float island")
    return f"{entries}; {_times(borders.requantizations, 'requantization')}; {islands}"
