"""Conditions of the rows: each returns None when it holds, else the reason for refusing, with the value at fault.

"G:" and "N:" name lines of executorch 1.4.1's ``partition/config/gemm_configs.py`` and ``generic_node_configs.py``.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.patterns import Match
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.graph.bind import argument
from zeropoint.graph.constants import evaluate
from zeropoint.graph.layers import PRODUCTS, pads_with_zero

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._safe_softmax.default)
PASSED_ON = (
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.expand.default, aten.masked_fill.Scalar, aten.where.self, aten.slice.Tensor, aten.clone.default,
)  # fmt: skip
"""Operators through which scores and masks reach a softmax."""
MASKING = 1e4
"""Added to attention scores, such a constant is a mask: -10000, -1e9, the smallest float or infinity."""
IN_FLOAT = "the XNNPACK delegate computes it in float only"
OUTSIDE = "the XNNPACK delegate does not take it: the portable float kernel computes it"
OF_A_TABLE = (
    f"{OUTSIDE}. Its table is kept as float16 where no activation has a fixed scale; EmbeddingQuantizer, composed with "
    "this quantizer, keeps it in bytes"
)
PORTABLE = "The portable float kernel computes it"
OTHERWISE = "In float only"
NEEDS_CONSTANT = "a product of two activations: the XNNPACK delegate computes it in float only"
MAX_DIMENSIONS = 6
"""XNN_MAX_TENSOR_DIMS: more fail to load."""


def _shape(match: Match, name: str = "self") -> torch.Size:
    return match.argument(name).meta["val"].shape


def _is_static(shape: torch.Size) -> bool:
    return all(isinstance(size, int) for size in shape)


def weight_is_constant(match: Match) -> str | None:
    """The delegate packs weights when the file is made."""
    weight = match.argument("weight")
    return None if match.is_constant(weight) else f"its weight {weight.name} is computed at run time"


def bias_is_constant(match: Match) -> str | None:
    """The delegate quantizes the bias when the file is made."""
    bias = match.argument("bias")
    if bias is None or bias.op == "get_attr":
        return None
    return f"its bias {bias.name} is not a parameter but computed"


def has_a_batch(match: Match) -> str | None:
    """Convolutions of one picture without a batch axis are left outside."""
    dimensions, wanted = len(_shape(match, "input")), len(_shape(match, "weight"))
    return None if dimensions == wanted else f"its input has {dimensions} dimensions, no batch; the kernel has {wanted}"


def one_group_or_per_tensor(match: Match) -> str | None:
    """Per-channel scales of a transposed convolution lie along axis 1, which groups would split (G:394)."""
    groups, weight = match.argument("groups"), match.config.weight
    if groups == 1 or weight is None or weight.qscheme not in PER_CHANNEL:
        return None
    return f"groups={groups}; per-channel weights of a transposed convolution have a kernel for groups=1 only"


def per_channel(match: Match) -> str | None:
    """Dynamic kernels have per-channel weights."""
    weight = match.config.weight
    if weight is not None and weight.qscheme in PER_CHANNEL:
        return None
    return "activations quantized at run time have a kernel for per-channel weights only"


def two_dimensional(match: Match) -> str | None:
    """Dynamic convolutions are 2d."""
    count = len(_shape(match, "weight")) - 2
    return None if count == 2 else f"{count}d; convolution of activations quantized at run time has a 2d kernel only"


def not_depthwise(match: Match) -> str | None:
    """Dynamic convolutions are not depthwise."""
    groups = match.argument("groups")
    if groups == 1 or _shape(match, "weight")[1] > 1:
        return None
    return f"groups={groups}, depthwise; activations quantized at run time have no such kernel"


def alpha_is_one(match: Match) -> str | None:
    """The kernels add without a factor (N:143)."""
    alpha = match.argument("alpha")
    return None if alpha == 1 else f"alpha={alpha}; the kernel has alpha=1 only"


def both_are_tensors(match: Match) -> str | None:
    """A number, or a single value of a running model, has no scale of its own."""
    for name in ("self", "other"):
        operand = match.argument(name)
        if not isinstance(operand, Node):
            return f"{name}={operand} is a number, not a tensor"
        if operand.meta["val"].dim() == 0 and not match.is_constant(operand):
            return f"{operand.name} has no dimensions; the kernel needs at least one"
    return None


def not_a_mask(match: Match) -> str | None:
    """Values made of integers and booleans only are positions or masks: their range says nothing about data."""
    for name in ("self", "other"):
        operand = match.argument(name)
        if not match.is_constant(operand) and operand in match.context.once(made_of_integers):
            return f"{operand.name} is computed from integers or booleans only: a mask or a position, not data"
        if match.is_constant(operand) and (largest := _largest(match, operand)) >= MASKING:
            return f"{operand.name} holds values up to {largest:.2g}: a mask, not data"
    return None


def not_attention_scores(match: Match) -> str | None:
    """What a softmax reads holds masks: values of -1e4 and less, beside which an int8 scale leaves no data."""
    if match.head not in match.context.once(read_by_softmax):
        return None
    return "a softmax reads it: attention scores and their masks have no useful common scale"


def made_of_integers(model: GraphModule) -> set[Node]:
    """Returns the nodes into which no float tensor goes, such as what is made of an ``arange``.

    Numbers, as in ``(1.0 - mask) * -10000``, do not count, and neither do sizes.
    """
    integer: set[Node] = set()
    number: set[Node] = set()
    for node in model.graph.nodes:
        value, read = node.meta.get("val"), node.all_input_nodes
        if not isinstance(value, torch.Tensor):
            number.add(node)
        elif all(n in integer or n in number for n in read):
            if any(n in integer for n in read) or (value.dim() > 0 and not value.is_floating_point()):
                integer.add(node)
            elif read or value.dim() == 0:
                number.add(node)
    return integer


def read_by_softmax(model: GraphModule) -> set[Node]:
    """Returns the nodes that a softmax reads, directly or through arithmetic and views."""
    found: set[Node] = set()
    for node in reversed(model.graph.nodes):
        if any(user.target in SOFTMAX or (user in found and user.target in PASSED_ON) for user in node.users):
            found.add(node)
    return found


def _largest(match: Match, node: Node) -> float:
    """Returns the largest absolute value of a constant; NaN counts as infinite."""
    value = evaluate(match.context.model, node).abs().nan_to_num(torch.inf, torch.inf)
    return float(value.max()) if value.numel() else 0.0


def two_different_tensors(match: Match) -> str | None:
    """Concatenating one tensor, or one with itself, is not delegated."""
    count = len(set(match.argument("tensors")))
    return None if count >= 2 else "it concatenates one tensor; the kernel takes two different ones and more"


def pool_has_a_kernel(match: Match) -> str | None:
    """Pooling of pictures in a batch, with stride not above the kernel (N:357, N:363)."""
    if len(_shape(match)) != 4:
        return f"its input has {len(_shape(match))} dimensions; the kernel takes 4"
    kernel = match.argument("kernel_size")
    stride = match.argument("stride") or kernel
    if any(s > k for s, k in zip(_pair(stride), _pair(kernel), strict=True)):
        return f"stride={list(stride)} is larger than kernel_size={list(kernel)}"
    if match.argument("ceil_mode") and not _is_static(_shape(match)):
        return "ceil_mode=True with a free size has no kernel"
    return None


def _pair(values: list[int]) -> tuple[int, int]:
    return (values[0], values[-1])


def mean_of_each_picture(match: Match) -> str | None:
    """The only mean with a kernel is a global average pool."""
    shape, dims = _shape(match), match.argument("dim")
    if len(shape) != 4 or dims is None or {d % 4 for d in dims} != {2, 3}:
        return f"dim={dims} of {len(shape)} dimensions; the kernel averages dim=(2, 3) of 4"
    if match.argument("dtype") is not None:
        return f"dtype={match.argument('dtype')}; the kernel takes no dtype"
    return None if match.argument("keepdim") else "keepdim=False; the kernel has keepdim=True only"


def batch_is_known(match: Match) -> str | None:
    """The runtime's integer global pool writes past its buffer once a batch is larger than the first call's."""
    batch = _shape(match)[0]
    return None if isinstance(batch, int) else "its batch is free; the integer kernel is right for a known batch only"


def output_is_one_pixel(match: Match) -> str | None:
    """Adaptive pooling has a kernel as a global average."""
    size, dimensions = match.argument("output_size"), len(_shape(match))
    if dimensions != 4:
        return f"its input has {dimensions} dimensions; the kernel takes 4"
    return None if list(size) == [1, 1] else f"output_size={list(size)}; the kernel has [1, 1] only"


def at_most_six_dimensions(match: Match) -> str | None:
    """XNNPACK's tensors have six dimensions, and sizes that are known but for one."""
    value = match.head.meta["val"]
    if value.dim() > MAX_DIMENSIONS:
        return f"its output has {value.dim()} dimensions; the delegate takes {MAX_DIMENSIONS}"
    free = sum(not isinstance(size, int) for size in value.shape)
    if free > 1:
        return f"{free} of its sizes are free; the delegate takes one"
    return None


