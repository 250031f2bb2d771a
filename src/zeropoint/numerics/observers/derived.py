"""An observer that computes its scale and zero point from those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class DerivedObserver(nn.Module):
    """Stands where a derived spec was; passes its input through.

    Args:
        obs_or_fqs: the observers that ``derive_qparams_fn`` is given, in order. They are not submodules: they have
            places of their own in the graph.
        derive_qparams_fn: returns tensors ``(scale, zero_point)``.
    """

    def __init__(
        self,
        obs_or_fqs: Sequence[Any],
        derive_qparams_fn: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__()
        self.obs_or_fqs: list[Any] = list(obs_or_fqs)
        self.derive_qparams_fn = derive_qparams_fn
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max
        self.qscheme, self.ch_axis, self.is_dynamic = qscheme, ch_axis, False
        self.site, self.constant_input = "", False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x``."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what ``derive_qparams_fn`` makes of the other observers."""
        return self.derive_qparams_fn(self.obs_or_fqs)
