"""Arrays of ``.npz`` and ``.safetensors`` files, without unpickling."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from zeropoint.core.errors import FileError, ZeropointError
from zeropoint.core.extras import import_extra


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Returns the arrays of a file, by name.

    Raises:
        FileError: it is not there, is damaged, or holds objects that would have to be unpickled.
        MissingExtraError: safetensors is not installed.
    """
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    except ZeropointError:
        raise
    except OSError as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise FileError(what, where=str(path)) from error
    except Exception as error:
        raise FileError(f"it is damaged, or of another kind: {error}", where=str(path)) from error


def _npz(path: Path) -> dict[str, torch.Tensor]:
    if path.exists() and not zipfile.is_zipfile(path):
        raise FileError("it is no .npz file", where=str(path), remedy="Write it with numpy.savez(path, x=...).")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _tensor(arrays, name, path) for name in arrays.files}


def _tensor(arrays: np.lib.npyio.NpzFile, name: str, path: Path) -> torch.Tensor:
    try:
        array = arrays[name]
    except ValueError as error:
        what = f"its array {name!r} holds pickled objects, which are not loaded"
        raise FileError(what, where=str(path), remedy="Write arrays of numbers: numpy.savez(path, x=...).") from error
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        what = f"its array {name!r} is of {array.dtype}"
        raise FileError(what, where=str(path), remedy="Write arrays of numbers.") from error


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(import_extra("safetensors.torch", "cli").load_file(path))
