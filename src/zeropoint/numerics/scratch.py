"""Memory that is there when it is wanted: the pages of fresh memory can cost more than what is computed in them.

A page of 4 kB takes 0.2 us to come by, on a virtual machine 5 us: six times as long as rounding its 4096 weights.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

WORTH_A_THREAD = 2**24
"""Bytes of fresh memory from which on another thread is started for them."""


class _Kept(threading.local):
    """The tensors of a thread, by dtype."""

    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, torch.Tensor] = {}


_kept = _Kept()


def scratch(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a 1-d CPU tensor of any content, good until this thread asks for the next one of the dtype.

    What is kept is as large as the largest that was asked for; ask for pieces of bounded size.
    """
    kept = _kept.tensors.get(dtype)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # One made in inference mode could not be written to outside of it.
            kept = _kept.tensors[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return kept.narrow(0, 0, size)


class LateWrites:
    """Fresh tensors, written at the end of a block; meanwhile another thread writes zeros to them.

    Then their pages are there when they are written. That thread calls no operator of torch: OpenMP would start as many
    threads for it as there are processors, beside those of the caller, and both would wait for each other.
    """

    def __init__(self) -> None:
        self._untouched: list[torch.Tensor] = []
        self._writes: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> LateWrites:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Writes what was asked for, unless the block failed."""
        for thread in self._threads:
            thread.join()
        for write in self._writes if kind is None else ():
            write()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Returns a CPU tensor of any content, to be zeroed by ``touch``."""
        with torch.inference_mode(False):  # Else the other thread could not write to it.
            self._untouched.append(torch.empty(shape, dtype=dtype, device="cpu"))
        return self._untouched[-1]

    def touch(self) -> None:
        """Lets another thread zero the tensors made so far, where they are worth it."""
        tensors, self._untouched = self._untouched, []
        if sum(tensor.nbytes for tensor in tensors) >= WORTH_A_THREAD:
            self._threads.append(threading.Thread(target=_zero, args=(tensors,)))
            self._threads[-1].start()

    def write(self, function: Callable[[], None]) -> None:
        """Has a function called at the end of the block."""
        self._writes.append(function)


def _zero(tensors: Sequence[torch.Tensor]) -> None:
    """Zeroes contiguous CPU tensors, and lets Python run beside it."""
    for tensor in tensors:
        ctypes.memset(tensor.data_ptr(), 0, tensor.nbytes)
