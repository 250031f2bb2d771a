"""``package.module:name``: what a user's own Python says."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from zeropoint.cli.exits import UsageError
from zeropoint.core.errors import ZeropointError

FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_python_name(text: str) -> bool:
    """True for ``package.module:name``."""
    return FORM.fullmatch(text) is not None


def find(text: str) -> Any:
    """Returns what a name stands for; modules of the present folder are found as well.

    Raises:
        UsageError: there is no such module, it cannot be imported, or it has no such name.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        what = f"there is no module {error.name!r}"
        raise UsageError(what, where=text, remedy="Run the command in its folder, or install its package.") from error
    except Exception as error:
        raise UsageError(f"{module} cannot be imported: {type(error).__name__}: {error}", where=text) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module} has no {name!r}", where=text, remedy=f"It has: {_names(found)}.")
        found = getattr(found, part)
    return found


def call(found: Any, where: str, remedy: str) -> Any:
    """Returns what a user's function or class gives without arguments.

    Raises:
        UsageError: it cannot be called so, or raised something.
    """
    if not callable(found):
        raise UsageError(f"it is {type(found).__name__}, which cannot be called", where=where, remedy=remedy)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UsageError(f"it cannot be called without arguments: {error}", where=where, remedy=remedy) from error
    except ValueError:  # It has no signature that is known.
        pass
    try:
        return found()
    except ZeropointError:
        raise
    except Exception as error:
        raise _raised(error, where) from error


def items(found: Iterable[Any], where: str) -> Iterator[Any]:
    """Yields what a user's iterable does.

    Raises:
        UsageError: it raised something.
    """
    try:
        yield from found
    except ZeropointError:
        raise
    except Exception as error:
        raise _raised(error, where) from error


def _raised(error: Exception, where: str) -> UsageError:
    return UsageError(f"it raised {type(error).__name__}: {error}", where=where, remedy="--debug shows where.")


def _names(found: Any) -> str:
    return ", ".join(name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name)))
