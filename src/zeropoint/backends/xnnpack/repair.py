"""Repairs of a converted graph whose q/dq forms the delegate would compute wrongly, before it is exported."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.backends.xnnpack.sound import SAME_SCALE, pads_itself
from zeropoint.graph.attributes import Names, attribute_reads, get_attribute
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bias_grid import grid_of
from zeropoint.graph.bind import argument, reads, replace_read, set_argument
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.emit import MADE_BY, Emitter
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import CONVOLUTIONS, LAYERS, TRANSPOSED, pads_with_zero
from zeropoint.numerics import ops

aten = torch.ops.aten

WEIGHT_ONLY = (ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_CHANNEL)
"""Of weights that a portable kernel dequantizes; there is none for groups."""
PACKED = (-8, 7)
ONE_DIMENSION = (aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default)


@graph_pass
def repair(model: GraphModule) -> None:
    """Gives each operator quantizers and parameters such as the delegate wants them; what is computed stays."""
    give_each_padding_its_quantize(model)
    give_each_move_one_scale(model)
    give_each_layer_its_bias(model)
    give_each_layer_of_one_dimension_its_weight(model)
    hold_4_bits_of_convolutions_in_8(model)
    multiply_by_dequantized_weights(model)


def give_each_layer_its_bias(model: GraphModule) -> None:
    """Clones a bias that several layers read: the delegate would quantize it once, with the first one's scale.

    Layers of one input scale and one weight, as the steps of a recurrent layer are, read one bias.
    """
    layers = [node for node in model.graph.nodes if node.target in LAYERS]
    _give_each_its_own(model, [(node, "bias", grid_of(node)) for node in layers])


def give_each_layer_of_one_dimension_its_weight(model: GraphModule) -> None:
    """Copies a quantized weight that several layers read, which executorch 1.4 gives a second dimension for each."""
    weights = [argument(node, "weight") for node in model.graph.nodes if node.target in ONE_DIMENSION]
    _give_each_its_own(model, [(weight, "input", weight) for weight in weights if weight.target in ops.DEQUANTIZE_OPS])


def hold_4_bits_of_convolutions_in_8(model: GraphModule) -> None:
    """Stores the 4-bit weight of each convolution as int8, of the same values.

    The delegate packs -8..7 two to a byte, and has kernels for linear layers only; executorch 1.4 fails at the weight
    of a convolution (``convert_to_qc4w``).
    """
    for layer in model.graph.nodes:
        weight = argument(layer, "weight") if layer.target in (*CONVOLUTIONS, *TRANSPOSED) else None
        if not isinstance(weight, Node) or weight.target not in ops.DEQUANTIZE_OPS:
            continue
        if (argument(weight, "quant_min"), argument(weight, "quant_max")) == PACKED:
            set_argument(weight, "quant_min", -128)
            set_argument(weight, "quant_max", 127)


def _give_each_its_own(model: GraphModule, places: list[tuple[Node, str, object]]) -> None:
    """Copies a parameter that is read at several places, so that each key has one of its own.

    A place is a node, the name of its argument, and a key: places of equal ones share the parameter.
    """
    names = Names(model)
    seen: dict[str, dict[object, Node]] = defaultdict(dict)
    for node, name, key in places:
        read = argument(node, name)
        if not isinstance(read, Node) or read.op != "get_attr":
            continue
        path = str(read.target)
        known = seen[path]
        if key in known:
            set_argument(node, name, known[key])
            continue
        if known:
            _give_own_parameter(model, node, name, names.new(f"{path.replace('.', '_')}_"))
        known[key] = argument(node, name)


def give_each_move_one_scale(model: GraphModule) -> None:
    """Requantizes what an operator that only moves or picks values reads, where its output has another scale.

    Before or after it is the same: values are rounded one by one, and rounding keeps their order.
    """
    for node in list(model.graph.nodes):
        reader = sole_reader(node)
        if node.target not in SAME_SCALE or reader is None or reader.target is not ops.QUANTIZE_PER_TENSOR:
            continue
        for site, source in list(reads(node)):
            if source.target is ops.DEQUANTIZE_PER_TENSOR and source.args[1:5] != reader.args[1:5]:
                emit = Emitter(node, "give_each_move_one_scale")
                replace_read(site, _quantized_again(emit, source, reader.args[1:], source.kwargs))


def give_each_padding_its_quantize(model: GraphModule) -> None:
    """Quantizes what zero padding of quantized values returns, unless a convolution pads itself; else no file loads.

    That changes nothing: each value is on the grid of the input already, and 0 is on every grid.
    """
    for node in [n for n in model.graph.nodes if pads_with_zero(n)]:
        source = node.all_input_nodes[0]
        if source.target is not ops.DEQUANTIZE_PER_TENSOR:
            continue
        for reader in list(node.users):
            if reader.target is not ops.QUANTIZE_PER_TENSOR and not pads_itself(reader, node):
                emit = Emitter(reader, "give_each_padding_its_quantize")
                reader.replace_input_with(node, _quantized_again(emit, node, source.args[1:], source.kwargs))


def multiply_by_dequantized_weights(model: GraphModule) -> None:
    """Makes a batched product and a sum of each linear layer whose weight alone is quantized.

    The delegate would multiply by the integers. As a factor of a product of two tensors, the weight is dequantized
    before each call, by a portable kernel, and stays integers in the file.
    """
    for node in list(model.graph.nodes):
        if node.target is not aten.linear.default or argument(node, "weight").target not in WEIGHT_ONLY:
            continue
        if argument(node, "input").target in ops.DEQUANTIZE_OPS or _is_quantized(node):
            continue
        if _has_float_zero_points(argument(node, "weight")):
            continue
        shape = node.meta["val"].shape
        if sum(not isinstance(size, int) for size in shape[:-1]) <= 1:
            node.replace_all_uses_with(_product(node, [size if isinstance(size, int) else -1 for size in shape]))
            model.graph.erase_node(node)


def _has_float_zero_points(dequantize: Node) -> bool:
    zero_point = dequantize.args[2]
    return isinstance(zero_point, Node) and bool(zero_point.meta["val"].is_floating_point())


def _is_quantized(node: Node) -> bool:
    reader = sole_reader(node)
    return reader is not None and reader.target in ops.QUANTIZE_OPS


def _product(node: Node, shape: list[int]) -> Node:
    """Returns the result of a linear layer, of this shape, as that of a product with a batch of one."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    emit = Emitter(node, "multiply_by_dequantized_weights")
    outputs, inputs = weight.meta["val"].shape
    rows = emit.call(aten.reshape.default, x, [1, -1, inputs])
    transposed = emit.call(aten.permute.default, weight, [1, 0])
    columns = emit.call(aten.reshape.default, transposed, [1, inputs, outputs])
    batched = emit.call(aten.bmm.default, rows, columns)
    for made in (rows, transposed, columns, batched):
        for key in MADE_BY:  # ExecuTorch would find the linear layer again by it, and make one of the product.
            made.meta.pop(key, None)
    product = emit.call(aten.reshape.default, batched, shape)
    return product if bias is None else emit.call(aten.add.Tensor, product, bias)


