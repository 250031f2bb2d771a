"""The q/dq forms that the delegate computes rightly. It accepts more, and computes garbage without a word.

Source: each form was lowered and run with executorch 1.4.1, compared with the graph (tests/backends/test_sound.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from zeropoint.backends.xnnpack.conditions import pads_space_with_zero
from zeropoint.backends.xnnpack.table import (
    CAT,
    CONV,
    CONV3D,
    CONV_TRANSPOSE,
    GLOBAL_POOL,
    MAX_POOL,
    MEAN,
    PERMUTE,
    SLICE,
)
from zeropoint.core.errors import LoweringError
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode
from zeropoint.graph.bind import argument, reads
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.layers import CLAMPS, LAYERS, PRODUCTS, VIEWS
from zeropoint.graph.no_ops import DROPOUTS
from zeropoint.graph.source import describe
from zeropoint.numerics import ops

aten = torch.ops.aten

SAME_SCALE = (*MAX_POOL, *CAT, *SLICE, *PERMUTE, *VIEWS)
MEANS = (*MEAN, *GLOBAL_POOL)
MAX_RESCALING = 256
INT8_ONLY = "The delegate has int8 kernels only: quantize activations to int8 in [-128, 127]."
STATIC_Q, STATIC_DQ = ops.QUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR
WEIGHT_DQ = (STATIC_DQ, ops.DEQUANTIZE_PER_CHANNEL)
GROUPED_DQ = ops.DEQUANTIZE_PER_CHANNEL_GROUP
DYNAMIC_DQ = (ops.DEQUANTIZE_PER_TENSOR_TENSOR, ops.DEQUANTIZE_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Unsound:
    """A node that the delegate would compute wrongly, or not at all."""

    node: Node
    what: str
    remedy: str


Rule = Callable[[GraphModule, Node], "tuple[str, str] | None"]


def _has_quantized_weight(node: Node) -> bool:
    return node.target in LAYERS and argument(node, "weight").target in WEIGHT_DQ


def pads_itself(node: Node, padding: Node) -> bool:
    """True for a quantized convolution that is computed with the padding before it."""
    is_quantized = node.target in CONV and _has_quantized_weight(node)
    return is_quantized and sole_reader(padding) is node and pads_space_with_zero(padding)


def _input_of(node: Node) -> Node:
    """Returns what a layer reads, past the padding that is computed with it."""
    source = argument(node, "input")
    return source.all_input_nodes[0] if pads_itself(node, source) else source


def _scale(node: Node) -> float:
    """Returns the scale of a static quantize or dequantize per tensor."""
    scale = node.args[1]
    assert isinstance(scale, float)
    return scale


def _is_static_gemm(node: Node) -> bool:
    return _has_quantized_weight(node) and _input_of(node).target is STATIC_DQ


def _output_quantize(node: Node) -> Node | None:
    """Returns the quantize after a layer and what is fused into it, where it is the only reader."""
    reader = sole_reader(node)
    if reader is not None and reader.target in CLAMPS:
        reader = sole_reader(reader)
    return reader if reader is not None and reader.target is STATIC_Q else None


def is_in_eval_mode(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Dropout and batch norm of an export in train mode: no file with them loads, or results are random."""
    del model
    drops = node.target in DROPOUTS and argument(node, "train")
    if drops or (node.target in BATCH_NORMS and is_in_train_mode(node)):
        return "it was exported in train mode", "Export model.eval()."
    return None


def wrong_activation(dtype: torch.dtype, low: int, high: int) -> str | None:
    """Returns to which integers an activation is quantized; None where the delegate computes with these."""
    return None if (dtype, low, high) == (torch.int8, -128, 127) else f"{dtype} in [{low}, {high}]"


