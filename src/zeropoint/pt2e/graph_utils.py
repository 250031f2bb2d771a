"""Partitions and walks, as in ``torchao.quantization.pt2e.graph_utils``."""

from zeropoint.graph.chains import collect_producer_nodes
from zeropoint.graph.partitions import (
    SourcePartition,
    find_sequential_partitions,
    get_equivalent_types,
    get_source_partitions,
    update_equivalent_types_dict,
)
from zeropoint.graph.trace import bfs_trace_with_node_process

__all__ = [
    "SourcePartition",
    "bfs_trace_with_node_process",
    "collect_producer_nodes",
    "find_sequential_partitions",
    "get_equivalent_types",
    "get_source_partitions",
    "update_equivalent_types_dict",
]
