"""What every benchmark needs: its arguments, times of alternating runs, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zeropoint.runtime.measure import alternate, median_ratio

__all__ = ["alternate", "median_ratio", "parser", "seconds", "write_json"]


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


def write_json(path: str | None, figures: Any) -> None:
    """Writes the figures where the user asked for them."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")
