"""Times and progress of the stages of long work."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Told the stage that runs, how many of its items are done, and how many it has; None: not known, or it has none."""
QUIET_S = 1.0
"""Work that ends sooner prints no progress."""


class Stages:
    """Measures named stages, and shows how far the present one is on a terminal.

    Args:
        show: write progress to standard error; by default when that is a terminal. Or what is told of it instead.
    """

    def __init__(self, show: bool | Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = show if callable(show) else None
        self._show = sys.stderr.isatty() if show is None else show is True

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Measures what runs inside, under ``name``."""
        self._write(f"{name} ...")
        if self._tell is not None:
            self._tell(name, 0, None)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._write("")

    def count(self, items: Iterable[T], total: int | None, name: str) -> Iterator[T]:
        """Yields the items, with how many are done and the time left, where their number is known."""
        start = time.perf_counter()
        for done, item in enumerate(items):
            passed = time.perf_counter() - start
            if passed > QUIET_S:
                self._write(_line(name, done, total, passed))
            if self._tell is not None:
                self._tell(name, done, total)
            yield item

    def _write(self, line: str) -> None:
        if self._show:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()


def _line(name: str, done: int, total: int | None, passed: float) -> str:
    if total is None or done == 0:
        return f"{name}: {done} done, {passed:.0f} s"
    return f"{name}: {done}/{total}, {passed * (total - done) / done:.0f} s left"
