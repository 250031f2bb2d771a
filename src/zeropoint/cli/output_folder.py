"""A folder of results that is there whole, or as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from zeropoint.cli.exits import UsageError
from zeropoint.core.errors import FileError

FILES = ("model.pte", "summary.json", "explain.txt", "config.toml", "report.html")
"""What is written."""


def check_free(folder: Path, *, force: bool) -> None:
    """Raises where the results cannot go: before any work.

    Raises:
        UsageError: there is a file, or a folder with something in it and no ``force``; or with other things than
            results, which ``force`` would delete.
        FileError: the folder around it is not there, or cannot be written to.
    """
    _check_parent(folder.resolve().parent)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError("there is a file of that name", where=str(folder), remedy="Choose another folder.")
    found = sorted(path.name for path in folder.iterdir())
    others = [name for name in found if name not in FILES]
    if others:
        what = f"the folder holds other things: {', '.join(others[:5])}"
        raise UsageError(what, where=str(folder), remedy="Choose a new folder.")
    if found and not force:
        raise UsageError("the folder holds results", where=str(folder), remedy="Give --force to replace them.")


def check_file_free(file: Path, *, force: bool) -> None:
    """Raises where a file cannot go: before any work.

    Raises:
        UsageError: there is something of that name, and no ``force``; or a folder.
        FileError: the folder around it is not there, or cannot be written to.
    """
    _check_parent(file.resolve().parent)
    if file.is_dir():
        raise UsageError("there is a folder of that name", where=str(file), remedy="Give the name of a file.")
    if file.exists() and not force:
        raise UsageError("the file is there", where=str(file), remedy="Give --force to replace it.")


def _check_parent(parent: Path) -> None:
    if not parent.is_dir():
        raise FileError("there is no such folder", where=str(parent), remedy="Create it, or choose another.")
    if not os.access(parent, os.W_OK):
        raise FileError("it cannot be written to", where=str(parent), remedy="Choose another.")


@contextlib.contextmanager
def written_whole(folder: Path) -> Generator[Path]:
    """Yields a temporary folder beside the one that is wanted, which it becomes at the end; after an error it is gone.

    Raises:
        FileError: it cannot be written.
    """
    target = folder.resolve()
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise FileError(f"cannot be written: {error.strerror}", where=str(target)) from error
    try:
        yield temporary
        _put(temporary, target)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be written: {error.strerror}", where=str(target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, target: Path) -> None:
    """Renames a folder to what it is to be called, in place of an older one, which is back where that fails."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    try:
        target.rename(aside / "old")
        temporary.rename(target)
    finally:  # After a signal between the two as well.
        if not target.exists():
            (aside / "old").rename(target)
        shutil.rmtree(aside, ignore_errors=True)
