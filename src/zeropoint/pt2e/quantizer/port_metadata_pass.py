"""Metadata of quantize and dequantize operators, in graphs that others made: ``convert_pt2e`` gives it to its own."""

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.numerics import ops

__all__ = ["PortNodeMetaForQDQ"]

PORTED = ("stack_trace", "quantization_tag")


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
    chain = [quantize]
    while chain[-1].op == "call_function" and chain[-1].all_input_nodes:
        chain.append(chain[-1].all_input_nodes[0])
    if chain[-1].op == "get_attr" and all(len(each.all_input_nodes) == 1 for each in chain[1:-1]):
        for each in chain[:-1]:
            _port(each, chain[-1])
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
