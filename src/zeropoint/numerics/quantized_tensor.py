"""A quantized tensor as a value: its integers, scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from zeropoint.core.arguments import require_positive
from zeropoint.core.dtypes import checked_range, plain_dtype
from zeropoint.core.errors import NonFiniteError, SpecError
from zeropoint.numerics import affine
from zeropoint.numerics.affine import QuantizationScheme
from zeropoint.numerics.granularity import Granularity, PerAxis, PerTensor, checked_axis, qparams_shape
from zeropoint.numerics.packing import INT4_RANGE, UINT4_RANGE, pack_int4, unpack_int4
from zeropoint.numerics.qparams import FLOAT32_EPS, symmetric_zero_point

_PER_TENSOR = PerTensor()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class QuantizedTensor:
    """The integers of a tensor, and what turns them into real values: ``(int_repr() - zero_point) * scale``.

    Built by ``QuantizedTensor.quantize`` and ``QuantizedTensor.from_int_repr``.

    Args:
        data: the integers in ``dtype`` and ``shape``; or, when ``is_packed``, flattened and two to a byte in uint8.
        scale: float tensor of ``qparams_shape(granularity, shape)``.
        zero_point: int32 tensor of the same shape.
        granularity: which elements share one scale.
        dtype: integer dtype of ``int_repr()``.
        quant_min, quant_max: range of the integers, inclusive.
        shape: shape of the tensor, packed or not.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    granularity: Granularity
    dtype: torch.dtype
    quant_min: int
    quant_max: int
    shape: torch.Size

    @classmethod
    def quantize(
        cls,
        x: torch.Tensor,
        dtype: torch.dtype = torch.int8,
        *,
        quant_min: int | None = None,
        quant_max: int | None = None,
        granularity: Granularity = _PER_TENSOR,
        scheme: QuantizationScheme = "symmetric",
        eps: float = FLOAT32_EPS,
    ) -> QuantizedTensor:
        """Returns ``x`` quantized over its own smallest and largest value, in each block of the granularity.

        Args:
            x: float32, float16 or bfloat16 tensor of any shape with at least one element.
            dtype: int8, uint8, int16, uint16 or int32. 4-bit values: int8 with -8..7 or uint8 with 0..15.
            quant_min, quant_max: range of the integers, inclusive; None: the bound of ``dtype``.
            scheme: ``"symmetric"`` (zero point in the middle of the integers) or ``"affine"`` (measured).
            eps: smallest scale.

        Raises:
            SpecError: arguments that cannot hold.
            NonFiniteError: ``x`` has NaN or infinity.
        """
        low, high = checked_range(dtype, quant_min, quant_max)
        if scheme not in ("symmetric", "affine"):
            raise SpecError(f"scheme={scheme!r} is unknown", where="quantize", remedy='Use "symmetric" or "affine".')
        affine.check_floats(x, "quantize")
        x = x.detach()
        narrow = (low, high) != checked_range(dtype, None, None)
        middle = symmetric_zero_point(dtype, low, high, custom_range=narrow)
        scale, zero_point = affine.choose_qparams_blockwise(
            x, low, high, granularity, scheme=scheme, eps=eps, symmetric_zero_point=middle
        )
        _check_finite(scale, x)
        integers = affine.quantize(x, scale, zero_point, dtype, quant_min=low, quant_max=high, granularity=granularity)
        return cls._built(integers, scale, zero_point, granularity, low, high)

    @classmethod
    def from_int_repr(
        cls,
        integers: torch.Tensor,
        scale: torch.Tensor | float,
        zero_point: torch.Tensor | int,
        *,
        quant_min: int | None = None,
        quant_max: int | None = None,
        granularity: Granularity = _PER_TENSOR,
    ) -> QuantizedTensor:
        """Returns the quantized tensor of given integers, scale and zero point; nothing is measured or rounded.

        Args:
            integers: tensor of an integer storage dtype, any shape.
            scale, zero_point: as in ``affine.quantize``; a number is a scale of dtype float32.
            quant_min, quant_max: range of the integers, inclusive; None: the bound of their dtype.

        Raises:
            SpecError: arguments that cannot hold, or an integer outside of the range.
        """
        affine.check_integers(integers, "from_int_repr")
        low, high = checked_range(integers.dtype, quant_min, quant_max)
        if not isinstance(scale, torch.Tensor):
            number = require_positive("scale", scale, "from_int_repr")
            scale = torch.tensor(number, dtype=torch.float32, device=integers.device)
        scale, zero_point = affine.checked_qparams(
            integers.shape, scale, zero_point, granularity, (low, high), "from_int_repr"
        )
        _check_within(integers, low, high)
        return cls._built(integers, scale, zero_point, granularity, low, high)

    @classmethod
    def _built(
        cls,
        integers: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        granularity: Granularity,
        quant_min: int,
        quant_max: int,
    ) -> QuantizedTensor:
        if zero_point.is_floating_point():
            raise SpecError(f"zero_point is {zero_point.dtype}", where="QuantizedTensor", remedy="Give integers.")
        shape = qparams_shape(granularity, integers.shape)
        is_packed = _fits_nibble(integers.dtype, quant_min, quant_max)
        return cls(
            data=pack_int4(integers.reshape(-1)) if is_packed else integers,
            scale=scale.reshape(shape),
            zero_point=zero_point.to(torch.int32).reshape(shape),
            granularity=granularity,
            dtype=plain_dtype(integers.dtype),
            quant_min=quant_min,
            quant_max=quant_max,
            shape=integers.shape,
        )

    @property
    def is_packed(self) -> bool:
        """True when the integers fit 4 bits and are held two to a byte."""
        return _fits_nibble(self.dtype, self.quant_min, self.quant_max)

    @property
    def axis(self) -> int | None:
        """The channel axis counted from 0, when the granularity is per axis; else None."""
        match self.granularity:
            case PerAxis(axis):
                return checked_axis(axis, self.shape)
            case _:
                return None

    @property
    def device(self) -> torch.device:
        """Where the integers are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the integers as held (4-bit values packed), the scales and the zero points together."""
        return self.data.nbytes + self.scale.nbytes + self.zero_point.nbytes

    def int_repr(self) -> torch.Tensor:
        """Returns the integers, unpacked: a tensor of ``dtype`` and ``shape``."""
        if not self.is_packed:
            return self.data
        return unpack_int4(self.data, self.shape.numel(), self.dtype).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the real values as a tensor of the float ``dtype`` and of ``shape``."""
        return affine.dequantize(
            self.int_repr(), self.scale, self.zero_point, granularity=self.granularity, dtype=dtype
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Returns the same values on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("data", "scale", "zero_point")}
        return replace(self, **moved)

    def __repr__(self) -> str:
        integers = f"{str(self.dtype).removeprefix('torch.')} {self.quant_min}..{self.quant_max}"
        qparams = f"{_range_text('scale', self.scale)}, {_range_text('zero_point', self.zero_point)}"
        return f"QuantizedTensor({tuple(self.shape)}, {integers}, {self.granularity}, {qparams}, {self.nbytes} bytes)"


def _range_text(name: str, values: torch.Tensor) -> str:
    """Returns the smallest and largest of the values, once where they print alike."""
    if values.numel() == 0 or values.device.type == "meta":
        return f"no {name}"
    form = ".3g" if values.is_floating_point() else "d"
    low, high = f"{values.min().item():{form}}", f"{values.max().item():{form}}"
    return f"{name} {low}" if low == high else f"{name} {low}..{high}"


def _fits_nibble(dtype: torch.dtype, quant_min: int, quant_max: int) -> bool:
    ranges = {torch.int8: INT4_RANGE, torch.uint8: UINT4_RANGE}
    low, high = ranges.get(dtype, (0, -1))
    return low <= quant_min and quant_max <= high


def _check_finite(scale: torch.Tensor, x: torch.Tensor) -> None:
    if bool(scale.isfinite().all()) or bool(x.isfinite().all()):
        return
    count = int((~x.isfinite()).sum())
    what = f"{count} of {x.numel()} values are NaN or infinite"
    raise NonFiniteError(what, where="quantize", remedy="Find the operator that made them, or clamp x first.")


def _check_within(integers: torch.Tensor, quant_min: int, quant_max: int) -> None:
    if integers.numel() == 0:
        return
    wide = integers.to(torch.int64)
    low, high = int(wide.min()), int(wide.max())
    if low < quant_min or high > quant_max:
        remedy = "Clamp the integers, or widen quant_min and quant_max."
        what = f"integers in {low}..{high} do not fit {quant_min}..{quant_max}"
        raise SpecError(what, where="from_int_repr", remedy=remedy)
