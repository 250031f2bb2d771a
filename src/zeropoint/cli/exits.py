"""What the command's exit codes mean, and how errors become them: in words, without a traceback unless asked for."""

from __future__ import annotations

import contextlib
import enum
import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from typing import ParamSpec

from zeropoint.core.errors import (
    RuleError,
    SpecError,
    StaysFloatError,
    UnknownNameError,
    VerificationError,
    ZeropointError,
)

P = ParamSpec("P")


class Exit(enum.IntEnum):
    """Exit codes, as docs/command.md lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CHECK = 3
    INTERRUPTED = 130
    TERMINATED = 143


class UsageError(SpecError):
    """An argument, an option or a configuration file that says something impossible."""


class Terminated(KeyboardInterrupt):
    """The process was told to end, by SIGTERM."""


class CheckFailed(ZeropointError):
    """A check that was asked for, and did not hold."""


CODES: tuple[tuple[type[BaseException], Exit], ...] = (
    (UsageError, Exit.USAGE),
    (RuleError, Exit.USAGE),
    (UnknownNameError, Exit.USAGE),
    (CheckFailed, Exit.CHECK),
    (StaysFloatError, Exit.CHECK),
    (VerificationError, Exit.CHECK),
)
"""The first kind that an error is of gives the code; any other error is a failure."""


def code_of(error: BaseException) -> Exit:
    """Returns the exit code for an error."""
    return next((code for kind, code in CODES if isinstance(error, kind)), Exit.FAILED)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Makes the errors of a command messages on standard error, and exit codes; ``debug=True`` adds the traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            with _ended_in_order():
                command(*args, **kwargs)
        except KeyboardInterrupt as error:
            is_told = isinstance(error, Terminated)
            code, word = (Exit.TERMINATED, "terminated") if is_told else (Exit.INTERRUPTED, "interrupted")
            _end(code, f"{word}; nothing is left half written", show_trace=debug)
        except ZeropointError as error:
            _end(code_of(error), str(error), show_trace=debug)
        except BrokenPipeError:
            raise  # Who reads the results has enough, as ``head`` has: typer ends without a word.
        except Exception as error:
            hint = "" if debug else f" {_whose(error)}: --debug shows where it happened."
            _end(Exit.FAILED, f"{type(error).__name__}: {_without_trace(error)}.{hint}", show_trace=debug)

    return run


IN_MODEL = "While executing"
TRACE = "\nOriginal traceback:"
"""What torch.fx adds to an error of an operator in a graph: the operator, and after it the model's own traceback."""


def _without_trace(error: Exception) -> str:
    return " ".join(str(error).partition(TRACE)[0].split())


def _whose(error: Exception) -> str:
    if IN_MODEL in str(error):
        return "The model fails on these inputs, an index out of its range among them, or zeropoint has a defect"
    return "This may be a defect of zeropoint"


@contextlib.contextmanager
def _ended_in_order() -> Generator[None]:
    """Makes SIGTERM an exception, as Ctrl-C is one, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():  # Only that takes signals.
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> None:
    raise Terminated


def _end(code: Exit, message: str, *, show_trace: bool) -> None:
    if show_trace:
        traceback.print_exc()
    sys.stderr.write(f"zeropoint: {message}\n")
    sys.stderr.flush()
    sys.exit(int(code))