def _quantized_again(emit: Emitter, source: Node, qparams: tuple[Any, ...], out_dtype: dict[str, Any]) -> Node:
    """Returns the source quantized and dequantized by the given scale and zero point."""
    quantized = emit.call(ops.QUANTIZE_PER_TENSOR, source, *qparams)
    return emit.call(ops.DEQUANTIZE_PER_TENSOR, quantized, *qparams, **out_dtype)


@graph_pass
def give_each_batch_norm_its_weight(model: GraphModule) -> None:
    """Copies the weight of a batch norm to a path that is a plain name.

    executorch 1.4 names the convolution that it makes of a batch norm after that path, and looks for it by that name in
    a graph, where ``0.weight`` became ``_0_weight`` (backends/xnnpack/_passes/decompose_batch_norm.py).
    """
    names = Names(model)
    for node in [node for node in model.graph.nodes if node.target in BATCH_NORMS]:
        weight = argument(node, "weight")
        if isinstance(weight, Node) and weight.op == "get_attr":
            _give_own_parameter(model, node, "weight", names.new("batch_norm_weight_"))


def _give_own_parameter(model: GraphModule, node: Node, name: str, path: str) -> None:
    """Makes an argument of the node read a copy of its parameter at a new path."""
    read = argument(node, name)
    value = get_attribute(model, str(read.target)).detach().clone()
    model.register_parameter(path, nn.Parameter(value, requires_grad=False))
    with node.graph.inserting_before(node):
        own = node.graph.get_attr(path)
    own.meta = dict(read.meta)
    set_argument(node, name, own)


def begin_names_with_letters(model: GraphModule) -> None:
    """Renames submodules and tensors of the model that are named by a number, as those of ``nn.Sequential`` are.

    executorch 1.4 does not find the parameters again that it makes of them where it folds a batch norm itself: it looks
    for ``0_weight_fused_bn`` among names that torch made identifiers.
    """
    names = Names(model)
    for held in (model._modules, model._parameters, model._buffers):
        for name in [name for name in held if name[:1].isdigit()]:
            new = names.new(f"n{name}_")
            held[new] = held.pop(name)  # type: ignore[assignment]
            for node in attribute_reads(model.graph):
                first, dot, rest = str(node.target).partition(".")
                if first == name:
                    node.target = f"{new}{dot}{rest}"
