"""ExecuTorch's XNNPACK delegate: int8 on ARM and x86 processors."""

from zeropoint.backends.xnnpack.config import get_default_quantization_config, get_symmetric_quantization_config
from zeropoint.backends.xnnpack.lower import LoweredProgram, lower, lower_float, lower_program
from zeropoint.backends.xnnpack.prepared import check_prepared
from zeropoint.backends.xnnpack.quantizer import XNNPACKQuantizer

__all__ = [
    "LoweredProgram",
    "XNNPACKQuantizer",
    "check_prepared",
    "get_default_quantization_config",
    "get_symmetric_quantization_config",
    "lower",
    "lower_float",
    "lower_program",
]
