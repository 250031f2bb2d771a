"""Fake quantizers whose scale and zero point are trained: LSQ (Esser et al. 2020), LSQ+ (Bhalgat et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zeropoint.core.errors import SpecError
from zeropoint.core.specs import SYMMETRIC
from zeropoint.numerics.fake_quantize import FakeQuantize, QParams
from zeropoint.numerics.straight_through import fake_quantize, learned_fake_quantize


class LearnableFakeQuantize(FakeQuantize):
    """Rounds as FakeQuantize, with a scale and zero point that are parameters.

    They are taken from the observer until learning is enabled, from the first tensor or a loaded state on. Gradients:
    ``learned_fake_quantize``. The zero point of a symmetric scheme is not learned.

    The parameters are there from the beginning, so an optimizer that is made before the first tensor has them. Enable
    learning before the model is wrapped in ``DistributedDataParallel``, which knows only parameters that learn by then.

    Args:
        observer: class or ``with_args`` constructor of the observer, which chooses where learning starts.
        quant_min, quant_max: range of the integers, inclusive.
        use_grad_scaling: multiply both gradients by ``1 / sqrt(elements * quant_max)`` (Esser et al. 2020, section
            2.2).
        observer_kwargs: other arguments of the observer.

    Attributes:
        scale, zero_point: parameters, float32; ``(1,)``, or one per channel or group.
        learning_enabled: 1: they are learned.
        eps: smallest scale, that of the observer.

    Raises:
        SpecError: the observer refuses its arguments, is dynamic, or gives a float zero point; or gradients are to be
            scaled by a ``quant_max`` that is not positive.
    """

    learning_enabled: torch.Tensor
    eps: torch.Tensor

    def __init__(
        self, observer: Any, quant_min: int = 0, quant_max: int = 255, use_grad_scaling: bool = False, **settings: Any
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **settings)
        self._check(use_grad_scaling)
        self.use_grad_scaling = use_grad_scaling
        del self.scale, self.zero_point
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("learning_enabled", torch.tensor([0], dtype=torch.uint8))
        self.register_buffer("eps", self.activation_post_process.eps.clone())
        self._initialized = False

    def _check(self, use_grad_scaling: bool) -> None:
        where = type(self).__name__
        if self.is_dynamic or self.qscheme == torch.per_channel_affine_float_qparams:
            what = "is_dynamic=True" if self.is_dynamic else f"qscheme={self.qscheme}"
            raise SpecError(f"{what} leaves nothing to learn", where=where, remedy="Use FakeQuantize.")
        if use_grad_scaling and self.quant_max <= 0:
            what = f"use_grad_scaling=True divides by the square root of quant_max={self.quant_max}"
            raise SpecError(what, where=where, remedy="Leave it False, or choose a range with positive integers.")

    def enable_range_learning(self) -> None:
        """Lets scale and zero point be learned, and stops observing."""
        self.disable_observer()
        self.learning_enabled[0] = 1
        self._set_gradients()

    def disable_range_learning(self) -> None:
        """Keeps scale and zero point as they are."""
        self.learning_enabled[0] = 0
        self._set_gradients()

    def enable_observer(self, enabled: bool = True) -> None:
        """Switches observing; scale and zero point that are observed are not learned."""
        super().enable_observer(enabled)
        if enabled:
            self.disable_range_learning()

    def _set_gradients(self) -> None:
        learns = bool(self.learning_enabled.item())
        self.scale.requires_grad_(learns)
        self.zero_point.requires_grad_(learns and self.qscheme not in SYMMETRIC)

    def calculate_qparams(self) -> QParams:
        """Returns scale and zero point as they are rounded with: the scale at least ``eps``, the zero point an int64.

        Raises:
            CalibrationError: no tensor was observed, and no state loaded.
        """
        if not self._initialized:
            return super().calculate_qparams()
        zero_point = self.zero_point.detach().round().clamp(self.quant_min, self.quant_max)
        return self.scale.detach().clamp(min=self.eps.item()), zero_point.long()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` rounded, of its shape and dtype; an empty tensor as it is.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity and is observed.
        """
        if x.numel() == 0:
            return x
        if not self._initialized or self.observer_enabled.item():
            self.activation_post_process(x.detach())
            self.take_range()
        return self.fake_quantize(x) if self.fake_quant_enabled.item() else x

    def take_range(self) -> None:
        super().take_range()
        self._initialized = True

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        # As data: what backward keeps of an earlier call in the same step was clamped then, and is not changed here.
        self.scale.data.clamp_(min=self.eps.item())
        return super().fake_quantize(x)

    def _factor(self, x: torch.Tensor) -> float:
        return (x.numel() * self.quant_max) ** -0.5 if self.use_grad_scaling else 1.0

    def _per_tensor(self, x: torch.Tensor) -> torch.Tensor:
        return self._learned(x, self.scale, self.zero_point, None)

    def _per_channel(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
        return self._learned(x, scale, zero_point, axis)

    def _learned(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None
    ) -> torch.Tensor:
        low, high = self.quant_min, self.quant_max
        if self.scale.requires_grad:
            return learned_fake_quantize(x, scale, zero_point, low, high, axis, self._factor(x))
        integers = zero_point.detach().round().clamp(low, high).to(torch.int32)
        return fake_quantize(x, scale.detach(), integers, low, high, axis)

    def reset(self) -> None:
        super().reset()
        self._initialized = False

    def _make_room(self, name: str, shape: torch.Size) -> None:
        parameter = getattr(self, name)
        if parameter.shape != shape:  # Of an optimizer's parameter only the data may change.
            parameter.data = parameter.data.new_empty(shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Leaves out scale and zero point that nothing has chosen yet."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._initialized:
            for name in ("scale", "zero_point"):
                destination.pop(prefix + name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        """Takes scale and zero point of the saved shape; without them, the state is that of a new module."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        names = [prefix + name for name in ("scale", "zero_point")]
        has_both = all(name in state_dict for name in names)
        if has_both or prefix + "learning_enabled" in state_dict:
            self._initialized = has_both
            missing[:] = [name for name in missing if name not in names]
        self._set_gradients()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learning={self.learning_enabled.item()}"


def enable_range_learning(mod: nn.Module) -> None:
    """Lets scale and zero point be learned, if ``mod`` is such a fake quantizer: ``model.apply(...)``."""
    if isinstance(mod, LearnableFakeQuantize):
        mod.enable_range_learning()


def disable_range_learning(mod: nn.Module) -> None:
    """Keeps scale and zero point as they are, if ``mod`` is a fake quantizer that learns."""
    if isinstance(mod, LearnableFakeQuantize):
        mod.disable_range_learning()
