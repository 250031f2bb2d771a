"""Writing files so that an interruption loses nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from zeropoint.core.errors import FileError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file under a temporary name beside its place, then renames it: it is there whole, or as it was.

    Raises:
        FileError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        remedy = "Create the folder, or choose another."
        raise FileError(f"cannot be written: {error.strerror}", where=str(target), remedy=remedy) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise FileError(f"cannot be written: {error.strerror}", where=str(target)) from error
        raise
    return target


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
