"""The fake quantizers, as in ``torchao.quantization.pt2e.fake_quantize``."""

from zeropoint.numerics.fake_quantize import *  # noqa: F403
