"""What quantizers and passes of other packages take from ``torchao.quantization.pt2e.qat_utils``."""

from torch.fx import GraphModule

from zeropoint.annotate.read import read_plan
from zeropoint.graph.capture import pattern_graph as _get_aten_graph_module_for_pattern
from zeropoint.graph.graph_pass import pipeline, recompile
from zeropoint.passes.end_training import end_training
from zeropoint.passes.qat_batch_norm import qat_batch_norm

__all__ = ["_fold_conv_bn_qat", "_fuse_conv_bn_qat", "_get_aten_graph_module_for_pattern"]


@pipeline
def _fuse_conv_bn_qat(m: GraphModule) -> GraphModule:
    """Returns the annotated graph, changed in place: layers with batch norm train the weight that they fold to."""
    qat_batch_norm(m, read_plan(m))
    recompile(m)
    return m


@pipeline
def _fold_conv_bn_qat(m: GraphModule) -> GraphModule:
    """Returns the trained graph, changed in place: batch norm folded, dropout ended. Before convert, not after it.

    Raises:
        GraphError: a node that ``_fuse_conv_bn_qat`` put in is no longer there.
    """
    end_training(m)
    recompile(m)
    return m
