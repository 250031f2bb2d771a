"""Memory that is used again: fresh pages cost more than what is computed in them (0.5 to 3 us for each 4 kB)."""

from __future__ import annotations

import threading

import torch

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
