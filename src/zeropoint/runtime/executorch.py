"""Load and run ``.pte`` files on the ExecuTorch runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from zeropoint.core.errors import FileError, RuntimeFailure
from zeropoint.core.extras import import_extra

IDENTIFIER = b"ET12"
"""Bytes 4 to 8 of a ``.pte`` file (executorch/schema/program.fbs)."""


class Program:
    """A loaded ``.pte`` file. Calling it runs its method ``forward``.

    A kernel that meets what it cannot compute may abort the process: run an unknown file with ``run_in_child``.
    """

    def __init__(self, pte: bytes) -> None:
        """Loads a program from the bytes of a file.

        Raises:
            FileError: they are not those of a ``.pte`` file.
            RuntimeFailure: the runtime does not load it.
            MissingExtraError: executorch is not installed.
        """
        check_identifier(pte, "program")
        runtime = import_extra("executorch.runtime", "executorch")
        import_extra("executorch.kernels.quantized", "executorch")
        self._pte = pte  # The method reads from these bytes as long as it lives.
        try:
            self._program = runtime.Runtime.get().load_program(pte, verification=runtime.Verification.Minimal)
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise RuntimeFailure(f"the runtime did not load it: {error}", where="program") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Returns the program of a file.

        Raises:
            FileError: the file cannot be read or is no ``.pte`` file.
        """
        try:
            pte = Path(path).read_bytes()
        except OSError as error:
            raise FileError(f"cannot be read: {error.strerror}", where=str(path)) from error
        check_identifier(pte, str(path))
        return cls(pte)

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        """Returns the outputs for positional inputs.

        Raises:
            RuntimeFailure: the runtime refuses the inputs or fails.
        """
        contiguous = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs]
        try:
            return tuple(self._method.execute(contiguous))
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, torch.Tensor) else repr(x) for x in inputs)
            raise RuntimeFailure(f"the runtime failed on inputs of shape {shapes}: {error}") from error


def check_identifier(pte: bytes, where: str) -> None:
    """Raises when bytes are not those of a ``.pte`` file.

    Raises:
        FileError: says so.
    """
    if pte[4:8] != IDENTIFIER:
        what = f"is no .pte file: it starts with {pte[:8]!r}"
        raise FileError(what, where=where, remedy="Give a file that zeropoint or ExecuTorch wrote.")
