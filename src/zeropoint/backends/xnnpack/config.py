"""Configurations that the XNNPACK delegate can run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from zeropoint.core.arguments import require_bool, require_integer
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import SpecError
from zeropoint.core.policy import BackendPolicy
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from zeropoint.numerics.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

EPS = 2**-12
"""Smallest scale; that of ExecuTorch's own quantizer for this delegate."""

WHERE = "get_symmetric_quantization_config"

FINE_EPS = 2**-20
"""Smallest scale of the default configuration: a bias of 40 still fits int32 where the input's scale is 0.02."""

POLICY = BackendPolicy(name="xnnpack", bias="float on the int32 grid", tables="float16")


def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """Returns int8 activations (affine, per tensor) and int8 weights (symmetric).

    Args:
        is_per_channel: one weight scale per output channel.
        is_qat: fake quantizers in place of observers.
        is_dynamic: activations get their scale at run time.
        act_qmin, act_qmax: range of activations; ``lower`` takes -128 and 127 only, where the delegate saturates.
        weight_qmin, weight_qmax: range of weights; -8 and 7 for 4-bit weights.

    Raises:
        SpecError: a flag is no bool, or a range is empty, does not fit int8, or leaves out 0.
    """
    _require_bools(is_per_channel=is_per_channel, is_qat=is_qat, is_dynamic=is_dynamic)
    _require_zero(act=(act_qmin, act_qmax), weight=(weight_qmin, weight_qmax))
    activation = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=_activation_observer(is_qat, is_dynamic),
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=_weight_observer(is_per_channel, is_qat),
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


def _require_bools(**flags: bool) -> None:
    for name, flag in flags.items():
        require_bool(name, flag, WHERE)


def _require_zero(**ranges: tuple[int, int]) -> None:
    for role, (low, high) in ranges.items():
        low, high = require_integer(f"{role}_qmin", low, WHERE), require_integer(f"{role}_qmax", high, WHERE)
        if not low <= 0 <= high:
            taken = {"act": "-128 and 127, which the delegate takes", "weight": "-127 and 127, or -8 and 7"}[role]
            what = f"{role}_qmin={low}, {role}_qmax={high} leaves out 0"
            raise SpecError(what, where=WHERE, remedy=f"Choose {taken}.")


def get_default_quantization_config(is_qat: bool = False) -> QuantizationConfig:
    """Returns what ``quantize`` uses: int8, per-channel weights, activations by their smallest and largest value.

    Histogram ranges clip; the error of clipping is alike in neighbouring values, so it costs more than the finer
    rounding gains: on waifu2x super-resolution 1.1 dB are lost with histograms, 0.8 dB with min-max, and 0.4 dB once
    channels are equalized, which histograms defeat. Ranges are those of the calibration data, so give real data.
    Scales may be as small as ``FINE_EPS``: once batch norm is folded, one channel in twenty of EfficientNet-Lite0 has
    weights for which ``EPS`` is too coarse, and outputs below 1e-4 would all be 0.

    Args:
        is_qat: fake quantizers in place of observers, whose ranges are moving averages in training.

    Raises:
        SpecError: the flag is no bool.
    """
    require_bool("is_qat", is_qat, "get_default_quantization_config")
    config = get_symmetric_quantization_config(is_per_channel=True)
    assert config.input_activation is not None
    assert config.weight is not None
    of_activation, of_weight = _default_observers(is_qat)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=of_activation)
    weight = replace(config.weight, observer_or_fake_quant_ctr=of_weight)
    return replace(config, input_activation=activation, output_activation=activation, weight=weight, is_qat=is_qat)


def _default_observers(is_qat: bool) -> tuple[Any, Any]:
    """Returns those of activations and of weights."""
    if is_qat:
        fused = FusedMovingAvgObsFakeQuantize.with_args(eps=FINE_EPS)
        kinds = MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
        return fused.with_args(observer=kinds[0]), fused.with_args(observer=kinds[1])
    return MinMaxObserver.with_args(eps=FINE_EPS), PerChannelMinMaxObserver.with_args(eps=FINE_EPS)


def _activation_observer(is_qat: bool, is_dynamic: bool) -> Any:
    match is_qat, is_dynamic:
        case True, True:
            moving = MovingAverageMinMaxObserver.with_args(averaging_constant=1)
            return FakeQuantize.with_args(observer=moving, eps=EPS)
        case True, False:
            return FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=EPS)
        case False, True:
            return PlaceholderObserver.with_args(eps=EPS)
        case _:
            return HistogramObserver.with_args(eps=EPS)


def _weight_observer(is_per_channel: bool, is_qat: bool) -> Any:
    match is_qat, is_per_channel:
        case True, True:
            return FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, eps=EPS)
        case True, False:
            return FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=EPS)
        case False, True:
            return PerChannelMinMaxObserver.with_args(eps=EPS)
        case _:
            return MinMaxObserver.with_args(eps=EPS)
