"""An observer of values whose range is known beforehand, such as a sigmoid's output."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.arguments import require_integer, require_positive
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import PER_TENSOR
from zeropoint.numerics.observers.base import UniformQuantizationObserverBase


class FixedQParamsObserver(UniformQuantizationObserverBase):
    """Gives the scale and zero point it was built with, as buffers of shape ``(1,)``, float32 and int32.

    Args:
        scale: positive and finite.
        zero_point: within the integers' range.
        dtype, qscheme, quant_min, quant_max, is_dynamic, settings: those of the base.

    Raises:
        SpecError: scale or zero point cannot be.
    """

    schemes = PER_TENSOR
    supports_dynamic = False
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **settings: Any,
    ) -> None:
        bounds = {"quant_min": quant_min, "quant_max": quant_max}
        super().__init__(dtype, qscheme, is_dynamic=is_dynamic, **bounds, **settings)
        where = type(self).__name__
        require_positive("scale", scale, where)
        if not self.quant_min <= require_integer("zero_point", zero_point, where) <= self.quant_max:
            remedy = f"Choose one in {self.quant_min}..{self.quant_max}."
            raise SpecError(f"zero_point={zero_point} is outside of the range", where=where, remedy=remedy)
        self.register_buffer("eps", self.eps, persistent=False)  # no smallest scale: it is not part of the state
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale and zero point that were given."""
        return self.scale, self.zero_point
