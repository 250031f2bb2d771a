"""zeropoint: quantize PyTorch models for edge devices."""

from zeropoint.algorithms.qat_schedule import QATSchedule
from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.annotate.embedding_quantizer import EmbeddingQuantizer
from zeropoint.annotate.for_torchao import for_torchao
from zeropoint.annotate.plan import Decision, Plan
from zeropoint.annotate.quantizer import ComposableQuantizer, Quantizer
from zeropoint.api import QuantizedModel, quantize
from zeropoint.benchmark import bench
from zeropoint.check_backend import check_backend
from zeropoint.core.configs import OperatorConfig, QuantizationConfig
from zeropoint.core.errors import ZeropointError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from zeropoint.graph.bind import Site
from zeropoint.graph.capture import capture
from zeropoint.numerics.quantized_tensor import QuantizedTensor
from zeropoint.report.backend_check import BackendCheck
from zeropoint.report.compare.compare import compare
from zeropoint.report.compare.site_table import Comparison
from zeropoint.report.explain.explain import explain
from zeropoint.report.explain.explanation import Explanation
from zeropoint.report.operator_table import summary
from zeropoint.report.speed.benchmark import Benchmark
from zeropoint.report.trained.check_convert import ConvertCheck, check_convert
from zeropoint.reporting import write_report
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__version__ = "0.1.0"

__all__ = [
    "BackendCheck",
    "Benchmark",
    "Comparison",
    "ComposableQuantizer",
    "ConvertCheck",
    "Decision",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "EmbeddingQuantizer",
    "Explanation",
    "FixedQParamsQuantizationSpec",
    "OperatorConfig",
    "Plan",
    "QATSchedule",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "QuantizedModel",
    "QuantizedTensor",
    "Quantizer",
    "SharedQuantizationSpec",
    "Site",
    "ZeropointError",
    "bench",
    "capture",
    "check_backend",
    "check_convert",
    "compare",
    "convert_pt2e",
    "explain",
    "for_torchao",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "quantize",
    "summary",
    "write_report",
]
