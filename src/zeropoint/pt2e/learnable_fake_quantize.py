"""The fake quantizer that learns, as in ``torchao.quantization.pt2e.learnable_fake_quantize``."""

from zeropoint.numerics.learnable_fake_quantize import (
    LearnableFakeQuantize,
    disable_range_learning,
    enable_range_learning,
)

__all__ = ["LearnableFakeQuantize", "disable_range_learning", "enable_range_learning"]