def slice_has_a_kernel(match: Match) -> str | None:
    """Slices are dense and of known sizes (N:645)."""
    step = match.argument("step")
    if step not in (None, 1):
        return f"step={step}; the kernel has step=1 only"
    return None if _is_static(_shape(match)) else "its input has a free size; the kernel slices known sizes only"


def pads_space_with_zero(node: Node) -> bool:
    """True for padding that a convolution can take along: zeros, along space, no cropping (G:420)."""
    if not pads_with_zero(node):
        return False
    amounts, dimensions = argument(node, "pad"), node.meta["val"].dim()
    grows = all(isinstance(amount, int) and amount >= 0 for amount in amounts)
    return grows and len(amounts) <= 2 * (dimensions - 2)


# -- why an operator without a row stays float -----------------------------------------------------------------------


def softmax_in_float(node: Node) -> str:
    """The delegate computes it over the last axis (N:301)."""
    axis, dimensions = argument(node, "dim"), node.meta["val"].dim()
    if axis in (-1, dimensions - 1):
        return IN_FLOAT
    return f"dim={axis} of {dimensions} dimensions; the delegate takes the last only. {PORTABLE}"


def power_in_float(node: Node) -> str:
    """The delegate computes squares (N:603)."""
    exponent = argument(node, "exponent")
    if isinstance(exponent, int) and exponent == 2:
        return IN_FLOAT
    return f"exponent={exponent}; the delegate takes the integer 2 only. {PORTABLE}"


