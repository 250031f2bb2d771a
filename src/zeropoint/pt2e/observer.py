"""The observers, as in ``torchao.quantization.pt2e.observer``."""

from zeropoint.numerics.observers import *  # noqa: F403
from zeropoint.numerics.observers.defaults import *  # noqa: F403
