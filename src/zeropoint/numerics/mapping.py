"""How real values are mapped to integers: the enums of the field's affine observers, and scale and zero point by them.

Names, values and arithmetic are those of ``torchao.quantization.pt2e``; enums of that package are known by their names.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, TypeVar

import torch

from zeropoint.core.arguments import require_positive
from zeropoint.core.dtypes import checked_range, integer_range, plain_dtype
from zeropoint.core.errors import SpecError

Kind = TypeVar("Kind", bound=Enum)


class MappingType(Enum):
    """Which real values the ends of the integers stand for.

    SYMMETRIC: ``-m`` and ``m``, the larger magnitude. SYMMETRIC_NO_CLIPPING_ERR: as much as it takes for both the
    smallest and the largest value to be within. ASYMMETRIC: the smallest and the largest value.
    """

    SYMMETRIC = auto()
    SYMMETRIC_NO_CLIPPING_ERR = auto()
    ASYMMETRIC = auto()


class ZeroPointDomain(Enum):
    """What a zero point is: INT an integer, ``x = (q - zero_point) * scale``; FLOAT the real value that the middle of
    the integers stands for, ``x = (q - middle) * scale + zero_point``; NONE is none, ``x = q * scale``.
    """

    INT = auto()
    FLOAT = auto()
    NONE = auto()


class TorchAODType(Enum):
    """Names of the signed types of less than 8 bits, from before torch had them."""

    INT1 = auto()
    INT2 = auto()
    INT3 = auto()
    INT4 = auto()
    INT5 = auto()
    INT6 = auto()
    INT7 = auto()


SUB_BYTE = {
    **{getattr(torch, f"uint{bits}"): (torch.uint8, 0, 2**bits - 1) for bits in range(1, 8)},
    **{getattr(torch, f"int{bits}"): (torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(1, 8)},
}
"""The type of 8 bits that holds the integers of a smaller one, and their range."""


def one_of(kind: type[Kind], value: Any, name: str, where: str) -> Kind:
    """Returns a member of an enum, of any package, as one of ours.

    Raises:
        SpecError: ours has no member of that name.
    """
    found = kind.__members__.get(value.name) if isinstance(value, Enum) else None
    if found is None:
        remedy = f"Use one of {', '.join(f'{kind.__name__}.{member}' for member in kind.__members__)}."
        raise SpecError(f"{name}={value!r} is no {kind.__name__}", where=where, remedy=remedy)
    return found


def storage(
    target_dtype: Any, quant_min: int | None, quant_max: int | None, where: str = ""
) -> tuple[torch.dtype, int, int]:
    """Returns the integer type that holds a target type, and the range of its integers.

    Args:
        target_dtype: an integer type, of less than 8 bits too.
        quant_min, quant_max: the range; None: that of the type.

    Raises:
        SpecError: nothing can be quantized to it, or not within that range.
    """
    if isinstance(target_dtype, Enum):
        target_dtype = getattr(torch, target_dtype.name.lower(), target_dtype)
    if not isinstance(target_dtype, torch.dtype):
        raise SpecError(f"target_dtype={target_dtype!r} is no torch.dtype", where=where, remedy="Use e.g. torch.int8.")
    try:
        dtype, low, high = SUB_BYTE.get(target_dtype) or (plain_dtype(target_dtype), *integer_range(target_dtype))
        found = checked_range(dtype, low if quant_min is None else quant_min, high if quant_max is None else quant_max)
    except SpecError as error:
        raise SpecError(error.what, where=where, remedy=error.remedy) from error
    if low <= found[0] and found[1] <= high:
        return dtype, *found
    what = f"quant_min={found[0]}, quant_max={found[1]} is no range within {target_dtype}"
    raise SpecError(what, where=where, remedy=f"Choose {low} <= quant_min < quant_max <= {high}.")


def check_mapping(
    mapping_type: MappingType, quant_min: int, quant_max: int, preserve_zero: bool, domain: ZeroPointDomain, where: str
) -> None:
    """Refuses what no scale and zero point can be chosen by.

    Raises:
        SpecError: the settings contradict one another.
    """
    if mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR and not quant_min < 0 < quant_max:
        what = f"SYMMETRIC_NO_CLIPPING_ERR divides by quant_min={quant_min} and quant_max={quant_max}"
        raise SpecError(what, where=where, remedy="Choose quant_min < 0 < quant_max, or another MappingType.")
    if mapping_type is not MappingType.ASYMMETRIC and (not preserve_zero or domain is not ZeroPointDomain.INT):
        what = f"preserve_zero={preserve_zero}, zero_point_domain={domain.name} with {mapping_type.name}"
        raise SpecError(what, where=where, remedy="A symmetric mapping has an integer zero point and preserves zero.")
    if not preserve_zero and domain is ZeroPointDomain.INT:
        what = "preserve_zero=False with an integer zero point"
        raise SpecError(what, where=where, remedy="An integer zero point stands for zero: set preserve_zero=True.")


def choose_qparams_affine_with_min_max(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    mapping_type: MappingType,
    block_size: tuple[int, ...],
    target_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the scale and zero point of ranges of real values, computed in their dtype.

    Args:
        min_val, max_val: float tensors of one shape and dtype.
        block_size: not used: the values are those of the blocks already.
        target_dtype, quant_min, quant_max: as in ``storage``.
        eps: smallest scale; None: the epsilon of the values' dtype.
        scale_dtype, zero_point_dtype: of what is returned; None: that of the values.
        preserve_zero: widen the ranges to hold zero; False goes with FLOAT or NONE.
        zero_point_domain: None counts as INT. NONE: no zero point is returned.

    Raises:
        SpecError: the settings contradict one another.
    """
    where = "choose_qparams"
    mapping = one_of(MappingType, mapping_type, "mapping_type", where)
    domain = one_of(ZeroPointDomain, zero_point_domain or ZeroPointDomain.INT, "zero_point_domain", where)
    _, low, high = storage(target_dtype, quant_min, quant_max, where)
    check_mapping(mapping, low, high, preserve_zero, domain, where)
    eps = torch.finfo(min_val.dtype).eps if eps is None else require_positive("eps", eps, where)
    ends = (min_val.clamp(max=0), max_val.clamp(min=0)) if preserve_zero else (min_val, max_val)
    scale, zero_point = _qparams(*ends, mapping, (low, high), eps)
    if not preserve_zero:
        zero_point = min_val + scale * ((low + high + 1) / 2)
    scale, zero_point = scale.to(scale_dtype or min_val.dtype), zero_point.to(zero_point_dtype or min_val.dtype)
    return scale, None if domain is ZeroPointDomain.NONE else zero_point


