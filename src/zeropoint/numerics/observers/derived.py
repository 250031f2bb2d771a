"""An observer that computes its scale and zero point from those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from zeropoint.numerics.fake_quantize import FakeQuantizeBase
from zeropoint.numerics.observers.base import ObserverBase, PartialWrapper

ObserverOrFakeQuantize: TypeAlias = ObserverBase | FakeQuantizeBase
"""What a tensor is observed by."""
ObserverOrFakeQuantizeConstructor: TypeAlias = PartialWrapper | type[ObserverBase] | type[FakeQuantizeBase]
"""What a spec builds it from."""


class DerivedObserverOrFakeQuantize(ObserverBase):
    """Stands where a derived spec was; passes its input through.

    Args:
        dtype: what the tensor will be quantized to.
        obs_or_fqs: the observers that ``derive_qparams_fn`` is given, in order. They are not submodules: they have
            places of their own in the graph.
        derive_qparams_fn: returns tensors ``(scale, zero_point)``.
        quant_min, quant_max, qscheme, ch_axis: as in the spec.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        obs_or_fqs: Sequence[Any],
        derive_qparams_fn: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]],
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__(dtype)
        self.obs_or_fqs: list[Any] = list(obs_or_fqs)
        self.derive_qparams_fn = derive_qparams_fn
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme, self.ch_axis = qscheme, ch_axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x``."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what ``derive_qparams_fn`` makes of the other observers."""
        return self.derive_qparams_fn(self.obs_or_fqs)
