"""What quantizers and passes of other packages take from ``torchao.quantization.pt2e.utils``."""

import torch
from torch.fx import Node

from zeropoint.graph.attributes import get_new_attr_name_with_prefix
from zeropoint.graph.capture import pattern_graph as _get_aten_graph_module_for_pattern
from zeropoint.graph.layers import CONVOLUTIONS, LINEAR, TRANSPOSED

aten = torch.ops.aten
_TRANSPOSED_PACKETS = tuple(each.overloadpacket for each in TRANSPOSED)
_SIZES = (aten.sym_size.default, aten.sym_size.int, aten.sym_size, aten.sym_numel.default, aten.sym_numel)

__all__ = [
    "_filter_sym_size_users",
    "_get_aten_graph_module_for_pattern",
    "_is_conv_node",
    "_is_conv_or_conv_transpose_node",
    "_is_conv_transpose_node",
    "_is_linear_node",
    "get_new_attr_name_with_prefix",
]


def _is_conv_node(n: Node) -> bool:
    """True for a convolution that is not transposed."""
    return n.op == "call_function" and n.target in CONVOLUTIONS


def _is_conv_transpose_node(n: Node) -> bool:
    """True for a transposed convolution."""
    return n.op == "call_function" and getattr(n.target, "overloadpacket", n.target) in _TRANSPOSED_PACKETS


def _is_conv_or_conv_transpose_node(n: Node) -> bool:
    """True for a convolution."""
    return _is_conv_node(n) or _is_conv_transpose_node(n)


def _is_linear_node(n: Node) -> bool:
    """True for a linear layer."""
    return n.op == "call_function" and n.target in LINEAR


def _filter_sym_size_users(node: Node) -> list[Node]:
    """Returns the readers of a node that ask for more than its sizes."""
    return [user for user in node.users if user.target not in _SIZES]
