"""The annotation API, as in ``torchao.quantization.pt2e.quantizer``."""

from zeropoint.annotate.annotation import (
    QuantizationAnnotation,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_weight_qspec,
    is_valid_annotation,
)
from zeropoint.annotate.quantizer import ComposableQuantizer, Quantizer
from zeropoint.core.configs import OperatorConfig, OperatorPatternType, QuantizationConfig
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)

__all__ = [
    "ComposableQuantizer",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "OperatorConfig",
    "OperatorPatternType",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "get_bias_qspec",
    "get_input_act_qspec",
    "get_output_act_qspec",
    "get_weight_qspec",
    "is_valid_annotation",
]