def activations_are_int8(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Activations are computed as int8 of the whole range, whatever the graph says."""
    del model
    if node.target not in (STATIC_Q, STATIC_DQ):
        return None
    source = cast(Node, node.args[0])
    is_said_there = node.target is STATIC_DQ and (source.op == "get_attr" or source.args[1:6] == node.args[1:6])
    low, high, dtype = node.args[3:6]
    integers = wrong_activation(dtype, low, high)  # type: ignore[arg-type]
    if integers is None or is_said_there:
        return None
    does = f"quantizes to {integers} what {describe(source)} returns"
    return f"it {does if node.target is STATIC_Q else f'dequantizes {integers}'}", INT8_ONLY


def weight_is_int8(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Weights of 16 bits fail in ExecuTorch; a file with some of 32 bits fails to load."""
    del model
    if node.target not in LAYERS or (dequantize := argument(node, "weight")).target not in (*WEIGHT_DQ, GROUPED_DQ):
        return None
    return wrong_weight(argument(dequantize, "dtype"))


def wrong_weight(dtype: torch.dtype) -> tuple[str, str] | None:
    """Returns what is wrong with a weight of integers of a type, and what to do; None for int8."""
    return None if dtype == torch.int8 else (f"its weight is {dtype}", "Quantize weights to int8.")


def output_is_quantized(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """A static matrix product without an output quantizer returns its bias."""
    del model
    if not _is_static_gemm(node):
        return None
    if _output_quantize(node) is not None:
        return None
    read_by = ", ".join(user.name for user in node.users)
    what = f"its input and weight are quantized, but its output is read in float by {read_by}"
    return what, "Annotate its output, as the only reader of it."


def weight_is_symmetric(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Zero points of weights are ignored."""
    if not _has_quantized_weight(node):
        return None
    dequantize = argument(node, "weight")
    zero_point = dequantize.args[2]
    largest = abs(zero_point) if isinstance(zero_point, int) else _largest(model, zero_point)
    return (f"its weight has zero_point {largest}", "Use a symmetric qscheme for weights.") if largest else None


def _largest(model: GraphModule, node: Any) -> int:
    return int(get_attribute(model, str(node.target)).abs().max()) if isinstance(node, Node) else 0


def weight_is_stored(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """A weight that is quantized at run time aborts the process."""
    del model
    if not _has_quantized_weight(node):
        return None
    stored = argument(node, "weight").args[0]
    if isinstance(stored, Node) and stored.op == "get_attr":
        return None
    return "its weight is quantized at run time", "Convert with fold_quantize=True; the weight must be a parameter."


def channel_axis_has_a_kernel(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Per-channel axis: 0, and 1 for transposed convolutions of one group."""
    del model
    if node.target not in LAYERS or argument(node, "weight").target is not ops.DEQUANTIZE_PER_CHANNEL:
        return None
    axis, wanted = argument(node, "weight").args[3], 1 if node.target in CONV_TRANSPOSE else 0
    if axis != wanted:
        return f"its weight has a scale for each index of axis {axis}", f"Use ch_axis={wanted}."
    groups = argument(node, "groups", 1)
    if node.target in CONV_TRANSPOSE and groups != 1:
        return f"groups={groups} with per-channel weights", "Use per-tensor weights for this layer."
    return None


def groups_have_a_kernel(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Weights with a scale per group: with a static input lowering fails, with a float one the result is garbage."""
    del model
    if node.target not in LAYERS or argument(node, "weight").target is not GROUPED_DQ:
        return None
    if _input_of(node).target in DYNAMIC_DQ:
        return None
    size = argument(node, "weight").args[6]
    what = f"its weight has a scale for each group of {size}; there is a kernel for inputs quantized at run time only"
    return what, "Use PerChannelMinMaxObserver for its weight, or a dynamic configuration."


def bias_is_float(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """The delegate quantizes the bias itself."""
    del model
    if not _is_static_gemm(node):
        return None
    bias = argument(node, "bias")
    if bias is None or bias.op == "get_attr":
        return None
    return f"its bias comes from {bias.name}, not from a float parameter", "Leave the bias float (bias spec None)."


def input_is_quantized(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """A layer with a quantized weight reads integers; per-channel convolutions alone are right in float as well."""
    del model
    if not _has_quantized_weight(node) or (source := _input_of(node)).target in ops.DEQUANTIZE_OPS:
        return None
    if _output_quantize(node) is not None:
        return f"its weight and output are quantized, but its input {source.name} is float", "Annotate its input."
    if node.target in CONV and argument(node, "weight").target is ops.DEQUANTIZE_PER_CHANNEL:
        return None
    return f"its weight is quantized, but its input {source.name} is float", "Annotate its input and output."


def rescaling_is_below_256(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """A file whose ``s_x * s_w / s_y`` reaches 256 in any channel fails to load."""
    if not _is_static_gemm(node) or (quantize := _output_quantize(node)) is None:
        return None
    scale = argument(node, "weight").args[1]
    largest = float(get_attribute(model, str(scale.target)).detach().max()) if isinstance(scale, Node) else scale
    ratio = _scale(_input_of(node)) * largest / _scale(quantize)
    if ratio < MAX_RESCALING:
        return None
    what = f"input scale * weight scale / output scale is {ratio:.3g}; the kernel takes less than {MAX_RESCALING}"
    return what, "Its output is nearly constant: leave it float, or calibrate with more varied data."


def bias_fits_int32(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """The delegate keeps the bias as int32 of scale ``s_x * s_w``."""
    bias = argument(node, "bias") if _is_static_gemm(node) else None
    if bias is None or bias.op != "get_attr":
        return None
    scale = argument(node, "weight").args[1]
    smallest = float(get_attribute(model, str(scale.target)).detach().min()) if isinstance(scale, Node) else scale
    steps = float(get_attribute(model, str(bias.target)).detach().abs().max()) / (_scale(_input_of(node)) * smallest)
    if steps < 2**31:
        return None
    return f"its bias is {steps:.3g} steps of s_x * s_w; int32 holds 2^31", "Leave the layer float."


def has_a_kernel(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Three-dimensional convolutions have none."""
    del model
    if node.target in CONV3D and any(source.target in WEIGHT_DQ for _, source in reads(node)):
        return "it is quantized, but the delegate has no three-dimensional convolution", "Leave it float."
    return None


def factors_are_float(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """A product with a dequantized matrix that is no layer is computed without the dequantize."""
    del model
    right = argument(node, PRODUCTS[node.target][1]) if node.target in PRODUCTS else None
    if right is None or right.target not in (*WEIGHT_DQ, GROUPED_DQ) or right.meta["val"].dim() != 2:
        return None
    what = f"it multiplies by the dequantized matrix {right.name}"
    return what, "Leave its inputs float; a product with a constant matrix is a linear layer: aten.linear."


def scales_are_equal(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Operators that move data keep the integers as they are. ``lower`` repairs this before it checks."""
    del model
    reader = sole_reader(node)
    if node.target not in SAME_SCALE or reader is None or reader.target is not STATIC_Q:
        return None
    for _, source in reads(node):
        if source.target is STATIC_DQ and source.args[1:5] != reader.args[1:5]:
            what = f"its input {source.name} and its output have different scales or zero points"
            return what, "Share the scale: SharedQuantizationSpec."
    return None


def batch_of_mean_is_known(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """The integer global pool writes past its buffer once a batch is larger than that of the first call."""
    del model
    reader = sole_reader(node)
    if node.target not in MEANS or reader is None or reader.target is not STATIC_Q:
        return None
    source = cast(Node, node.args[0])
    if source.target is not STATIC_DQ or isinstance(source.meta["val"].shape[0], int):
        return None
    return "its batch is free, and the integer kernel is right for a known batch only", "Leave it float."


def zero_points_are_integers(model: GraphModule, node: Node) -> tuple[str, str] | None:
    """Outside of embedding tables, which ``lower`` has looked up as bytes, a float zero point aborts the process."""
    if node.target is not ops.DEQUANTIZE_PER_CHANNEL or not isinstance(node.args[2], Node):
        return None
    zero_point = node.args[2].meta["val"]
    if not zero_point.is_floating_point():
        return None
    readers = ", ".join(reader.name for reader in node.users)
    what = (
        f"its zero points are {zero_point.dtype}; there is a kernel for embedding tables only, and {readers} reads it"
    )
    return what, "Use torch.per_channel_symmetric, or torch.per_channel_affine."


SIZE_RULES: tuple[Rule, ...] = (batch_of_mean_is_known,)
"""What depends on the sizes that lowering leaves free: checked on the program that is lowered."""
VALUE_RULES: tuple[Rule, ...] = (bias_fits_int32, rescaling_is_below_256)
"""What depends on the ranges that calibration finds."""
RULES: tuple[Rule, ...] = (
    is_in_eval_mode, has_a_kernel, activations_are_int8, weight_is_int8, factors_are_float, output_is_quantized,
    input_is_quantized, weight_is_stored, weight_is_symmetric, channel_axis_has_a_kernel, groups_have_a_kernel,
    bias_is_float, bias_fits_int32, rescaling_is_below_256, scales_are_equal, zero_points_are_integers, *SIZE_RULES,
)  # fmt: skip


def unsound(model: GraphModule, rules: tuple[Rule, ...] = RULES) -> Iterator[Unsound]:
    """Yields every node that breaks a rule, with the first rule that it breaks."""
    for node in model.graph.nodes:
        if node.op != "call_function":
            continue
        for rule in rules:
            found = rule(model, node)
            if found is not None:
                yield Unsound(node, *found)
                break


def check_sound(model: GraphModule, rules: tuple[Rule, ...] = RULES) -> None:
    """Raises when the delegate would compute a node wrongly.

    Raises:
        LoweringError: names each such node, what is wrong with it and what to do.
    """
    found = list(unsound(model, rules))
    if not found:
        return
    lines = [f"{describe(each.node)}: {each.what}. {each.remedy}" for each in found[:20]]
    more = [f"... and {len(found) - 20} more"] if len(found) > 20 else []
    what = f"XNNPACK would not compute {len(found)} operator(s) of this graph rightly:\n  " + "\n  ".join(lines + more)
    raise LoweringError(what, where="xnnpack.lower")
