"""As in ``torchao.quantization.pt2e.quantizer.composable_quantizer``."""

from zeropoint.annotate.quantizer import ComposableQuantizer

__all__ = ["ComposableQuantizer"]