def average_in_float(node: Node) -> str:
    """The delegate averages what lies in the picture (N:188)."""
    for name, taken in (("ceil_mode", False), ("divisor_override", None)):
        if (value := argument(node, name)) != taken:
            only = f"the delegate takes {name}={taken} only, in float"
            return f"{name}={value}; {only}. {PORTABLE}"
    return IN_FLOAT


def padding_in_float(node: Node) -> str:
    """A quantized convolution takes padding along, of amounts that are numbers (G:420)."""
    if all(isinstance(amount, int) for amount in argument(node, "pad")):
        return "it is computed in int8 only as zero padding right before a convolution that alone reads it"
    return f"its amounts are computed from a free size; a convolution takes numbers along. {PORTABLE}"


def known_sizes_in_float(node: Node) -> str:
    """The delegate computes it where all sizes are known: a view with several free ones, or a resize, is outside."""
    shape = node.meta["val"].shape
    if _is_static(shape):
        return IN_FLOAT
    return f"{sum(not isinstance(size, int) for size in shape)} of its sizes are free. {PORTABLE}"


def product_in_float(node: Node) -> str:
    """A product is a linear layer where its right factor alone is constant, and a sum with it has no factors."""
    left, right = (argument(node, name) for name in PRODUCTS.get(node.target, ("self", "mat2")))
    parameter = next((each for each in (left, right) if each.op == "get_attr"), None)
    if parameter is None:
        return NEEDS_CONSTANT
    if node.target is aten.addmm.default and (factors := (argument(node, "alpha"), argument(node, "beta"))) != (1, 1):
        return f"alpha={factors[0]}, beta={factors[1]}; a linear layer has alpha=1, beta=1 only. {OTHERWISE}"
    if parameter is left:
        return f"the parameter {left.name} is its left factor; a linear layer has it on the right only. {OTHERWISE}"
    return f"it is no linear layer: the parameter {right.name} has {right.meta['val'].dim()} dimensions. {OTHERWISE}"
