"""Repairs of a program in ExecuTorch's edge dialect, where composite operators are decomposed, before it is divided.

What is done to the graph before cannot see inside of operators such as ``softplus`` and ``im2col``.
"""

from __future__ import annotations

from operator import floordiv, mod, mul, sub
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.backends.xnnpack.sound import WEIGHT_DQ
from zeropoint.core.extras import import_extra
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.sizes import is_never_negative
from zeropoint.numerics import ops

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
SAME_AS_INPUT = (aten.view_copy.default, aten.unsqueeze_copy.default, aten.squeeze_copy.dim, aten.linear.default)
"""What ExecuTorch keeps in the order of the exported program (``_passes/channels_last_tagged_reshape_pass.py``)."""


@graph_pass
def repair_program(model: GraphModule) -> None:
    """Makes the program one whose pieces the delegate computes rightly; a pass for ``transform_passes``."""
    drop_empty_padding(model)
    give_each_inner_padding_its_quantize(model)
    give_each_reader_its_dequantize(model)
    keep_the_last_dimension_last(model)
    give_remainders_the_sign_of_python(model)
    model.recompile()


def operator(node: Node) -> Any:
    """Returns the operator that an edge operator stands for; other targets as they are."""
    return getattr(node.target, "_op", node.target)


def drop_empty_padding(model: GraphModule) -> None:
    """Removes padding by nothing, as unfold leaves it."""
    for node in _calls(model, aten.constant_pad_nd.default):
        if not any(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def give_each_inner_padding_its_quantize(model: GraphModule) -> None:
    """Quantizes what zero padding of quantized values returns, unless a quantized convolution reads it.

    Padding that a decomposition made; where a float operator reads it, no file would load. Each value is on the grid
    of the input already, and so is 0.
    """
    quantize = _edge().quantized_decomposed.quantize_per_tensor.default
    for node in _calls(model, aten.constant_pad_nd.default):
        source, value = node.args[0], node.args[2] if len(node.args) > 2 else 0.0
        if operator(source) is not ops.DEQUANTIZE_PER_TENSOR or value != 0:
            continue
        for reader in [user for user in node.users if not _takes_padding(user)]:
            with model.graph.inserting_before(reader):
                quantized = model.graph.call_function(quantize, (node, *source.args[1:]))
                again = model.graph.call_function(source.target, (quantized, *source.args[1:]), source.kwargs)
            quantized.meta = {**node.meta, "val": node.meta["val"].to(source.args[5])}
            again.meta = dict(node.meta)
            reader.replace_input_with(node, again)


def _takes_padding(reader: Node) -> bool:
    if operator(reader) is CONVOLUTION:
        return any(operator(source) in WEIGHT_DQ for source in reader.all_input_nodes[1:])
    return operator(reader) is ops.QUANTIZE_PER_TENSOR


def give_each_reader_its_dequantize(model: GraphModule) -> None:
    """Clones what several operators read dequantized.

    With a reader inside of a piece and one outside, the piece returns garbage or fails to load.
    """
    for node in _calls(model, *ops.DEQUANTIZE_OPS):
        for reader in list(node.users)[1:]:
            with model.graph.inserting_after(node):
                own = model.graph.node_copy(node)
            reader.replace_input_with(node, own)


def keep_the_last_dimension_last(model: GraphModule) -> None:
    """Views what a softmax, or a linear layer quantized at run time, reads as it is, where it may be channels last.

    ExecuTorch would leave it so, and XNNPACK take the softmax over the channels, which are last in memory; and between
    the dequantize and the linear layer ExecuTorch would put a copy.
    """
    view = _edge().aten.view_copy.default
    for node in _calls(model, aten._softmax.default, *ops.CHOOSE_QPARAMS_OPS):
        source = node.args[0]
        readers = [node, *_quantizes(node)]
        if not _may_be_channels_last(source) or any(_convolves(each) for each in readers[1:]):
            continue
        with model.graph.inserting_before(node):
            viewed = model.graph.call_function(view, (source, _sizes(model, source)))
        viewed.meta = dict(source.meta)
        for reader in readers:
            reader.replace_input_with(source, viewed)


def give_remainders_the_sign_of_python(model: GraphModule) -> None:
    """Spells ``a % b`` of sizes, where ``a`` may be negative, as ``a - a // b * b``: padding to a multiple has such.

    The runtime takes the remainder of C, ``-28 % 16 = -12`` where it is 4 (``executorch_prim::mod.Scalar``); its
    ``floordiv`` is that of Python.
    """
    for node in _calls(model, mod):
        a, b = node.args
        if all(is_never_negative(_value(each)) for each in (a, b)):
            continue
        with model.graph.inserting_before(node):
            quotient = model.graph.call_function(floordiv, (a, b))
            quotient.meta["val"] = _value(a) // _value(b)
            product = model.graph.call_function(mul, (quotient, b))
            product.meta["val"] = quotient.meta["val"] * _value(b)
            remainder = model.graph.call_function(sub, (a, product))
        remainder.meta = dict(node.meta)
        node.replace_all_uses_with(remainder)
        model.graph.erase_node(node)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _quantizes(choose_qparams: Node) -> list[Node]:
    """Returns what quantizes with the scale that is chosen at run time."""
    chosen = [reader for item in choose_qparams.users for reader in item.users]
    return [node for node in dict.fromkeys(chosen) if operator(node) in ops.QUANTIZE_OPS]


def _convolves(quantize: Node) -> bool:
    return any(operator(reader) is CONVOLUTION for dequantize in quantize.users for reader in dequantize.users)


def _may_be_channels_last(node: Node) -> bool:
    """True where an operator computes channels last and nothing between it and the node puts the order back."""
    passes = import_extra("executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass", "executorch")
    channels_last = passes.ChannelsLastTaggedReshapePass.memory_sensitive_ops_nhwc
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        value = current.meta.get("val")
        if current in seen or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        if current.target in channels_last:
            return True
        seen.add(current)
        if operator(current) not in SAME_AS_INPUT:
            waiting.extend(current.all_input_nodes)
    return False


def _sizes(model: GraphModule, node: Node) -> list[Any]:
    """Returns the sizes of what the node returns: -1 where one is free, nodes where several are."""
    sizes = list(node.meta["val"].shape)
    free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    for i in free:
        if len(free) == 1:
            sizes[i] = -1
            continue
        read = model.graph.call_function(aten.sym_size.int, (node, i))
        read.meta["val"], sizes[i] = sizes[i], read
    return sizes


def _calls(model: GraphModule, *operators: Any) -> list[Any]:
    return [node for node in model.graph.nodes if node.op == "call_function" and operator(node) in operators]


def _edge() -> Any:
    return import_extra("executorch.exir.dialects._ops", "executorch").ops.edge
