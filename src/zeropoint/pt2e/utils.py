"""What quantizers and passes of other packages take from ``torchao.quantization.pt2e.utils``."""

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.utils.parametrize import is_parametrized

from zeropoint.core.dtypes import FLOAT_DTYPES, check_dtype, checked_range, integer_range, plain_dtype
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import PER_CHANNEL, PER_TENSOR, SYMMETRIC
from zeropoint.graph.attributes import get_new_attr_name_with_prefix
from zeropoint.graph.capture import pattern_graph as _get_aten_graph_module_for_pattern
from zeropoint.graph.layers import CONVOLUTIONS, LINEAR, TRANSPOSED
from zeropoint.numerics.observers import PlaceholderObserver
from zeropoint.numerics.qparams import choose_qparams_by_scheme, symmetric_zero_point

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
    "_is_sym_size_node",
    "calculate_qmin_qmax",
    "check_min_max_valid",
    "create_getattr_from_value",
    "determine_qparams",
    "get_fqn_to_example_inputs",
    "get_new_attr_name_with_prefix",
    "get_qparam_dict",
    "getattr_from_fqn",
    "has_no_children_ignoring_parametrizations",
    "is_per_channel",
    "is_per_tensor",
    "to_underlying_dtype",
    "validate_qmin_qmax",
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


def _is_sym_size_node(node: Node) -> bool:
    """True for a node that asks for sizes."""
    return node.op == "call_function" and node.target in _SIZES


def _filter_sym_size_users(node: Node) -> list[Node]:
    """Returns the readers of a node that ask for more than its sizes."""
    return [user for user in node.users if not _is_sym_size_node(user)]


def is_per_tensor(qscheme: torch.qscheme | None) -> bool:
    """True for one scale."""
    return qscheme in PER_TENSOR


def is_per_channel(qscheme: torch.qscheme | None) -> bool:
    """True for a scale per channel."""
    return qscheme in PER_CHANNEL


def getattr_from_fqn(obj: Any, fqn: str) -> Any:
    """Returns what is at a dotted path of attributes."""
    return functools.reduce(getattr, fqn.split("."), obj)


def to_underlying_dtype(qdtype: torch.dtype) -> torch.dtype:
    """Returns the plain dtype of a legacy quantized one; one that tensors are quantized to as it is.

    Raises:
        SpecError: tensors are not quantized to it.
    """
    if qdtype == torch.quint2x4:
        return torch.uint8
    check_dtype(qdtype, "to_underlying_dtype")
    if qdtype in FLOAT_DTYPES:
        raise SpecError(f"{qdtype} has no integers", where="to_underlying_dtype", remedy="Use e.g. torch.int8.")
    return plain_dtype(qdtype)


def get_qparam_dict(observer_or_fake_quant: Any) -> dict[str, Any]:
    """Returns scheme (affine, since that of a symmetric one is too), dtype, scale, zero point and range of an observer.

    Raises:
        CalibrationError: it saw no data.
    """
    scheme, dtype = getattr(observer_or_fake_quant, "qscheme", None), observer_or_fake_quant.dtype
    if not scheme or isinstance(observer_or_fake_quant, PlaceholderObserver):
        return {"qscheme": None, "dtype": dtype}
    found: dict[str, Any] = {"qscheme": torch.per_tensor_affine, "dtype": dtype}
    if is_per_channel(scheme):
        found["qscheme"] = torch.per_channel_affine if scheme in SYMMETRIC else scheme
        found["axis"] = observer_or_fake_quant.ch_axis
    found["scale"], found["zero_point"] = observer_or_fake_quant.calculate_qparams()
    ends = ("quant_min", "quant_max")
    return found | {end: getattr(observer_or_fake_quant, end) for end in ends if hasattr(observer_or_fake_quant, end)}


