"""What programs use of ``torchao.quantization.pt2e.prepare``."""

from zeropoint.graph.observers import calls_observer as _is_activation_post_process_node

__all__ = ["_is_activation_post_process_node"]
