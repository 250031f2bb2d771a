"""Affine observers of the smallest and largest value of each block; running or moving average."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics.granularity import Granularity, PerAxis, PerRow, PerTensor, PerToken, reduction
from zeropoint.numerics.mapping import MappingType, ZeroPointDomain, choose_qparams_affine_with_min_max
from zeropoint.numerics.observers.affine import AffineQuantizedObserverBase
from zeropoint.numerics.observers.base import in_memory_order
from zeropoint.numerics.qparams import FLOAT32_EPS

Range = tuple[torch.Tensor, torch.Tensor]


class _AffineRangeObserver(AffineQuantizedObserverBase):
    """Keeps ``min_val`` and ``max_val``, buffers of the tensor's dtype which exist from the first tensor on.

    They have one value for each block: ``()`` per tensor, ``(channels,)`` per axis, the tensor's shape without the axis
    that is reduced per token and per row, ``(..., n / group_size)`` per group.
    """

    min_val: torch.Tensor
    max_val: torch.Tensor

    def observe(self, x: torch.Tensor) -> None:
        super().observe(x)
        low, high = self._range(x)
        self.require_finite(low.amin().item(), high.amax().item())
        if "min_val" not in self._buffers or self.is_dynamic:
            self.register_buffer("min_val", low)
            self.register_buffer("max_val", high)
            return
        if self.min_val.shape != low.shape:
            what = f"the statistics are of shape {tuple(self.min_val.shape)}, those of this batch {tuple(low.shape)}"
            remedy = "Calibrate with batches of one size, use PerTensor or PerAxis, or choose scales at run time."
            raise CalibrationError(f"{what}: {self.granularity}", where=self.where, remedy=remedy)
        low, high = self.merged(low.to(self.min_val), high.to(self.max_val))
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def _range(self, x: torch.Tensor) -> Range:
        """Returns the smallest and the largest value of each block."""
        if isinstance(self.granularity, PerTensor):
            low, high = torch.aminmax(in_memory_order(x))
            return low, high
        assert self.block_size is not None
        view, inside = reduction(self.block_size, x.shape)
        blocks = x.reshape(view)
        low, high = (blocks.amin(inside), blocks.amax(inside)) if inside else (blocks.clone(), blocks.clone())
        shape = _statistics_shape(self.granularity, x.shape, low.shape)
        return low.reshape(shape), high.reshape(shape)

    def merged(self, low: torch.Tensor, high: torch.Tensor) -> Range:
        """Returns the ranges so far joined with those of a new tensor."""
        return torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``(scale, zero_point)``, one for each block.

        Raises:
            CalibrationError: no tensor was observed.
        """
        if "min_val" not in self._buffers:
            raise self.no_data()
        scale, zero_point = choose_qparams_affine_with_min_max(
            self.min_val,
            self.max_val,
            self.mapping_type,
            (),
            self.target_dtype,
            self.quant_min,
            self.quant_max,
            FLOAT32_EPS if self.eps is None and self.is_dynamic else self.eps,
            self.scale_dtype,
            self.zero_point_dtype,
        )
        assert zero_point is not None
        return scale, zero_point

    def reset(self) -> None:
        super().reset()
        for name in ("min_val", "max_val"):
            self._buffers.pop(name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes room for the saved statistics."""
        for name in ("min_val", "max_val"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                known = self._buffers.get(name)
                self.register_buffer(name, torch.empty_like(saved, device=None if known is None else known.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class AffineQuantizedMinMaxObserver(_AffineRangeObserver):
    """The smallest and the largest value of each block, of all tensors. Arguments as in the base."""


class AffineQuantizedMovingAverageMinMaxObserver(_AffineRangeObserver):
    """Moves each range by ``averaging_constant`` of the way to that of a new tensor; the first one counts whole.

    Args:
        averaging_constant: in (0, 1]; 1 keeps the last tensor's ranges only.
        is_dynamic: scale and zero point are chosen from each tensor at run time; needs ``averaging_constant=1``.
        mapping_type, target_dtype, granularity, settings: those of the base.
    """

    supports_dynamic = True

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        averaging_constant: float = 0.01,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        **spec: Any,
    ) -> None:
        super().__init__(
            mapping_type, target_dtype, granularity, quant_min, quant_max, eps, scale_dtype, zero_point_dtype,
            preserve_zero, zero_point_domain, is_dynamic=is_dynamic, **spec,
        )  # fmt: skip
        what, where = f"averaging_constant={averaging_constant}", type(self).__name__
        if not 0 < averaging_constant <= 1:
            raise SpecError(f"{what} is no share", where=where, remedy="Choose 0 < averaging_constant <= 1.")
        if is_dynamic and averaging_constant != 1:
            remedy = "A dynamic range is that of one tensor: set averaging_constant=1."
            raise SpecError(f"is_dynamic=True with {what}", where=where, remedy=remedy)
        self.averaging_constant = averaging_constant

    def merged(self, low: torch.Tensor, high: torch.Tensor) -> Range:
        share = self.averaging_constant
        return self.min_val + share * (low - self.min_val), self.max_val + share * (high - self.max_val)


def _statistics_shape(granularity: Any, shape: torch.Size, reduced: torch.Size) -> tuple[int, ...]:
    """Returns the shape of the statistics of a tensor; ``reduced``: that which its reduction left.

    The two differ where an axis of one element alone is reduced.
    """
    match granularity:
        case PerAxis(axis):
            return (shape[axis],)
        case PerToken():
            return tuple(shape[:-1])
        case PerRow(dim):
            return tuple(size for axis, size in enumerate(shape) if axis != dim % len(shape))
        case _:
            return tuple(reduced)
