"""The numeric debugger, as in ``torchao.quantization.pt2e._numeric_debugger``."""

from zeropoint.graph.origin import FROM_NODE_KEY, NodeSourceDebugInfo
from zeropoint.graph.origin import debug_info as _extract_node_source_debug_info
from zeropoint.report.comparison import NodeAccuracySummary, QuantizationComparisonResult, compare_results
from zeropoint.report.debug_handles import CUSTOM_KEY, NUMERIC_DEBUG_HANDLE_KEY, generate_numeric_debug_handle
from zeropoint.report.loggers import OutputLogger, extract_results_from_loggers, prepare_for_propagation_comparison

__all__ = [
    "CUSTOM_KEY",
    "FROM_NODE_KEY",
    "NUMERIC_DEBUG_HANDLE_KEY",
    "NodeAccuracySummary",
    "NodeSourceDebugInfo",
    "OutputLogger",
    "QuantizationComparisonResult",
    "_extract_node_source_debug_info",
    "compare_results",
    "extract_results_from_loggers",
    "generate_numeric_debug_handle",
    "prepare_for_propagation_comparison",
]
