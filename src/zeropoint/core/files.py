"""Writing files so that an interruption loses nothing."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from zeropoint.core.errors import FileError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file under a temporary name beside its place, then renames it: it is there whole, or as it was.

    Where a link is, the file that it leads to is written. A file that was there keeps its mode.

    Raises:
        FileError: the folder does not exist or cannot be written to; or there is a folder or a device at the path.
    """
    target = Path(path).resolve()
    mode = _mode_to_give(target, Path(path))
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
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise FileError(f"cannot be written: {error.strerror}", where=str(target)) from error
        raise
    return Path(path)


def _mode_to_give(target: Path, named: Path) -> int:
    """Returns the mode of the file that is replaced, or of a new one."""
    try:
        found = target.stat().st_mode
    except OSError:  # Nothing is there, or the folder is not; what is wrong with the folder is said when it is used.
        return 0o666 & ~_umask()
    if not stat.S_ISREG(found):
        what = "cannot be written: there is no regular file there, but a folder, a device or a pipe"
        raise FileError(what, where=str(named), remedy="Choose the path of a file.")
    return stat.S_IMODE(found)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
