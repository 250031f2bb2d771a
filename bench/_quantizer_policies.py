"""How each quantizer of the executorch package is made, and what its backend wants: one row each.

A row without ``lower`` has no lowering that works from packages alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

BACKENDS = "executorch.backends."


@dataclass(frozen=True, slots=True)
class Policy:
    """What one backend wants of a quantized model.

    ``make`` gets the module that defines the class. ``bias`` is what the converted graph holds: "float", "int32" (its
    scale derived from those of activation and weight), "int8", or "" where no layer with a bias is quantized.
    ``folded`` says whether weights are stored as integers, ``layout`` how model and inputs lie in memory, ``strict``
    how the model is exported; ``lower`` names a row of ``_quantizer_lowering.LOWERINGS``.
    """

    quantizer: str
    configuration: str
    make: Callable[[ModuleType], Any]
    bias: Literal["float", "int32", "int8", ""] = "float"
    folded: bool = True
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    strict: bool = False
    lower: str | None = None


def of(module: str, name: str) -> Any:
    """Returns a member of a module of ``executorch.backends``, imported when a row is used."""
    return getattr(importlib.import_module(BACKENDS + module), name)


def tosa_spec() -> Any:
    return of("arm.tosa.compile_spec", "TosaCompileSpec")("TOSA-1.0+INT")


def arm(kind: str, spec: Callable[[], Any]) -> Callable[[ModuleType], Any]:
    """Returns what makes an Arm quantizer with its symmetric configuration."""
    return lambda m: getattr(m, kind)(spec()).set_global(m.get_symmetric_quantization_config())


def a_piece_of(module: str, name: str, index: int, *arguments: Any) -> Any:
    """Returns one of the quantizers that a composed one consists of."""
    return of(module, name)(*arguments).quantizers[index]


def coreml_config() -> Any:
    import torch
    from coremltools.optimize.torch import quantization

    module = quantization.ModuleLinearQuantizerConfig(
        quantization_scheme="symmetric",
        activation_dtype=torch.quint8,
        weight_dtype=torch.qint8,
        weight_per_channel=True,
    )
    return quantization.LinearQuantizerConfig(global_config=module)


def cadence_pattern(m: ModuleType, name: str, config: str) -> Any:
    return m.CadenceAtenQuantizer(getattr(m, name)(), getattr(m, config))


def neutron_spec() -> Any:
    return of("nxp.backend.neutron_target_spec", "NeutronTargetSpec")("imxrt700")


def by_name(name: str) -> Callable[[ModuleType], Any]:
    """Returns what makes a class with no arguments."""
    return lambda m: getattr(m, name)()


POLICIES = (
    Policy(
        "XNNPACKQuantizer",
        "int8, per channel",
        lambda m: m.XNNPACKQuantizer().set_global(m.get_symmetric_quantization_config(is_per_channel=True)),
        lower="xnnpack",
    ),
    Policy(
        "XNNPACKQuantizer",
        "int8, per channel, dynamic",
        lambda m: m.XNNPACKQuantizer().set_global(
            m.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
        ),
        lower="xnnpack",
    ),
    Policy("TOSAQuantizer", "int8", arm("TOSAQuantizer", tosa_spec), bias="int32", lower="tosa"),
    Policy("_TOSAQuantizerV1", "int8", arm("_TOSAQuantizerV1", tosa_spec), bias="int32", lower="tosa"),
    Policy("_TOSAQuantizerV2", "int8", arm("_TOSAQuantizerV2", tosa_spec), bias="int32", lower="tosa"),
    Policy(
        "EthosUQuantizer",
        "int8, U55 with 128 MACs",
        arm("EthosUQuantizer", lambda: of("arm.ethosu", "EthosUCompileSpec")("ethos-u55-128")),
        bias="int32",
        lower="ethos-u",
    ),
    Policy(
        "VgfQuantizer",
        "int8",
        arm("VgfQuantizer", lambda: of("arm.vgf", "VgfCompileSpec")("TOSA-1.0+INT")),
        bias="int32",
        lower="vgf",
    ),
    Policy(
        "PatternQuantizer",
        "second piece of CortexMQuantizer",
        lambda m: a_piece_of("cortex_m.quantizer.quantizer", "CortexMQuantizer", 1),
        bias="int32",
        layout="channels_last",
    ),
    Policy("SharedQspecQuantizer", "alone", by_name("SharedQspecQuantizer"), bias=""),
    Policy(
        "CortexMQuantizer",
        "int8",
        by_name("CortexMQuantizer"),
        bias="int32",
        layout="channels_last",
        lower="cortex-m",
    ),
    Policy("CoreMLQuantizer", "static, quint8", lambda m: m.CoreMLQuantizer(coreml_config()), lower="coreml"),
    Policy(
        "VulkanQuantizer",
        "int8, dynamic",
        lambda m: m.VulkanQuantizer().set_global(m.get_symmetric_quantization_config(is_dynamic=True)),
        lower="vulkan",
    ),
    Policy(
        "VulkanQuantizer",
        "weights only",
        lambda m: m.VulkanQuantizer().set_global(m.get_symmetric_quantization_config()),
        lower="vulkan",
    ),
    Policy("OpenVINOQuantizer", "INT8_SYM", by_name("OpenVINOQuantizer"), folded=False, lower="openvino"),
    Policy("QnnQuantizer", "8a8w", by_name("QnnQuantizer"), bias="int32"),
    Policy("EnnQuantizer", "A8W8", by_name("EnnQuantizer"), folded=False),
    Policy("NeuropilotQuantizer", "A8W8", by_name("NeuropilotQuantizer")),
    Policy("NeutronQuantizer", "imxrt700", lambda m: m.NeutronQuantizer(neutron_spec()), bias="int32", strict=True),
    Policy(
        "NeutronAtenQuantizer",
        "last piece of NeutronQuantizer",
        lambda m: m.NeutronQuantizer(neutron_spec()).quantizers[-1],
        bias="int32",
        strict=True,
    ),
    Policy(
        "CadenceAtenQuantizer",
        "Conv2dPattern, A8W8sym",
        lambda m: cadence_pattern(m, "Conv2dPattern", "qconfig_A8W8sym"),
        bias="int32",
        strict=True,
    ),
    Policy(
        "CadenceQuantizer",
        "LinearPattern, A8W8",
        lambda m: m.CadenceQuantizer([cadence_pattern(m, "LinearPattern", "qconfig_A8W8")]),
        bias="int32",
        strict=True,
    ),
    *(
        Policy(name, configuration, by_name(name), bias=bias, strict=True)
        for name, configuration, bias in (
            ("CadenceDefaultQuantizer", "A8W8", "int32"),
            ("CadenceNopQuantizer", "nothing is quantized", ""),
            ("CadenceRmsNormNopQuantizer", "RMSNorm only", ""),
            ("CadenceWithLayerNormQuantizer", "A8W8", "int32"),
            ("CadenceWakeWordQuantizer", "A8W8", "int32"),
            ("CadenceFusedConvReluQuantizer", "A8W8", "int32"),
            ("CadenceW8A32MixedQuantizer", "A32W8", "int8"),
            ("CadenceWithSoftmaxQuantizer", "A8W8, A16 softmax", "int32"),
            ("CadenceWith16BitLinearActivationsQuantizer", "A16W8", "int32"),
            ("CadenceWith16BitConvActivationsQuantizer", "A16W8", "int32"),
            ("CadenceWith16BitMatmulActivationsQuantizer", "A16", ""),
        )
    ),
    Policy("ExampleQuantizer", "uint8", by_name("ExampleQuantizer")),
)
