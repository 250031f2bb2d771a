"""What the command writes: results on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from zeropoint.cli.data import Data

T = TypeVar("T")


def write_json(value: Any) -> None:
    """Writes a result as JSON, and nothing else, to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def number(value: float | None) -> float | str | None:
    """Returns a number as JSON has it: infinities and NaN as words."""
    return value if value is None or math.isfinite(value) else str(value)


def write_text(text: str) -> None:
    """Writes a result for people to standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Writes a line to standard error."""
    sys.stderr.write(text + "\n")


def warn_of_random(data: Data | None) -> None:
    """Says on standard error that data is random, where it is."""
    if data is not None and data.is_random:
        note("zeropoint: warning: the data is random; ranges and accuracy will not be those of real data")


@contextlib.contextmanager
def only_results(*, debug: bool) -> Generator[None]:
    """Keeps what models and packages print away from standard output, and their warnings quiet unless asked for."""
    previous = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


class StageBar:
    """Shows on standard error, where that is a terminal, which stage runs, how far it is and the time left.

    Used as a context; called by ``quantize`` as its ``progress``.
    """

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("start", total=None)
        self._stage = ""

    def __enter__(self) -> StageBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Shows a stage, and how many of its items are done."""
        if stage != self._stage:
            self._stage = stage
            self._progress.reset(self._task, description=stage, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def each(self, items: Iterable[T], total: int, stage: str) -> Iterator[T]:
        """Yields items, and shows how far they are."""
        for done, item in enumerate(items):
            self(stage, done, total)
            yield item
