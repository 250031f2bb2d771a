"""torchao's lowering of converted models to Inductor on x86, as it is: our graphs have the form that it takes."""

from zeropoint.core.extras import names_of

__getattr__ = names_of("torchao.quantization.pt2e.lowering", "executorch")
