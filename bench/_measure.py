"""What every benchmark needs: its arguments, times of alternating runs, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the option that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    return made


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long one call took, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Returns the seconds of each call of each function, called in turn so that noise meets all of them."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function)[0])
    return times


def median_ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Returns the median over the rounds of one function's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def write_json(path: str | None, figures: Any) -> None:
    """Writes the figures where the user asked for them."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")
