"""From a converted graph to a ``.pte`` file that runs on the XNNPACK delegate."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.backends.xnnpack.edge import repair
from zeropoint.backends.xnnpack.sound import GEMMS, SAME_SCALE, SIZE_RULES, check_sound, pads_itself
from zeropoint.backends.xnnpack.transform import TO_LOWER, spell
from zeropoint.core.errors import LoweringError
from zeropoint.core.extras import import_extra
from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument, reads, replace_read, set_argument
from zeropoint.graph.capture import capture, require_exported
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.compat import is_tensor_value, largest_size
from zeropoint.graph.emit import Emitter, complete_values
from zeropoint.graph.inputs import as_inputs, check_inputs, free_axes, free_sizes, with_free_sizes
from zeropoint.graph.layers import pads_with_zero
from zeropoint.graph.no_ops import erase_no_ops
from zeropoint.numerics import ops

NAME = "xnnpack"
EXAMPLES = "example_inputs"
CYCLE = "dependency cycle"
"""In the message of torch.fx where a piece reads what is computed from itself outside."""


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """A ``.pte`` file in memory.

    Args:
        pte: the bytes of the file.
        delegates: how many pieces run on the delegate; one is best.
        outside: the operators left outside of it, by name, with how often.
        free: the largest size of each axis of an input that is free, by ``input[axis]``.
    """

    pte: bytes
    delegates: int
    outside: tuple[tuple[str, int], ...]
    free: tuple[tuple[str, int], ...] = ()


def lower(converted: GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> bytes:
    """Returns the ``.pte`` file of a converted model.

    Args:
        converted: what ``convert_pt2e`` returned. It is not changed.
        example_inputs: positional inputs; their sizes are those of the file where these are not free.
        dynamic_shapes: which sizes are free, as in ``torch.export.export``; None: those that are free in the model.
            The runtime reserves memory for the largest size; one without an end may grow to 64, or to four times its
            size in ``example_inputs``.

    Raises:
        LoweringError: the delegate would compute an operator of the graph wrongly; names each. Or ExecuTorch fails.
        MissingExtraError: executorch is not installed.
    """
    return lower_program(converted, example_inputs, dynamic_shapes=dynamic_shapes).pte


def lower_program(
    converted: GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None
) -> LoweredProgram:
    """Returns what ``lower`` returns, with what became of its operators. Same arguments and errors."""
    model = copy.deepcopy(require_exported(converted))
    _check_made_for(model)
    _check_converted(model)
    complete_values(model)
    check_inputs(model, as_inputs(example_inputs, EXAMPLES), EXAMPLES)
    erase_no_ops(model)
    spell(model, TO_LOWER)
    give_each_padding_its_quantize(model)
    give_each_move_one_scale(model)
    check_sound(model)
    give_each_layer_its_bias(model)
    return _lower(model, example_inputs, dynamic_shapes)


def lower_float(model: nn.Module, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> LoweredProgram:
    """Returns the ``.pte`` file of a model as it is, in float: what a quantized one is compared with."""
    captured = copy.deepcopy(capture(model, example_inputs, dynamic_shapes=dynamic_shapes))
    spell(captured, TO_LOWER)
    return _lower(captured, example_inputs, dynamic_shapes)


def _check_made_for(model: GraphModule) -> None:
    policy = getattr(model.meta.get("zeropoint"), "policy", None)
    if policy is not None and policy.name != NAME:
        what = f"the graph was annotated for the backend {policy.name!r}"
        raise LoweringError(what, where="xnnpack.lower", remedy="Annotate it with XNNPACKQuantizer.")


def _check_converted(model: GraphModule) -> None:
    if any(hasattr(module, "calculate_qparams") for module in model.children()):
        what = "the model still has observers"
        raise LoweringError(what, where="xnnpack.lower", remedy="Give what convert_pt2e returned.")


def give_each_layer_its_bias(model: GraphModule) -> None:
    """Clones a bias that several layers read: the delegate would quantize it once, with the first one's scale."""
    names = Names(model)
    seen: set[str] = set()
    for node in list(model.graph.nodes):
        bias = argument(node, "bias") if node.target in GEMMS else None
        if not isinstance(bias, Node) or bias.op != "get_attr":
            continue
        path = str(bias.target)
        if path in seen:
            _give_own_parameter(model, node, "bias", names.new(f"{path.replace('.', '_')}_"))
        seen.add(path)


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


