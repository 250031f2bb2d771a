"""Which operators quantize as an affine observer says: there are more granularities than operators.

``quantized_decomposed`` has operators for one scale, for one along an axis, for one per group of a matrix's rows, and
for one per token at run time. Whatever else a granularity says takes the operators of torchao, where that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from zeropoint.core.errors import MissingExtraError, SpecError
from zeropoint.core.extras import import_extra, require_extra
from zeropoint.numerics.granularity import Granularity, PerTensor, block_size
from zeropoint.numerics.mapping import MappingType, middle
from zeropoint.numerics.observers import AffineQuantizedObserverBase, ObserverBase
from zeropoint.numerics.qparams import FLOAT32_EPS

TORCHAO = "torchao.quantization.quant_primitives"
"""Importing it registers ``torchao::quantize_affine``, ``dequantize_affine`` and ``choose_qparams_affine``."""
ASYMMETRIC = MappingType.ASYMMETRIC
RunTime = Literal["per tensor", "per token", "by torchao"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the scales of a tensor lie: along ``ch_axis``, per ``group_size`` of a row, per block; else there is one.

    The sizes of a block may be free ones.
    """

    ch_axis: int | None = None
    group_size: int | None = None
    block_size: tuple[Any, ...] | None = None


def observer_in(observer: Any) -> Any:
    """Returns the observer of a fake quantizer; an observer itself."""
    if isinstance(observer, ObserverBase) and "activation_post_process" not in observer._modules:
        return observer  # Being told that a module has no attribute takes 3 us.
    return getattr(observer, "activation_post_process", observer)


def affine_of(observer: Any) -> AffineQuantizedObserverBase | None:
    """Returns an affine observer of ours, or a fake quantizer's; None for any other."""
    inner = observer_in(observer)
    return inner if isinstance(inner, AffineQuantizedObserverBase) else None


def layout_of(affine: AffineQuantizedObserverBase, tensor: Node, *, is_constant: bool) -> Layout:
    """Returns where the fixed scales of a tensor lie, in the words of the operators that quantize it.

    ``quantize_per_channel_group`` does not cut groups of one. It adds the zero point before it rounds, which is the
    same where that is 0; and the integers of a constant are not computed by it.
    """
    shape = tuple(tensor.meta["val"].shape)
    blocks = blocks_of(affine, shape)
    cut = _cut_axes(blocks, shape)
    if not cut:
        return Layout()
    if len(cut) == 1 and blocks[cut[0]] == 1:
        return Layout(ch_axis=cut[0])
    rounds_alike = is_constant or (affine.mapping_type is not ASYMMETRIC and middle(*_limits(affine)) == 0)
    if len(shape) == 2 and cut[-1] == 1 and blocks[0] == 1 and blocks[1] > 1 and rounds_alike:
        return Layout(group_size=blocks[1])
    return Layout(block_size=blocks)


def _limits(affine: AffineQuantizedObserverBase) -> tuple[int, int]:
    return affine.quant_min, affine.quant_max


def blocks_of(affine: AffineQuantizedObserverBase, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the block size of a tensor by an observer's granularity, or what a subclass without one says."""
    if isinstance(affine.granularity, Granularity) or affine.block_size is None:
        return block_size(affine.granularity, shape)
    return tuple(affine.block_size)


def _cut_axes(blocks: tuple[Any, ...], shape: tuple[Any, ...]) -> list[int]:
    """Returns the axes along which there is more than one block. A free size equals itself, and no number."""
    pairs = list(enumerate(zip(blocks, shape, strict=True)))
    return [
        axis
        for axis, (block, size) in pairs
        if block is not size and not (isinstance(size, int) and isinstance(block, int) and block == size)
    ]


def check_layout(affine: AffineQuantizedObserverBase, tensor: Node, place: str, *, is_constant: bool) -> None:
    """Raises when there are no operators that quantize a tensor as an affine observer says.

    Raises:
        SpecError: names the place, and what to use instead.
    """
    try:
        if affine.is_dynamic:
            needed = run_time(affine, tensor) == "by torchao"
        else:
            _check_fixed_sizes(affine, tensor)
            needed = layout_of(affine, tensor, is_constant=is_constant).block_size is not None
    except SpecError as error:
        raise SpecError(error.what, where=place, remedy=error.remedy) from error
    if needed:
        _require_torchao(affine, place)


def _check_fixed_sizes(affine: AffineQuantizedObserverBase, tensor: Node) -> None:
    """Raises where the number of fixed scales would have to vary."""
    shape = tuple(tensor.meta["val"].shape)
    for axis in _cut_axes(blocks_of(affine, shape), shape):
        if not isinstance(shape[axis], int):
            what = f"{affine.granularity} has fixed scales along axis {axis}, whose size is free: {shape[axis]}"
            remedy = "Use PerTensor, or AffineQuantizedPlaceholderObserver with is_dynamic=True."
            raise SpecError(what, remedy=remedy)


def run_time(affine: AffineQuantizedObserverBase, tensor: Node) -> RunTime:
    """Returns which operators choose the scales of a tensor at run time as an affine observer says."""
    shape = tuple(tensor.meta["val"].shape)
    blocks = blocks_of(affine, shape)
    if affine.scale_dtype not in (None, torch.float32, torch.float64):
        return "by torchao"  # It rounds the scale.
    if not isinstance(affine.granularity, PerTensor) and _is_per_token(blocks, shape):
        return "per token" if _is_xnnpacks(affine) else "by torchao"
    if _cut_axes(blocks, shape) or affine.dtype not in (torch.int8, torch.uint8):
        return "by torchao"
    return "per tensor" if affine.mapping_type is ASYMMETRIC or is_symmetric(affine) else "by torchao"


def _is_xnnpacks(affine: AffineQuantizedObserverBase) -> bool:
    """True for what ``choose_qparams_per_token_asymmetric`` computes, which is what XNNPACK does."""
    whole_range = affine.dtype == torch.int8 and _limits(affine) == (-128, 127)
    return affine.mapping_type is ASYMMETRIC and whole_range and affine.eps in (None, FLOAT32_EPS)


def is_symmetric(affine: AffineQuantizedObserverBase) -> bool:
    """True for what ``choose_qparams_symmetric`` computes: one zero point for each type."""
    low, high = _limits(affine)
    match affine.mapping_type:
        case MappingType.SYMMETRIC:
            return middle(low, high) == (128 if affine.dtype == torch.uint8 else 0)
        case MappingType.SYMMETRIC_NO_CLIPPING_ERR:
            return low == -high  # The two mappings are the same then.
        case MappingType.ASYMMETRIC:
            return False


def _is_per_token(blocks: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    return len(shape) > 1 and all(block == 1 for block in blocks[:-1]) and not _cut_axes(blocks[-1:], shape[-1:])


def torchao_ops() -> Any:
    """Returns ``torch.ops.torchao`` with its affine operators registered.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    import_extra(TORCHAO, "executorch")
    return torch.ops.torchao


def _require_torchao(affine: AffineQuantizedObserverBase, place: str) -> None:
    try:
        require_extra(TORCHAO, "executorch")
    except MissingExtraError as error:
        when = "at run time " if affine.is_dynamic else ""
        what = f"no operator of quantized_decomposed quantizes {when}by {affine.granularity}, "
        what += f"{affine.mapping_type.name} {affine.target_dtype} {affine.quant_min}..{affine.quant_max}"
        remedy = "Install torchao, whose operators do, or use PerTensor, PerAxis, or PerGroup on a matrix."
        raise SpecError(what, where=place, remedy=remedy) from error
