"""Load and run ``.pte`` files on the ExecuTorch runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from zeropoint.core.errors import FileError, RuntimeFailure, SpecError
from zeropoint.core.extras import import_extra

IDENTIFIER = b"ET12"
"""Bytes 4 to 8 of a ``.pte`` file (executorch/schema/program.fbs)."""

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
    27: torch.uint16,
}
"""The runtime's numbers of dtypes (executorch/exir/scalar_type.py)."""


class Program:
    """A loaded ``.pte`` file. Calling it runs its method ``forward``.

    A kernel that meets what it cannot compute may abort the process, and so may a delegate whose own part of the file
    is damaged: run an unknown file with ``run_in_child``.
    """

    def __init__(self, pte: bytes) -> None:
        """Loads a program from the bytes of a file.

        Raises:
            SpecError: they are no bytes.
            FileError: they are not those of a ``.pte`` file.
            RuntimeFailure: the runtime does not load it.
            MissingExtraError: executorch is not installed.
        """
        pte = _checked_bytes(pte)
        check_identifier(pte, "program")
        runtime = import_extra("executorch.runtime", "executorch")
        import_extra("executorch.kernels.quantized", "executorch")
        self._pte = pte  # The method reads from these bytes as long as it lives.
        # The runtime follows the offsets in a file: without this check a damaged one makes it read outside of the file.
        verification = runtime.Verification.InternalConsistency
        try:
            self._program = runtime.Runtime.get().load_program(pte, verification=verification)
        except (RuntimeError, UnicodeDecodeError) as error:
            what = f"the runtime did not load it: the file is damaged ({error})"
            raise RuntimeFailure(what, where="program", remedy="Copy or write the file again.") from error
        if "forward" not in self._program.method_names:
            what = f"the runtime did not load it: there is no method forward, but {sorted(self._program.method_names)}"
            raise RuntimeFailure(what, where="program", remedy="Give a file that zeropoint wrote.")
        try:
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
            RuntimeFailure: the inputs are not what the program takes, or the runtime fails.
        """
        taken = self._method.metadata
        _check_inputs(inputs, taken)
        contiguous = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs]
        try:
            return tuple(self._method.execute(contiguous))
        except RuntimeError as error:
            given = ", ".join(_text(x) for x in inputs)
            needed = ", ".join(_taken_text(_taken(taken, i)) for i in range(len(inputs)))
            what = f"the runtime failed on inputs {given}, where the program takes {needed}: {error}"
            raise RuntimeFailure(what, where="program") from error


def use_threads(count: int | None) -> int:
    """Lets the runtime of this process use so many threads, before a program is loaded; None: as many as it chooses.

    Returns how many it uses.
    """
    runtime = import_extra("executorch.extension.pybindings.portable_lib", "executorch")
    if count is not None:
        runtime._unsafe_reset_threadpool(count)
    return runtime._threadpool_get_thread_count()


def _checked_bytes(pte: Any) -> bytes:
    if isinstance(pte, (bytes, bytearray, memoryview)):
        return bytes(pte)
    remedy = "Give the bytes of a .pte file, or its path to Program.load."
    raise SpecError(f"pte is {type(pte).__name__}, not bytes", where="program", remedy=remedy)


def _check_inputs(inputs: tuple[Any, ...], taken: Any) -> None:
    """Refuses what the runtime would refuse with a number, and sizes that it would take and compute nonsense from.

    A size of the program is the largest one where it may vary. The runtime then counts elements only: it lets a longer
    row pass if there are fewer of them.
    """
    if len(inputs) != taken.num_inputs():
        raise RuntimeFailure(
            f"{len(inputs)} inputs were given, the program takes {taken.num_inputs()}", where="program"
        )
    for i, x in enumerate(inputs):
        needed = _taken(taken, i) if isinstance(x, torch.Tensor) else None
        if needed is None:
            continue
        dtype, sizes = needed
        fits = x.dim() == len(sizes) and all(found <= size for found, size in zip(x.shape, sizes, strict=True))
        if not fits or x.dtype != dtype:
            what = f"input {i} is {_text(x)}, the program takes {_taken_text(needed)}"
            remedy = "A size of the program is the largest one where it may vary."
            raise RuntimeFailure(what, where="program", remedy=remedy)


def _taken(taken: Any, index: int) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Returns the dtype and the sizes of a tensor that the program takes; None for a number, None or another dtype."""
    try:
        tensor = taken.input_tensor_meta(index)
    except (IndexError, RuntimeError):  # It takes no tensor there.
        return None
    dtype = DTYPES.get(tensor.dtype())
    return None if dtype is None else (dtype, tuple(tensor.sizes()))


def _taken_text(needed: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "something else" if needed is None else f"{needed[0]} of shape {needed[1]}"


def _text(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)


def check_identifier(pte: bytes, where: str) -> None:
    """Raises when bytes are not those of a ``.pte`` file.

    Raises:
        FileError: says so.
    """
    if pte[4:8] != IDENTIFIER:
        what = f"is no .pte file: it starts with {pte[:8]!r}"
        raise FileError(what, where=where, remedy="Give a file that zeropoint or ExecuTorch wrote.")
