"""The quantizer that a configuration asks for."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch

from zeropoint.backends.xnnpack import (
    XNNPACKQuantizer,
    get_default_quantization_config,
    get_symmetric_quantization_config,
)
from zeropoint.backends.xnnpack.config import FINE_EPS
from zeropoint.cli.exits import UsageError
from zeropoint.cli.settings import Scheme, Settings, Weights
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.specs import QuantizationSpec


def quantizer_of(settings: Settings) -> XNNPACKQuantizer:
    """Returns the backend's quantizer with the scheme and the rules of the settings.

    Raises:
        UsageError: a rule names no module type, or no operator.
    """
    config = _config(settings.scheme, settings.weights, settings)
    assert config is not None
    quantizer = XNNPACKQuantizer().set_global(config)
    for rule in settings.rules:
        choice = _config(rule.scheme, settings.weights if rule.weights is None else rule.weights, settings)
        if rule.module:
            quantizer.set_module_name(rule.module, choice)
        elif rule.type:
            quantizer.set_module_type(_module_type(rule.type), choice)
        elif rule.node:
            quantizer.set_node_name(rule.node, choice)
        else:
            quantizer.set_operator_type(_operator(rule.operator), choice)
    return quantizer


def _config(scheme: Scheme, weights: Weights, settings: Settings) -> QuantizationConfig | None:
    is_per_channel = weights == "per_channel"
    match scheme:
        case "float":
            return None
        case "dynamic":
            return _with_fine_scales(get_symmetric_quantization_config(is_per_channel=is_per_channel, is_dynamic=True))
        case "static" if settings.observer == "histogram":
            return _with_fine_scales(get_symmetric_quantization_config(is_per_channel=is_per_channel))
        case "static":
            per_tensor = _with_fine_scales(get_symmetric_quantization_config())
            config = get_default_quantization_config()
            return config if is_per_channel else replace(config, weight=per_tensor.weight)


def _with_fine_scales(config: QuantizationConfig) -> QuantizationConfig:
    """Returns a configuration whose scales may be as small as those of the default one."""
    specs = [config.input_activation, config.output_activation, config.weight]
    fine = [
        replace(spec, observer_or_fake_quant_ctr=spec.observer_or_fake_quant_ctr.with_args(eps=FINE_EPS))
        if isinstance(spec, QuantizationSpec) and not spec.is_dynamic
        else spec
        for spec in specs
    ]
    return replace(config, input_activation=fine[0], output_activation=fine[1], weight=fine[2])


def _module_type(name: str) -> type | str:
    """Returns a class by its name, of torch.nn where it has no module; the name itself where it cannot be found."""
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "torch.nn"), kind, None)
    except ImportError:
        found = None
    return found if isinstance(found, type) else name


def _operator(name: str) -> Any:
    """Returns an operator by its name, e.g. ``aten.add.Tensor``, ``add.Tensor``, ``torch.ops.aten.add`` or ``add``."""
    parts = name.removeprefix("torch.ops.").split(".")
    for path in (parts, ["aten", *parts]):
        found: Any = torch.ops
        for part in path:
            found = getattr(found, part, None)
        if len(path) > 1 and found is not None and callable(found):
            return found
    remedy = 'Name it as torch.ops does, e.g. "aten.add.Tensor", or "add" for every form of it.'
    raise UsageError(f"there is no operator {name!r}", where="rules", remedy=remedy)
