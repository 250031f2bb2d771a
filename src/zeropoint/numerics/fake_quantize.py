"""Fake quantizers: they observe a tensor, and round it as the quantized model will, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch

from zeropoint.core.errors import SpecError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.numerics.observers.base import WithArgs
from zeropoint.numerics.observers.defaults import (
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
)
from zeropoint.numerics.observers.fixed import FixedQParamsObserver
from zeropoint.numerics.observers.histogram import HistogramObserver
from zeropoint.numerics.observers.minmax import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from zeropoint.numerics.straight_through import Known, fake_quantize

QParams = tuple[torch.Tensor, torch.Tensor]


class FakeQuantizeBase(WithArgs, torch.nn.Module):
    """Two switches, kept as buffers of one element so that they are saved and replicated.

    Attributes:
        fake_quant_enabled: 1: the tensor is rounded; 0: it passes.
        observer_enabled: 1: the tensor is observed.
    """

    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))

    def calculate_qparams(self) -> QParams:
        """Returns ``(scale, zero_point)``."""
        raise NotImplementedError

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches rounding; the parameter is the field's."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        """Lets tensors pass unrounded."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switches observing; the parameter is the field's."""
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        """Keeps scale and zero point as they are."""
        self.enable_observer(False)


class FakeQuantize(FakeQuantizeBase):
    """Rounds to ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``.

    Scale and zero point are those of its observer, taken anew after each observed tensor. The gradient passes where
    the value was not clamped: values and gradients are those of ``torch.fake_quantize_per_tensor_affine``.

    Args:
        observer: class or ``with_args`` constructor of the observer.
        quant_min, quant_max: for the observer, where given.
        is_dynamic: for the observer, where True.
        observer_kwargs: other arguments of the observer.

    Attributes:
        activation_post_process: the observer.
        scale, zero_point: buffers, float32 and int32 (float32 for a float zero point); ``(1,)``, or one per channel
            or group.

    Raises:
        SpecError: the observer refuses its arguments, or its integers do not fit int32.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    activation_post_process: Any

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        given = {"quant_min": quant_min, "quant_max": quant_max, "is_dynamic": True if is_dynamic else None}
        observer_kwargs.update({name: value for name, value in given.items() if value is not None})
        built = self.activation_post_process = observer(**observer_kwargs)
        self.dtype, self.qscheme, self.is_dynamic = built.dtype, built.qscheme, built.is_dynamic
        self.quant_min, self.quant_max = _integers(built)
        self.ch_axis: int = getattr(built, "ch_axis", -1)
        self.is_per_channel = self.qscheme in PER_CHANNEL
        float_zero_point = self.qscheme == torch.per_channel_affine_float_qparams
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.float32 if float_zero_point else torch.int32))

    @property
    def site(self) -> str:
        """Returns what is quantized, in the words of the graph; that of the observer."""
        return getattr(self.activation_post_process, "site", "")

    @site.setter
    def site(self, value: str) -> None:
        self.activation_post_process.site = value

    @property
    def batches(self) -> int:
        """Returns how many tensors were observed."""
        return getattr(self.activation_post_process, "batches", 0)

    def reset(self) -> None:
        """Forgets all that was observed; scale and zero point become 1 and 0."""
        self.activation_post_process.reset()
        self._take(torch.ones(1), torch.zeros(1))

    def calculate_qparams(self) -> QParams:
        """Returns ``(scale, zero_point)`` of the observer.

        Raises:
            CalibrationError: no tensor was observed.
        """
        return self.activation_post_process.calculate_qparams()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` rounded, of its shape and dtype; an empty tensor as it is.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity and is observed.
        """
        if x.numel() == 0:
            return x
        known = None
        if self.observer_enabled.item():
            self.activation_post_process(x.detach())
            self._take_observed()
            last_range = getattr(self.activation_post_process, "last_range", None)
            known = None if last_range is None else last_range()
        return self._round(x, known) if self.fake_quant_enabled.item() else x

    def _round(self, x: torch.Tensor, known: Known | None) -> torch.Tensor:
        if known is None or type(self).fake_quantize is not FakeQuantize.fake_quantize:
            return self.fake_quantize(x)
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max, known=known)

    def _take_observed(self) -> None:
        in_numbers = getattr(self.activation_post_process, "qparams_in_numbers", None)
        is_ours = type(self).calculate_qparams is FakeQuantize.calculate_qparams
        numbers = in_numbers() if is_ours and in_numbers is not None else None
        if numbers is None or self.scale.shape != (1,):
            self._take(*self.calculate_qparams())
        else:
            self.scale.fill_(numbers[0])
            self.zero_point.fill_(numbers[1])

    @torch.no_grad()
    def _take(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            self._make_room(name, value.shape)
            getattr(self, name).copy_(value)

    def take_range(self) -> None:
        """Takes scale and zero point anew from what its observer has seen.

        Raises:
            CalibrationError: no tensor was observed.
        """
        self._take(*self.activation_post_process.calculate_qparams())

    def _make_room(self, name: str, shape: torch.Size) -> None:
        """Gives ``scale`` or ``zero_point`` another shape; its values are to be written."""
        buffer = getattr(self, name)
        if buffer.shape != shape:
            buffer.resize_(shape)

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` rounded with the scale and zero point as they are."""
        if not self.is_per_channel:
            return self._per_tensor(x)
        group_size = getattr(self.activation_post_process, "group_size", None)
        if group_size is None:
            return self._per_channel(x, self.scale, self.zero_point, self.ch_axis % x.dim())
        groups = x.reshape(-1, group_size)
        return self._per_channel(groups, self.scale.flatten(), self.zero_point.flatten(), 0).reshape(x.shape)

    def _per_tensor(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def _per_channel(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
        return fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max, axis)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes room for the saved number of channels."""
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                self._make_room(name, state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        switches = f"fake_quant_enabled={self.fake_quant_enabled.item()}, observer={self.observer_enabled.item()}"
        return f"{switches}, {self.dtype}, {self.qscheme}, {self.quant_min}..{self.quant_max}, ch_axis={self.ch_axis}"


def _integers(observer: Any) -> tuple[int, int]:
    low, high = observer.quant_min, observer.quant_max
    info = torch.iinfo(torch.int32)
    if info.min <= low and high <= info.max:
        return low, high
    raise SpecError(f"{low}..{high} does not fit int32", where=type(observer).__name__, remedy="Use a smaller dtype.")


class FixedQParamsFakeQuantize(FakeQuantize):
    """Rounds with the scale and zero point that its FixedQParamsObserver was built with.

    Raises:
        SpecError: the observer is not a fixed one.
    """

    def __init__(self, observer: Any = FixedQParamsObserver, **observer_kwargs: Any) -> None:
        super().__init__(observer, **observer_kwargs)
        if type(self.activation_post_process).__name__ != FixedQParamsObserver.__name__:
            what = f"observer={observer!r} has no fixed scale and zero point"
            raise SpecError(what, where=type(self).__name__, remedy="Use FixedQParamsObserver.with_args(...).")
        self.scale = self.activation_post_process.scale
        self.zero_point = self.activation_post_process.zero_point

    def calculate_qparams(self) -> QParams:
        """Returns the scale and zero point that were given."""
        return self.scale, self.zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fake_quantize(x) if self.fake_quant_enabled.item() and x.numel() > 0 else x

    def reset(self) -> None:
        """Does nothing: nothing was observed."""


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """Rounds with the moving average of the range; takes the moving-average observers only.

    The name and the switches' dtype (int64) are the field's. The kernel ``torch.fused_moving_avg_obs_fake_quant`` is
    not used: its scale differs from the observer's, which is what convert writes (on CPU, torch 2.13: it is never
    below 6.1e-5 whatever ``eps`` says, differs by up to 1/256 for symmetric schemes, and by 2 for symmetric values of
    one sign), so a trained model would not be the converted one; it is float32 only; and it saves no pass over the
    data.

    Raises:
        SpecError: the observer keeps no moving average.
    """

    def __init__(
        self, observer: Any = MovingAverageMinMaxObserver, quant_min: int = 0, quant_max: int = 255, **settings: Any
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **settings)
        if not hasattr(self.activation_post_process, "averaging_constant"):
            what = f"observer={observer!r} keeps no moving average"
            raise SpecError(what, where=type(self).__name__, remedy="Use MovingAverageMinMaxObserver, or FakeQuantize.")
        self.register_buffer("fake_quant_enabled", torch.tensor([1]))
        self.register_buffer("observer_enabled", torch.tensor([1]))


def enable_fake_quant(mod: torch.nn.Module) -> None:
    """Switches rounding on, if ``mod`` is a fake quantizer: ``model.apply(enable_fake_quant)``."""
    if isinstance(mod, FakeQuantizeBase):
        mod.enable_fake_quant()


def disable_fake_quant(mod: torch.nn.Module) -> None:
    """Switches rounding off, if ``mod`` is a fake quantizer."""
    if isinstance(mod, FakeQuantizeBase):
        mod.disable_fake_quant()


def enable_observer(mod: torch.nn.Module) -> None:
    """Switches observing on, if ``mod`` is a fake quantizer."""
    if isinstance(mod, FakeQuantizeBase):
        mod.enable_observer()


def disable_observer(mod: torch.nn.Module) -> None:
    """Switches observing off, if ``mod`` is a fake quantizer: scales stay as they are."""
    if isinstance(mod, FakeQuantizeBase):
        mod.disable_observer()


# The names that the field has for fake quantizers with certain arguments.
_UINT8: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}
_INT8: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
_INT8_EVEN: dict[str, Any] = {"quant_min": -127, "quant_max": 127, "dtype": torch.qint8, "eps": 2**-12}
_PER_TENSOR: dict[str, Any] = {"observer": MovingAverageMinMaxObserver, "qscheme": torch.per_tensor_symmetric}
_PER_CHANNEL: dict[str, Any] = {
    "observer": MovingAveragePerChannelMinMaxObserver,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}
_EMBEDDING: dict[str, Any] = {
    **_PER_CHANNEL,
    "qscheme": torch.per_channel_affine_float_qparams,
    "averaging_constant": 1,
}

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_affine, reduce_range=True, **_UINT8
)
default_histogram_fake_quant = default_fake_quant.with_args(observer=HistogramObserver)
default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, is_dynamic=True, averaging_constant=1, **_UINT8
)
default_weight_fake_quant = FakeQuantize.with_args(**_PER_TENSOR, **_INT8)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(**_PER_CHANNEL, **_INT8)
default_embedding_fake_quant = FakeQuantize.with_args(**_EMBEDDING, **_UINT8)
default_embedding_fake_quant_4bit = FakeQuantize.with_args(**_EMBEDDING, dtype=torch.quint4x2)

default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant

default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **_UINT8)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(**_PER_TENSOR, **_INT8)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(**_PER_CHANNEL, **_INT8)
fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(**_PER_TENSOR, **_INT8_EVEN)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    **_PER_CHANNEL, **_INT8_EVEN
)
