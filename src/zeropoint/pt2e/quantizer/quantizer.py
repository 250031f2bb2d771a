"""Quantizers and specs, as in ``torchao.quantization.pt2e.quantizer.quantizer``."""

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, QuantizationAnnotation
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)

__all__ = [
    "Q_ANNOTATION_KEY",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
]
