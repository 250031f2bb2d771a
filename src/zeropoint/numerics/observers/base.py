"""What every observer does: look at a tensor, keep statistics of bounded size, give a scale and a zero point."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from zeropoint.core.arguments import require_bool
from zeropoint.core.dtypes import check_dtype, checked_range
from zeropoint.core.errors import CalibrationError, NonFiniteError, SpecError
from zeropoint.core.specs import PER_CHANNEL, PER_TENSOR, SYMMETRIC
from zeropoint.numerics.qparams import (
    FLOAT32_EPS,
    USUAL,
    choose_qparams_by_scheme,
    choose_qparams_in_numbers,
    symmetric_zero_point,
)

SPEC_KEYWORDS = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic")
"""What a quantization spec may pass to any observer: an observer takes no notice of the ones it has no use for."""


class PartialWrapper:
    """A class with some of its arguments chosen. Calling it builds an instance; it can be narrowed further.

    Args:
        p: the class and its arguments; partials of partials are flat, so ``p.func`` is the class itself.
        callable_args: functions, called at each construction, that give further arguments by name.
    """

    def __init__(self, p: functools.partial[Any], callable_args: dict[str, Callable[[], Any]] | None = None) -> None:
        self.p = p
        self.callable_args: dict[str, Callable[[], Any]] = dict(callable_args or {})

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        late = {name: function() for name, function in self.callable_args.items() if name not in keywords}
        return self.p(*args, **{**late, **keywords})

    def with_args(self, **keywords: Any) -> PartialWrapper:
        """Returns a wrapper with these arguments too; the newest value of a name counts."""
        late = {name: function for name, function in self.callable_args.items() if name not in keywords}
        return PartialWrapper(functools.partial(self.p, **keywords), late)

    def with_callable_args(self, **functions: Callable[[], Any]) -> PartialWrapper:
        """Returns a wrapper that also calls these functions for arguments whenever it builds an instance."""
        return PartialWrapper(self.p, {**self.callable_args, **functions})

    def __repr__(self) -> str:
        chosen = [f"{name}={value!r}" for name, value in self.p.keywords.items()]
        chosen += [f"{name}={function!r}()" for name, function in self.callable_args.items()]
        return f"{getattr(self.p.func, '__name__', self.p.func)}({', '.join(chosen)})"


class WithArgs:
    """Gives a class ``with_args`` and ``with_callable_args``."""

    @classmethod
    def with_args(cls, **keywords: Any) -> PartialWrapper:
        """Returns a constructor of this class with these arguments chosen."""
        return PartialWrapper(functools.partial(cls, **keywords))

    @classmethod
    def with_callable_args(cls, **functions: Callable[[], Any]) -> PartialWrapper:
        """Returns a constructor of this class that calls these functions for arguments."""
        return PartialWrapper(functools.partial(cls), functions)


def fingerprint(x: torch.Tensor) -> tuple[object, ...]:
    """Returns a value that changes when the storage or the contents of ``x`` do. Reads no element."""
    version = -1 if x.is_inference() else x._version
    return x.data_ptr(), version, x.shape, x.device


def is_plain(statistics: torch.Tensor) -> bool:
    """True for what can be computed in numbers of Python as torch computes it, without waiting for a device."""
    return statistics.dtype == torch.float32 and statistics.device.type == "cpu"


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """Returns ``x`` with its axes by falling stride: contiguous for a permuted tensor, such as channels_last.

    The minimum, the maximum and the histogram take no notice of order, and on contiguous memory they need no copy.
    """
    if x.is_contiguous():
        return x
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


class ObserverBase(WithArgs, torch.nn.Module):
    """Looks at the tensors that pass, and returns them as they are.

    A subclass implements ``observe``, ``calculate_qparams`` and, if it has statistics, ``reset``.

    Attributes:
        dtype: what the tensor will be quantized to.
        is_dynamic: scale and zero point are found anew from each tensor at run time.
        site: what is observed, in the words of the graph; it starts every error message.
        batches: how many tensors went into the statistics.
        constant_input: the tensor is a constant of the model: it is observed once, and again, from nothing, only after
            it was changed.

    Raises:
        SpecError: nothing can be quantized to ``dtype``.
    """

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        check_dtype(dtype, type(self).__name__)
        self.dtype = dtype
        self.is_dynamic = require_bool("is_dynamic", is_dynamic, type(self).__name__)
        self.site = ""
        self.batches = 0
        self.constant_input = False
        self._observed: tuple[object, ...] | None = None

    def _refuse_unknown(self, spec: dict[str, Any]) -> None:
        for name in spec:
            if name not in SPEC_KEYWORDS:
                allowed = "Leave it out, or choose an observer that has it."
                raise SpecError(f"no argument is called {name}", where=type(self).__name__, remedy=allowed)

    @property
    def where(self) -> str:
        """Returns how error messages name this observer: its site, else its class."""
        return self.site if self.site else type(self).__name__

    @property
    def takes_complex(self) -> bool:
        """True where a tensor that passes may be complex: it is neither measured nor changed."""
        return False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observes ``x``, any shape and float dtype, and returns it; an empty tensor is not observed.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity; the statistics are then as before.
            CalibrationError: ``x`` is complex, and what becomes of it needs a range.
        """
        if x.numel() == 0:
            return x
        if x.is_complex() and not self.takes_complex:
            remedy = "Annotate its real and its imaginary part, or leave the operator float."
            raise CalibrationError(f"a tensor of {x.dtype} has no range", where=self.where, remedy=remedy)
        if self.constant_input:
            mark = fingerprint(x)
            if mark == self._observed:
                return x
            self.reset()
            self._observe(x)
            self._observed = mark
        else:
            self._observe(x)
        return x

    def _observe(self, x: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.observe(x.detach())
        else:
            self.observe(x)
        self.__dict__["batches"] += 1  # nn.Module's own way of setting an attribute takes 2 us.

    def observe(self, x: torch.Tensor) -> None:
        """Takes ``x`` into the statistics. Observers without statistics leave this as it is."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``(scale, zero_point)``.

        Raises:
            CalibrationError: no tensor was observed, or this kind of observer has no scale of its own.
        """
        raise CalibrationError(f"{type(self).__name__} has no scale and zero point", where=self.site)

    def reset(self) -> None:
        """Forgets all that was observed."""
        self.batches = 0
        self._observed = None

    def no_data(self) -> CalibrationError:
        """Returns the error of an observer that is asked before any tensor reached it."""
        remedy = "Run the prepared model on calibration data that reaches this tensor before converting."
        return CalibrationError(f"no data reached this {type(self).__name__}", where=self.site, remedy=remedy)

    def require_finite(self, low: float, high: float) -> None:
        """Checks the smallest and largest value of a tensor, which are NaN where any of its values is.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        if math.isfinite(low) and math.isfinite(high):
            return
        found = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
        if self.constant_input:
            remedy = "Check what the model was loaded from."
            raise NonFiniteError(f"{found} in this constant of the model", where=self.where, remedy=remedy)
        remedy = "Check this batch of the data, and the operator that made the tensor."
        raise NonFiniteError(f"{found} in batch {self.batches} (counted from 0)", where=self.where, remedy=remedy)


class UniformQuantizationObserverBase(ObserverBase):
    """An observer that finds a range of real values and spreads the integers evenly over it.

    Args:
        dtype: integer dtype, plain or legacy (``torch.quint8``).
        qscheme: one of the class's ``schemes``; None: the first of them.
        reduce_range: halve both bounds of the integers, for x86 kernels that would overflow in int16.
        quant_min, quant_max: range of the integers, inclusive; None: that of ``dtype``.
        factory_kwargs: device and dtype of the statistics.
        eps: smallest scale; None: float32 epsilon.
        is_dynamic: see ObserverBase.
        spec: other keywords of a quantization spec, not used here.

    Attributes:
        schemes: the schemes that the class takes.
        supports_dynamic: whether ``is_dynamic=True`` makes sense for the class.

    Raises:
        SpecError: the arguments contradict one another.
    """

    _version = 3  # as the field's observers have it: eps is a buffer, per-channel buffers are min_val and max_val
    schemes: tuple[torch.qscheme, ...] = PER_TENSOR + PER_CHANNEL
    supports_dynamic = True
    eps: torch.Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        **spec: Any,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self._refuse_unknown(spec)
        self.qscheme = self.schemes[0] if qscheme is None else qscheme
        self.reduce_range = reduce_range
        self.has_customized_qrange = quant_min is not None or quant_max is not None
        self.quant_min, self.quant_max = self._integers(quant_min, quant_max)
        self._check_combination()
        factory = torch.nn.factory_kwargs(factory_kwargs)
        self.register_buffer("eps", torch.tensor([FLOAT32_EPS if eps is None else eps], **factory))
        if not self.eps.item() > 0:
            raise SpecError(f"eps={eps} is no smallest scale", where=type(self).__name__, remedy="Choose eps > 0.")
        self._register_statistics(factory)

    def _register_statistics(self, factory: dict[str, Any]) -> None:
        """Registers the buffers of the statistics, with the device and dtype in ``factory``."""

    def _integers(self, quant_min: int | None, quant_max: int | None) -> tuple[int, int]:
        low, high = checked_range(self.dtype, quant_min, quant_max)
        return (low // 2, high // 2) if self.reduce_range else (low, high)

    def _check_combination(self) -> None:
        where, symmetric = type(self).__name__, self.qscheme in SYMMETRIC
        if self.qscheme not in self.schemes:
            remedy = f"Use one of {', '.join(str(s) for s in self.schemes)}."
            raise SpecError(f"qscheme={self.qscheme} is not for this observer", where=where, remedy=remedy)
        if self.is_dynamic and not self.supports_dynamic:
            remedy = "Use PlaceholderObserver, or MovingAverageMinMaxObserver with averaging_constant=1."
            raise SpecError("is_dynamic=True is not for this observer", where=where, remedy=remedy)
        if symmetric and not self.quant_min <= self._symmetric_zero_point() <= self.quant_max:
            what = f"the zero point {self._symmetric_zero_point()} of a symmetric {self.dtype} tensor is outside of "
            what += f"quant_min={self.quant_min}, quant_max={self.quant_max}"
            remedy = "Choose a range that holds it, an affine qscheme, or reduce_range=False."
            raise SpecError(what, where=where, remedy=remedy)

    def _symmetric_zero_point(self) -> int:
        limits = self.quant_min, self.quant_max
        return symmetric_zero_point(self.dtype, *limits, custom_range=self.has_customized_qrange)

    def _calculate_qparams(self, min_val: torch.Tensor, max_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale (float32) and zero point that cover the range, in its shape, a single value as ``(1,)``.

        The zero point is int64, or float32 for ``torch.per_channel_affine_float_qparams``.

        Raises:
            CalibrationError: the range is empty: nothing was observed.
            NonFiniteError: the range is so wide that its scale is no float32, or one of its ends is NaN.
        """
        numbers = self._in_numbers(min_val, max_val)
        if numbers is not None:
            return torch.tensor(numbers[:1], dtype=torch.float32), torch.tensor(numbers[1:])
        self._require_range(min_val, max_val)
        scale, zero_point = self.qparams_of_range(min_val, max_val)
        if not math.isfinite(scale.sum().item()) and not bool(scale.isfinite().all()):  # The sum costs a third of it.
            what = f"the range {min_val.min().item()} to {max_val.max().item()} is too wide for a float32 scale"
            raise NonFiniteError(what, where=self.where, remedy="Mask with a smaller number than the largest float.")
        return (scale.reshape(1), zero_point.reshape(1)) if scale.dim() == 0 else (scale, zero_point)

    def _in_numbers(self, min_val: torch.Tensor, max_val: torch.Tensor) -> tuple[float, int] | None:
        """Returns scale and zero point of one range, to the bit as ``qparams_of_range`` gives them, in less time.

        None where there are many, or not of the usual kind and size.
        """
        is_ours = type(self).qparams_of_range is UniformQuantizationObserverBase.qparams_of_range
        has_float_zero_point = self.qscheme == torch.per_channel_affine_float_qparams
        if not is_ours or has_float_zero_point or min_val.dim() > 0 or not is_plain(min_val):
            return None
        low, high = min_val.item(), max_val.item()
        if not -USUAL < low <= high < USUAL:
            return None
        limits, eps, symmetric = (self.quant_min, self.quant_max), self.eps.item(), self.qscheme in SYMMETRIC
        middle = self._symmetric_zero_point()
        return choose_qparams_in_numbers(low, high, *limits, symmetric=symmetric, eps=eps, symmetric_zero_point=middle)

    def qparams_of_range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale and zero point of any ranges, ``low <= high`` of one shape, by this observer's scheme."""
        limits, middle = (self.quant_min, self.quant_max), self._symmetric_zero_point()
        return choose_qparams_by_scheme(
            low, high, *limits, self.qscheme, eps=self.eps.item(), symmetric_zero_point=middle
        )

    def _require_range(self, min_val: torch.Tensor, max_val: torch.Tensor) -> None:
        if min_val.numel() == 1 and min_val.item() <= max_val.item():  # In a third of the time of what follows.
            return
        if min_val.numel() > 0 and bool((min_val <= max_val).all()):
            return
        if bool(min_val.isnan().any() or max_val.isnan().any()):
            raise NonFiniteError(f"NaN in the first {self.batches} batches", where=self.where)
        raise self.no_data()

    def reset_min_max_vals(self) -> None:
        """Does ``reset``, under the name that the field knows."""
        self.reset()

    def _require_shape(self, known: torch.Tensor, found: torch.Tensor) -> None:
        if known.shape == found.shape:
            return
        what = f"the statistics are of shape {tuple(known.shape)}, those of this batch {tuple(found.shape)}"
        remedy = "Only the sizes of other axes may change from batch to batch."
        raise CalibrationError(what, where=self.where, remedy=remedy)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes room for statistics of another shape, e.g. of as many channels as the saved observer has met."""
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                buffer.resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        statistics = ", ".join(f"{name}={value}" for name, value in self._summary().items())
        kind = f"{self.dtype}, {self.qscheme}, {self.quant_min}..{self.quant_max}"
        return f"{kind}, batches={self.batches}" + (f", {statistics}" if statistics else "")

    def _summary(self) -> dict[str, object]:
        """Returns the statistics that the observer's text shows, by name."""
        shown = {name: getattr(self, name, None) for name in ("min_val", "max_val")}
        return {name: value.tolist() for name, value in shown.items() if value is not None and value.numel() <= 8}
