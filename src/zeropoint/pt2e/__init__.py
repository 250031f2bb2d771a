"""The names of ``torchao.quantization.pt2e`` where programs look for them: change the import, keep the program."""

from zeropoint.graph.capture import WrapperModule
from zeropoint.graph.origin import FROM_NODE_KEY
from zeropoint.graph.partitions import (
    find_sequential_partitions,
    get_equivalent_types,
    update_equivalent_types_dict,
)
from zeropoint.graph.trace import bfs_trace_with_node_process
from zeropoint.graph.train_eval import (
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from zeropoint.numerics.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    default_dynamic_fake_quant,
    default_fake_quant,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from zeropoint.numerics.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    get_block_size,
)
from zeropoint.numerics.learnable_fake_quantize import (
    LearnableFakeQuantize,
    disable_range_learning,
    enable_range_learning,
)
from zeropoint.numerics.mapping import MappingType, TorchAODType, ZeroPointDomain
from zeropoint.numerics.observers import (
    AffineQuantizedObserverBase,
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    ObserverBase,
    PartialWrapper,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
    UniformQuantizationObserverBase,
)
from zeropoint.numerics.observers.derived import (
    DerivedObserverOrFakeQuantize,
    ObserverOrFakeQuantize,
    ObserverOrFakeQuantizeConstructor,
)
from zeropoint.pt2e import fake_quantize, observer, quantize_pt2e, quantizer
from zeropoint.report.comparison import compare_results
from zeropoint.report.debug_handles import CUSTOM_KEY, NUMERIC_DEBUG_HANDLE_KEY, generate_numeric_debug_handle
from zeropoint.report.loggers import extract_results_from_loggers, prepare_for_propagation_comparison
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__all__ = [
    "CUSTOM_KEY",
    "FROM_NODE_KEY",
    "NUMERIC_DEBUG_HANDLE_KEY",
    "AffineQuantizedObserverBase",
    "DerivedObserverOrFakeQuantize",
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FixedQParamsObserver",
    "FusedMovingAvgObsFakeQuantize",
    "Granularity",
    "HistogramObserver",
    "LearnableFakeQuantize",
    "MappingType",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "ObserverOrFakeQuantize",
    "ObserverOrFakeQuantizeConstructor",
    "PartialWrapper",
    "PerAxis",
    "PerBlock",
    "PerChannelMinMaxObserver",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "TorchAODType",
    "UniformQuantizationObserverBase",
    "WrapperModule",
    "ZeroPointDomain",
    "allow_exported_model_train_eval",
    "bfs_trace_with_node_process",
    "compare_results",
    "convert_pt2e",
    "default_dynamic_fake_quant",
    "default_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "extract_results_from_loggers",
    "fake_quantize",
    "find_sequential_partitions",
    "generate_numeric_debug_handle",
    "get_block_size",
    "get_equivalent_types",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "observer",
    "prepare_for_propagation_comparison",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "quantize_pt2e",
    "quantizer",
    "update_equivalent_types_dict",
]
