"""torchao's quantizer for Inductor, as it is: its annotations are read here as those of any quantizer."""

from zeropoint.core.extras import names_of

__getattr__ = names_of("torchao.quantization.pt2e.quantizer.arm_inductor_quantizer", "executorch")
