"""Observers by mapping type and granularity; names and arguments are those of ``torchao.quantization.pt2e``.

Scales and zero points are the same too. Unlike torchao's, statistics are buffers, so that they are saved; sizes that
are reduced may change from batch to batch; and settings that no operator quantizes by are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.arguments import require_positive
from zeropoint.core.dtypes import plain_dtype
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics.granularity import Granularity, PerTensor, block_size, granularity_of
from zeropoint.numerics.mapping import MappingType, ZeroPointDomain, check_mapping, one_of, storage
from zeropoint.numerics.observers.base import SPEC_KEYWORDS, ObserverBase


class AffineQuantizedObserverBase(ObserverBase):
    """An observer that finds ranges of real values, one for each block of a granularity, and maps integers to them.

    Args:
        mapping_type: how; see MappingType.
        target_dtype: integer type, of less than 8 bits too (``torch.int4``), which is then held in 8.
        granularity: which elements share a scale.
        quant_min, quant_max: range of the integers, inclusive; None: that of ``target_dtype``.
        eps: smallest scale; None: the epsilon of the tensor's dtype, or of float32 for a scale chosen at run time.
        scale_dtype, zero_point_dtype: of what ``calculate_qparams`` returns; None: that of the tensor.
        preserve_zero, zero_point_domain: True and INT. There is no operator that quantizes by others.
        spec: other keywords of a quantization spec; ``dtype`` has to be that of ``target_dtype``, and a ``block_size``
            that of the granularity.

    Attributes:
        dtype: the integer type that holds the integers.
        block_size: of the last tensor: the number of elements along each axis that share a scale; None before.
        original_dtype: that of the last tensor; None before.

    Raises:
        SpecError: the arguments contradict one another.
    """

    supports_dynamic = False

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        **spec: Any,
    ) -> None:
        where = type(self).__name__
        dtype, low, high = storage(target_dtype, quant_min, quant_max, where)
        super().__init__(dtype, spec.get("is_dynamic", False))
        self.target_dtype, self.quant_min, self.quant_max = target_dtype, low, high
        self.mapping_type = one_of(MappingType, mapping_type, "mapping_type", where)
        self.zero_point_domain = one_of(ZeroPointDomain, zero_point_domain, "zero_point_domain", where)
        self.granularity = _checked_granularity(granularity, where)
        self.eps = None if eps is None else require_positive("eps", eps, where)
        self.scale_dtype, self.zero_point_dtype = scale_dtype, zero_point_dtype
        self.preserve_zero = preserve_zero
        symmetric = self.mapping_type is not MappingType.ASYMMETRIC
        self.qscheme = _scheme(self.granularity, symmetric)
        self.block_size: tuple[int, ...] | None = None
        self._told_block_size: Any = spec.pop("block_size", None)
        self.original_dtype: torch.dtype | None = None
        self._check(spec)

    def _check(self, spec: dict[str, Any]) -> None:
        where, dtype = type(self).__name__, spec.get("dtype")
        check_mapping(
            self.mapping_type, self.quant_min, self.quant_max, self.preserve_zero, self.zero_point_domain, where
        )
        if self.zero_point_domain is not ZeroPointDomain.INT:
            what = f"no operator quantizes by zero_point_domain={self.zero_point_domain.name}"
            raise SpecError(what, where=where, remedy="Use ZeroPointDomain.INT.")
        for name in spec:
            if name not in SPEC_KEYWORDS:
                raise SpecError(f"no argument is called {name}", where=where, remedy="Leave it out.")
        if dtype is not None and dtype != self.target_dtype and plain_dtype(dtype) != self.dtype:
            what = f"the spec says dtype={dtype}, the observer target_dtype={self.target_dtype}"
            raise SpecError(what, where=where, remedy="Give both the same.")
        if self.is_dynamic and not self.supports_dynamic:
            remedy = "Use AffineQuantizedPlaceholderObserver, or AffineQuantizedMovingAverageMinMaxObserver with "
            remedy += "averaging_constant=1."
            raise SpecError("is_dynamic=True is not for this observer", where=where, remedy=remedy)
        _check_dtypes(self.scale_dtype, self.zero_point_dtype, (self.quant_min, self.quant_max), where)

    def observe(self, x: torch.Tensor) -> None:
        """Notes the dtype and the blocks of ``x``."""
        try:
            self.block_size = block_size(self.granularity, x.shape)
        except SpecError as error:
            raise SpecError(error.what, where=self.where, remedy=error.remedy) from error
        told = self._told_block_size
        if told is not None and tuple(told) != self.block_size:
            what = f"block_size={tuple(told)}, and {self.granularity} has blocks of {self.block_size}"
            raise SpecError(what, where=self.where, remedy="Leave block_size out: it follows from the granularity.")
        self.original_dtype = x.dtype

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Makes a node that calls a module around this observer call this observer, which ``convert_pt2e`` replaces."""
        path, _, name = str(observer_node.target).rpartition(".")
        setattr(model.get_submodule(path), name, self)

    def extra_repr(self) -> str:
        kind = f"{self.mapping_type.name}, {self.target_dtype}, {self.quant_min}..{self.quant_max}"
        return f"{kind}, {self.granularity}, batches={self.batches}"


class AffineQuantizedPlaceholderObserver(AffineQuantizedObserverBase):
    """Marks a tensor whose scales are chosen at run time (``is_dynamic=True``). Other arguments as in the base."""

    supports_dynamic = True

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        **spec: Any,
    ) -> None:
        super().__init__(
            mapping_type, target_dtype, granularity, quant_min, quant_max, eps, scale_dtype, zero_point_dtype,
            preserve_zero, zero_point_domain, is_dynamic=is_dynamic, **spec,
        )  # fmt: skip

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises CalibrationError: a placeholder measures nothing."""
        remedy = "Use is_dynamic=True with it, or AffineQuantizedMinMaxObserver."
        raise CalibrationError(f"a {type(self).__name__} has no scale and zero point", where=self.site, remedy=remedy)


def _checked_granularity(value: Any, where: str) -> Any:
    """Returns a granularity; a class of one as it is, for an observer that finds its blocks itself."""
    if isinstance(value, type) and issubclass(value, Granularity):
        return value
    return granularity_of(value, where)


def _scheme(granularity: Any, symmetric: bool) -> torch.qscheme:
    """Returns the scheme that comes nearest to a granularity: one scale, or several."""
    if isinstance(granularity, PerTensor):
        return torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return torch.per_channel_symmetric if symmetric else torch.per_channel_affine


def _check_dtypes(
    scale_dtype: torch.dtype | None, zero_point_dtype: torch.dtype | None, limits: tuple[int, int], where: str
) -> None:
    if scale_dtype is not None and not scale_dtype.is_floating_point:
        raise SpecError(f"scale_dtype={scale_dtype} holds no fractions", where=where, remedy="Use torch.float32.")
    if zero_point_dtype is None or zero_point_dtype.is_floating_point:
        return
    integer = zero_point_dtype is not torch.bool and not zero_point_dtype.is_complex
    info = torch.iinfo(zero_point_dtype) if integer else None
    if info is None or not info.min <= limits[0] <= limits[1] <= info.max:
        what = f"zero_point_dtype={zero_point_dtype} does not hold {limits[0]}..{limits[1]}"
        raise SpecError(what, where=where, remedy="Use torch.int32.")
