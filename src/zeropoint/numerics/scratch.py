"""Memory that is there when it is wanted: the pages of fresh memory can cost more than what is computed in them.

A page of 4 kB takes 0.2 us to come by, on a virtual machine 5 us: six times as long as rounding its 4096 weights.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence

import torch

WORTH_A_THREAD = 2**24
"""Bytes of fresh memory from which on another thread is started for them."""
_of_thread = threading.local()


def scratch(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a 1-d CPU tensor of any content, good until this thread asks for the next one of the dtype.

    What is kept is as large as the largest that was asked for; ask for pieces of bounded size.
    """
    kept: dict[torch.dtype, torch.Tensor] = _of_thread.__dict__.setdefault("kept", {})
    if dtype not in kept or len(kept[dtype]) < size:
        with torch.inference_mode(False):  # One made in inference mode could not be written to outside of it.
            kept[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return kept[dtype][:size]


@contextlib.contextmanager
def touching(tensors: Sequence[torch.Tensor]) -> Generator[None]:
    """Has another thread write zeros to fresh tensors while the block runs; at its end, their pages are there.

    One call for all of them, since that runs beside Python.
    """
    if sum(tensor.nbytes for tensor in tensors) < WORTH_A_THREAD:
        yield
        return
    thread = threading.Thread(target=torch.ops.aten._foreach_zero_.default, args=(tensors,))
    thread.start()
    try:
        yield
    finally:
        thread.join()