def _qparams(
    min_val: torch.Tensor, max_val: torch.Tensor, mapping: MappingType, limits: tuple[int, int], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point.

    SYMMETRIC: ``scale = max(-min, max) / ((quant_max - quant_min) / 2)``. SYMMETRIC_NO_CLIPPING_ERR:
    ``max(min / quant_min, max / quant_max)``. Both have the middle of the integers as zero point. ASYMMETRIC:
    ``(max - min) / (quant_max - quant_min)`` and ``quant_min - round(min / scale)``.
    """
    low, high = limits
    match mapping:
        case MappingType.SYMMETRIC:
            scale = torch.maximum(-min_val, max_val) / (float(high - low) / 2)
        case MappingType.SYMMETRIC_NO_CLIPPING_ERR:
            scale = torch.maximum(min_val / float(low), max_val / float(high))
        case MappingType.ASYMMETRIC:
            scale = ((max_val - min_val) / float(high - low)).clamp(min=eps)
            return scale, (low - torch.round(min_val / scale)).clamp(low, high)
    return scale.clamp(min=eps), torch.full_like(scale, middle(low, high))


def middle(quant_min: int, quant_max: int) -> int:
    """Returns the zero point of a symmetric mapping: ``(quant_min + quant_max + 1) / 2``, cut off towards 0."""
    return int((quant_min + quant_max + 1) / 2)