def check_min_max_valid(min_val: torch.Tensor, max_val: torch.Tensor) -> bool:
    """True for ranges of real values; False, with a warning, for those of an observer that saw nothing.

    Raises:
        CalibrationError: an end is NaN, or a smallest value lies above the largest.
    """
    if min_val.numel() == 0 or max_val.numel() == 0 or bool((min_val.isposinf() & max_val.isneginf()).all()):
        warnings.warn("no data was observed: scale 1 and zero point 0 stand for it", stacklevel=2)
        return False
    if bool((min_val <= max_val).all()):
        return True
    what = f"the smallest value {min_val.tolist()} is not below the largest {max_val.tolist()}"
    raise CalibrationError(what, where="check_min_max_valid", remedy="Look at the calibration data.")


def calculate_qmin_qmax(
    quant_min: int, quant_max: int, has_customized_qrange: bool, dtype: torch.dtype, reduce_range: bool
) -> tuple[int, int]:
    """Returns the range of integers of an observer: its own or that of the dtype; half of it for ``reduce_range``.

    Of the dtypes' own ranges, those of 8 bits are halved.

    Raises:
        SpecError: the range is empty or does not fit the dtype.
    """
    low, high = checked_range(dtype, quant_min, quant_max) if has_customized_qrange else integer_range(dtype)
    halved = reduce_range and (has_customized_qrange or high - low == 255)
    return (low // 2, high // 2) if halved else (low, high)


def validate_qmin_qmax(quant_min: int, quant_max: int) -> None:
    """Checks a range of integers.

    Raises:
        SpecError: it is empty, or 0 is not in it.
    """
    if not quant_min <= 0 <= quant_max or quant_min == quant_max:
        what = f"quant_min={quant_min}, quant_max={quant_max} is no range that holds 0"
        raise SpecError(what, where="validate_qmin_qmax", remedy="Choose quant_min <= 0 <= quant_max.")


def determine_qparams(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    eps: torch.Tensor,
    has_customized_qrange: bool,
    qscheme: torch.qscheme = torch.per_tensor_affine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale (float64) and the zero point (int64) of ranges, ``(1,)`` for one; ``eps`` is the least scale.

    Raises:
        CalibrationError: a range is none.
    """
    if not check_min_max_valid(min_val, max_val):
        return torch.ones(1, device=min_val.device), torch.zeros(1, device=min_val.device, dtype=torch.int64)
    middle = symmetric_zero_point(dtype, quant_min, quant_max, custom_range=has_customized_qrange)
    scale, zero_point = choose_qparams_by_scheme(
        min_val, max_val, quant_min, quant_max, qscheme, eps=eps.item(), symmetric_zero_point=middle
    )
    return torch.atleast_1d(scale).double(), torch.atleast_1d(zero_point).to(torch.int64)


def has_no_children_ignoring_parametrizations(module: nn.Module) -> bool:
    """True for a module without submodules but those of parametrizations."""
    return not module._modules or (is_parametrized(module) and set(module._modules) == {"parametrizations"})


def get_fqn_to_example_inputs(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Returns what each submodule is called with, last, when the model runs: by path, the model's own too.

    Named arguments and defaults stand in their place.
    """
    found: dict[str, tuple[Any, ...]] = {}

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **named)
        bound.apply_defaults()
        found[path] = bound.args

    hooks = [
        module.register_forward_pre_hook(
            lambda called, args, named, path=path: keep(path, called, args, named), with_kwargs=True
        )
        for path, module in model.named_modules()
    ]
    try:
        model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def create_getattr_from_value(
    module: nn.Module, graph: Graph, prefix: str, value: Any, device: torch.device | None = None
) -> Node:
    """Returns a node that reads a new buffer of the module: a tensor's copy, or a number.

    Args:
        module: holds the buffer, ``prefix`` and a number.
        graph: gets the node, where nodes are being inserted.
        prefix: of the buffer's name.
        value: a tensor, a number, or a list of numbers.
        device: of what is no tensor; None: that of the module's tensors.
    """
    name = get_new_attr_name_with_prefix(prefix)(module)
    if device is None:
        device = next((each.device for each in (*module.parameters(), *module.buffers())), None)
    kept = value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value, device=device)
    module.register_buffer(name, kept)
    return graph.get_attr(name)
