"""An observer of a tensor whose values another observer has seen already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RepeatedObserver(nn.Module):
    """Stands after an operator that only moves values, such as a view: looking at them twice tells nothing new.

    Args:
        observer: the one that saw the values before they were moved; it answers for this one.
    """

    def __init__(self, observer: Any) -> None:
        super().__init__()
        self._answers: list[Any] = [observer]  # A list, since the observer is a submodule elsewhere.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x``."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the other observer says."""
        return self._answers[0].calculate_qparams()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self._answers[0], name)
