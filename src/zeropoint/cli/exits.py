"""What the command's exit codes mean, and how errors become them: in words, without a traceback unless asked for."""

from __future__ import annotations

import enum
import functools
import sys
import traceback
from collections.abc import Callable
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


class UsageError(SpecError):
    """An argument, an option or a configuration file that says something impossible."""


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
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _end(Exit.INTERRUPTED, "interrupted; nothing is left half written", show_trace=debug)
        except ZeropointError as error:
            _end(code_of(error), str(error), show_trace=debug)
        except Exception as error:
            hint = "" if debug else " This may be a defect of zeropoint: --debug shows where it happened."
            _end(Exit.FAILED, f"{type(error).__name__}: {str(error).strip()}.{hint}", show_trace=debug)

    return run


def _end(code: Exit, message: str, *, show_trace: bool) -> None:
    if show_trace:
        traceback.print_exc()
    sys.stderr.write(f"zeropoint: {message}\n")
    sys.stderr.flush()
    sys.exit(int(code))
