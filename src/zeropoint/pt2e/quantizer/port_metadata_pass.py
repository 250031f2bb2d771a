"""Metadata of quantize and dequantize operators, in graphs that others made: ``convert_pt2e`` gives it to its own."""

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.graph.layers import MOVES
from zeropoint.numerics import ops

__all__ = ["PortNodeMetaForQDQ"]

aten = torch.ops.aten
PORTED = ("stack_trace", "quantization_tag")
MOVING = (
    *MOVES, aten.slice.Tensor, aten.view_copy.default, aten.permute_copy.default, aten.transpose_copy.int,
    aten.squeeze_copy.dim, aten.unsqueeze_copy.default, aten.slice_copy.Tensor,
)  # fmt: skip
"""What may lie between a weight and its quantize operator, as it is exported or lowered to edge."""


class PortNodeMetaForQDQ(PassBase):
    """Gives quantize and dequantize operators the stack trace and the tag of the annotated node that they are for.

    What a node reads is dequantized for it, and quantized for it where the scale is found at run time; what it returns
    is quantized for it. Those of a weight, and what moves its values before, have the weight's own.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Changes metadata in place."""
        for node in graph_module.graph.nodes:
            annotation = node.meta.get(Q_ANNOTATION_KEY)
            if not is_valid_annotation(annotation):
                continue
            for read in node.all_input_nodes:
                if read.target in ops.DEQUANTIZE_OPS:
                    _port(read, node)
                    _port_to_quantize(read.args[0], node)
            if getattr(annotation, "output_qspec", None) is not None:
                for user in node.users:
                    if user.target in ops.QUANTIZE_OPS:
                        _port(user, node)
        return PassResult(graph_module, True)


def _port_to_quantize(quantize: object, reader: Node) -> None:
    if not isinstance(quantize, Node) or quantize.target not in ops.QUANTIZE_OPS:
        return
    chain, source = [quantize], quantize.all_input_nodes[0]
    while source.target in MOVING:
        chain.append(source)
        source = source.all_input_nodes[0]
    if source.op == "get_attr":
        for each in chain:
            _port(each, source)
        return
    found = [
        (scale, choose)
        for scale in quantize.all_input_nodes[1:]
        for choose in scale.all_input_nodes
        if choose.target in ops.CHOOSE_QPARAMS_OPS
    ]
    for each in {quantize, *(node for pair in found for node in pair)} if found else ():
        _port(each, reader)


def _port(node: Node, origin: Node) -> None:
    for key in PORTED:
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
