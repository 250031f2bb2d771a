"""Affine observers, as in ``torchao.quantization.pt2e._affine_quantization``."""

from zeropoint.numerics.granularity import reduction as _get_reduction_params
from zeropoint.numerics.mapping import choose_qparams_affine_with_min_max
from zeropoint.numerics.observers import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedPlaceholderObserver,
)

__all__ = [
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedMovingAverageMinMaxObserver",
    "AffineQuantizedPlaceholderObserver",
    "_get_reduction_params",
    "choose_qparams_affine_with_min_max",
]
