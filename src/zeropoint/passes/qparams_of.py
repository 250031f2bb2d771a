"""Read scale and zero point from an observer or fake quantizer of any package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.fx import Node

from zeropoint.core.dtypes import checked_range, integer_range, plain_dtype
from zeropoint.core.errors import CalibrationError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.graph.source import describe
from zeropoint.numerics import ops
from zeropoint.numerics.blocks import quantize_in_blocks
from zeropoint.numerics.observers import ObserverBase
from zeropoint.numerics.qparams import FLOAT32_EPS
from zeropoint.passes.affine_blocks import Layout, affine_of, layout_of, observer_in, torchao_ops

IN_BLOCKS = (torch.int8, torch.uint8, torch.int16)


@dataclass(frozen=True, eq=False, slots=True)
class QParams:
    """What a q/dq pair needs. ``scale`` float32, ``zero_point`` integer.

    Shape ``(1,)``, ``(channels,)`` where there is a ``ch_axis``, ``(rows, groups)`` where there is a ``group_size``, or
    one value per block where there is a ``block_size``.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    ch_axis: int | None
    group_size: int | None = None
    block_size: tuple[int, ...] | None = None

    @property
    def is_per_tensor(self) -> bool:
        """True for one scale."""
        return self.ch_axis is None and self.group_size is None and self.block_size is None

    def operators(self) -> tuple[Any, Any]:
        """Returns the operators that quantize and dequantize."""
        if self.block_size is not None:
            return torchao_ops().quantize_affine.default, torchao_ops().dequantize_affine.default
        if self.group_size is not None:
            return ops.QUANTIZE_PER_CHANNEL_GROUP, ops.DEQUANTIZE_PER_CHANNEL_GROUP
        if self.ch_axis is not None:
            return ops.QUANTIZE_PER_CHANNEL, ops.DEQUANTIZE_PER_CHANNEL
        return ops.QUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR

    def arguments(self, scale: Any, zero_point: Any) -> tuple[Any, ...]:
        """Returns what both operators take after the tensor."""
        limits = (self.quant_min, self.quant_max, self.dtype)
        if self.block_size is not None:
            return (self.block_size, scale, zero_point, self.dtype, self.quant_min, self.quant_max)
        if self.group_size is not None:
            return (scale, zero_point, *limits, self.group_size)
        if self.ch_axis is not None:
            return (scale, zero_point, self.ch_axis, *limits)
        return (scale, zero_point, *limits)

    def result(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what dequantize takes after ``arguments``, by place and by name, to give that type."""
        if self.block_size is not None:
            return (), {"output_dtype": dtype}
        if self.group_size is not None:
            return (dtype,), {}
        return (), {} if dtype == torch.float32 else {"out_dtype": dtype}

    def quantize(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the integers of a tensor to ``out``, as the operator that the graph would use gives them.

        The zero point of a group is added after rounding, as torchao does, where the operator adds it before: a value
        half-way between two integers may become the other one.
        """
        tensor, scale, zero_point = tensor.float(), self.scale, self.zero_point
        limits = (self.quant_min, self.quant_max, self.dtype)
        fast = self.dtype in IN_BLOCKS and not zero_point.is_floating_point() and self.block_size is None
        if fast and self.group_size is not None:
            rows, into = tensor.reshape(-1, self.group_size), out.view(-1, self.group_size)
            quantize_in_blocks(rows, scale.flatten(), zero_point.flatten(), 0, *limits, into)
        elif fast:
            quantize_in_blocks(tensor, scale, zero_point, self.ch_axis, *limits, out)
        elif self.is_per_tensor:
            out.copy_(ops.QUANTIZE_PER_TENSOR(tensor, scale.item(), int(zero_point.item()), *limits))
        else:
            out.copy_(self.operators()[0](tensor, *self.arguments(scale, zero_point)))


def observe_constant(observer: Any, value: Callable[[], torch.Tensor]) -> None:
    """Shows a constant to its observer: to one of ours always, to another's when it has seen nothing."""
    if hasattr(observer, "constant_input"):
        wanted = bool(observer.constant_input)
    else:
        wanted = saw_nothing(observer)
    if wanted:
        observer(value())


def saw_nothing(observer: Any) -> bool:
    """True when the range of another package's observer is empty: it would give scale 1. Ours say so themselves."""
    if isinstance(observer, ObserverBase):
        return False
    low = getattr(observer_in(observer), "min_val", None)
    return isinstance(low, torch.Tensor) and (low.numel() == 0 or not bool(torch.isfinite(low).all()))


def affine_saw_nothing(observer: Any) -> bool:
    """True for an affine observer of another package, or a fake quantizer's, that has no tensor to take blocks from."""
    inner = observer_in(observer)
    return hasattr(inner, "mapping_type") and getattr(inner, "block_size", None) is None


def qparams_of(observer: Any, node: Node, *, is_constant: bool = False) -> QParams:
    """Returns what an observer says of the tensor that a node makes, checked.

    Raises:
        CalibrationError: it saw no data, or its scale is not finite and positive.
    """
    if saw_nothing(observer):
        what = f"no data reached this {type(observer).__name__}"
        remedy = "Run the prepared model on calibration data that reaches this tensor before converting."
        raise CalibrationError(what, where=describe(node), remedy=remedy)
    try:
        scale, zero_point = observer.calculate_qparams()
    except CalibrationError as error:
        raise CalibrationError(error.what, where=describe(node), remedy=error.remedy) from error
    layout = _layout(observer, node, is_constant)
    shape = (-1,) if layout.group_size is None and layout.block_size is None else torch.as_tensor(scale).shape
    scale = torch.as_tensor(scale).detach().reshape(shape).float()
    zero_point = torch.as_tensor(zero_point).detach().reshape(shape)
    smallest, largest = scale.aminmax()
    if not 0 < smallest.item() <= largest.item() < math.inf:
        what = f"its scale is {scale.flatten().tolist()[:4]}"
        raise CalibrationError(what, where=describe(node), remedy="Look at the calibration data.")
    if layout == Layout():
        scale, zero_point = scale[:1], zero_point[:1].to(torch.int64)
    elif observer.qscheme != torch.per_channel_affine_float_qparams:
        zero_point = zero_point.to(torch.int64)
    limits = limits_of(observer)
    return QParams(scale, zero_point, *limits, plain_dtype(observer.dtype), *astuple(layout))


def _layout(observer: Any, tensor: Node, is_constant: bool) -> Layout:
    affine = affine_of(observer)
    if affine is not None:
        return layout_of(affine, tensor, is_constant=is_constant)
    if observer.qscheme not in PER_CHANNEL:
        return Layout()
    group_size = group_size_of(observer)
    return Layout(ch_axis=observer.ch_axis if group_size is None else None, group_size=group_size)


def group_size_of(observer: Any) -> int | None:
    """Returns how many neighbours of a row share a scale, by an observer or a fake quantizer's; None: not per group."""
    return getattr(observer_in(observer), "group_size", None)


def eps_of(observer: Any) -> float:
    """Returns the smallest scale of an observer or a fake quantizer's; that of float32 where it names none."""
    eps = getattr(observer_in(observer), "eps", None)
    if eps is None:
        return FLOAT32_EPS
    return eps.item() if isinstance(eps, torch.Tensor) else eps


def limits_of(observer: Any) -> tuple[int, int]:
    """Returns the smallest and largest quantized value of an observer; those of its dtype where it names none."""
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if plain_dtype(observer.dtype).is_floating_point:
        info = torch.finfo(observer.dtype)
        return int(info.min if low is None else low), int(info.max if high is None else high)
    if low is None or high is None:
        return integer_range(observer.dtype)
    return checked_range(observer.dtype, low, high)
