"""The annotation API, as in ``torchao.quantization.pt2e.quantizer``."""

from zeropoint.annotate.annotation import (
    QuantizationAnnotation,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_module_name_filter,
    get_output_act_qspec,
    get_weight_qspec,
    is_valid_annotation,
)
from zeropoint.annotate.embedding_quantizer import EmbeddingQuantizer
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
from zeropoint.pt2e.quantizer import composable_quantizer, embedding_quantizer, quantizer, utils
from zeropoint.pt2e.quantizer.duplicate_dq_pass import DuplicateDQPass
from zeropoint.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ

__all__ = [
    "ComposableQuantizer",
    "DerivedQuantizationSpec",
    "DuplicateDQPass",
    "EdgeOrNode",
    "EmbeddingQuantizer",
    "FixedQParamsQuantizationSpec",
    "OperatorConfig",
    "OperatorPatternType",
    "PortNodeMetaForQDQ",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "composable_quantizer",
    "embedding_quantizer",
    "get_bias_qspec",
    "get_input_act_qspec",
    "get_module_name_filter",
    "get_output_act_qspec",
    "get_weight_qspec",
    "is_valid_annotation",
    "quantizer",
    "utils",
]