def _quantized_again(emit: Emitter, source: Node, qparams: tuple[Any, ...], out_dtype: dict[str, Any]) -> Node:
    """Returns the source quantized and dequantized by the given scale and zero point."""
    quantized = emit.call(ops.QUANTIZE_PER_TENSOR, source, *qparams)
    return emit.call(ops.DEQUANTIZE_PER_TENSOR, quantized, *qparams, **out_dtype)


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


def _lower(model: GraphModule, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> LoweredProgram:
    import_extra("executorch.kernels.quantized", "executorch")
    give_each_batch_norm_its_weight(model)
    model.recompile()
    exported = _exported(model, as_inputs(example_inputs, EXAMPLES), dynamic_shapes)
    check_sound(exported.graph_module, SIZE_RULES)
    try:
        try:
            return _divided(exported)
        except Exception as error:
            if CYCLE not in str(error):
                raise
            return _divided(exported, per_op_mode=True)
    except Exception as error:
        what = f"ExecuTorch could not lower the model: {type(error).__name__}: {str(error).strip()}"
        remedy = (
            "Where the message names an operator that is quantized, leave that float (set_module_name or "
            "set_operator_type None); where lower_float fails on the float model as well, write it with others."
        )
        raise LoweringError(what, where="xnnpack.lower", remedy=remedy) from error


def _divided(exported: ExportedProgram, **settings: Any) -> LoweredProgram:
    """Returns the program with all the delegate takes in as few pieces as ExecuTorch's partitioner finds.

    With ``per_op_mode=True`` each operator is a piece: those of several can come to depend on each other.
    """
    exir = import_extra("executorch.exir", "executorch")
    partition = import_extra("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    configs = import_extra("executorch.backends.xnnpack.utils.configs", "executorch")
    edge = exir.to_edge_transform_and_lower(
        exported,
        partitioner=[partition.XnnpackPartitioner(**settings)],
        transform_passes=configs.get_transform_passes([repair]),
    )
    delegates, outside = _whereabouts(edge.exported_program())
    return LoweredProgram(bytes(edge.to_executorch().buffer), delegates, outside, _free(exported))


def _exported(model: GraphModule, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    if dynamic_shapes is None:
        dynamic_shapes = free_sizes(model, example_inputs)
        example_inputs = with_free_sizes(model, example_inputs)
    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, example_inputs)
    try:
        with torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        what = f"torch.export could not export the model: {type(error).__name__}: {str(error).strip()}"
        remedy = (
            "Sizes that are free here must be free in the export that was prepared: give both the same dynamic_shapes."
        )
        raise LoweringError(what, where="xnnpack.lower", remedy=remedy) from error


def _free(program: ExportedProgram) -> tuple[tuple[str, int], ...]:
    """Returns the free axes of a program's inputs with their largest sizes, where these have an end."""
    inputs = [
        node for node in program.graph.nodes if node.op == "placeholder" and is_tensor_value(node.meta.get("val"))
    ]
    free = [(f"{n.name}[{axis}]", largest_size(s)) for n in inputs for axis, s in free_axes(n.meta["val"]).items()]
    return tuple((axis, end) for axis, end in free if end is not None)


def _whereabouts(program: ExportedProgram) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Returns the number of delegate calls, and the operators that stand next to them."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [str(getattr(node.target, "__name__", node.target)) for node in calls]
    delegated = sum("executorch_call_delegate" in name for name in names)
    outside = Counter(n for n in names if "executorch_call_delegate" not in n and n != "getitem")
    return delegated, tuple(sorted(outside.items()))
