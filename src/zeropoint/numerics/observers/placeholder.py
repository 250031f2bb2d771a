"""Observers without a range: they mark a place in the graph, or record what passes."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.dtypes import INTEGER_DTYPES, checked_range, plain_dtype
from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import PER_CHANNEL, PER_TENSOR
from zeropoint.numerics.granularity import Granularity, PerTensor, PerToken, granularity_of
from zeropoint.numerics.observers.base import ObserverBase
from zeropoint.numerics.qparams import FLOAT32_EPS


class PlaceholderObserver(ObserverBase):
    """Marks a tensor whose scale is found at run time (``is_dynamic=True``), or that changes to a float dtype.

    Args:
        dtype: what the tensor becomes; a float dtype leaves it float.
        custom_op_name, compute_dtype: accepted for compatibility; ``compute_dtype`` makes it dynamic, as ever.
        quant_min, quant_max, qscheme, eps: what the dynamic quantization will use; None: the dtype's whole range,
            ``torch.per_tensor_affine``, float32 epsilon.
        granularity: ``PerToken()`` for one scale of each vector along the last axis, of tensors that have two axes at
            least; int8, -128..127, affine. None or ``PerTensor()``: one scale.
        spec: other keywords of a quantization spec, not used here.

    Raises:
        SpecError: nothing can be quantized to ``dtype``, or not within the range or by the scheme.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        granularity: Granularity | None = None,
        **spec: Any,
    ) -> None:
        super().__init__(dtype, is_dynamic or compute_dtype is not None)
        self._refuse_unknown(spec)
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        if self.qscheme not in PER_TENSOR + PER_CHANNEL:
            raise SpecError(f"qscheme={qscheme!r} is unknown", where=type(self).__name__)
        if plain_dtype(dtype) in INTEGER_DTYPES:
            checked_range(dtype, quant_min, quant_max)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.eps = FLOAT32_EPS if eps is None else eps
        self.custom_op = custom_op_name
        self.granularity = self._checked_granularity(granularity)

    @property
    def takes_complex(self) -> bool:
        """True where the tensor stays as it is."""
        return self.dtype in (torch.float32, torch.float64) and not self.is_dynamic

    def _checked_granularity(self, value: Any) -> Granularity:
        granularity = PerTensor() if value is None else granularity_of(value, type(self).__name__)
        whole_range = self.quant_min in (None, -128) and self.quant_max in (None, 127)
        taken = self.dtype == torch.int8 and whole_range and self.qscheme == torch.per_tensor_affine
        if isinstance(granularity, PerTensor) or (isinstance(granularity, PerToken) and taken):
            return granularity
        what = f"{granularity} of {self.dtype}, {self.quant_min}..{self.quant_max}, {self.qscheme}"
        remedy = "Use PerTensor(), or PerToken() with int8, -128..127 and torch.per_tensor_affine."
        raise SpecError(what, where=type(self).__name__, remedy=remedy)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises CalibrationError: a placeholder measures nothing."""
        remedy = "Use is_dynamic=True with it, or an observer that measures, such as MinMaxObserver."
        raise CalibrationError("a PlaceholderObserver has no scale and zero point", where=self.site, remedy=remedy)

    def extra_repr(self) -> str:
        return f"{self.dtype}, is_dynamic={self.is_dynamic}"


class RecordingObserver(ObserverBase):
    """Keeps a copy of every tensor that passes. For debugging: the only observer whose memory grows."""

    def __init__(self, dtype: torch.dtype = torch.quint8, **spec: Any) -> None:
        super().__init__(dtype)
        self._refuse_unknown(spec)
        self.tensor_val: list[torch.Tensor] = []

    @property
    def takes_complex(self) -> bool:
        """True: it keeps any tensor."""
        return True

    def observe(self, x: torch.Tensor) -> None:
        self.tensor_val.append(x.clone())

    def get_tensor_value(self) -> list[torch.Tensor]:
        """Returns the recorded tensors, oldest first."""
        return self.tensor_val

    def reset(self) -> None:
        super().reset()
        self.tensor_val.clear()


class NoopObserver(ObserverBase):
    """Marks a tensor that changes to a float dtype."""

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "", **spec: Any) -> None:
        super().__init__(dtype)
        self._refuse_unknown(spec)
        self.custom_op = custom_op_name


class ReuseInputObserver(ObserverBase):
    """Marks the output of an operator, such as a reshape, that keeps the scale and zero point of its input."""

    def __init__(self, dtype: torch.dtype = torch.quint8, **spec: Any) -> None:
        super().__init__(dtype)
        self._refuse_unknown(spec)
