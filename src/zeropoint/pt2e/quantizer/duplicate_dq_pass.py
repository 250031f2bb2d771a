"""A dequantize operator for each annotated reader, in graphs that others made: ``convert_pt2e`` gives each its own."""

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, is_valid_annotation
from zeropoint.graph.graph_pass import recompile, remove_dead_code
from zeropoint.numerics import ops
from zeropoint.pt2e.utils import _filter_sym_size_users

__all__ = ["DuplicateDQPass"]


class DuplicateDQPass(PassBase):
    """Copies each dequantize operator for every annotated node that reads it; the others go on sharing the first.

    One whose scale is found at run time stays shared.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph = graph_module.graph
        for node in list(graph.nodes):
            readers = _filter_sym_size_users(node) if node.target in ops.DEQUANTIZE_OPS else []
            if len(readers) < 2 or _is_dynamic(node):
                continue
            for reader in readers:
                if not is_valid_annotation(reader.meta.get(Q_ANNOTATION_KEY)):
                    continue
                with graph.inserting_after(node):
                    own = graph.node_copy(node)
                reader.replace_input_with(node, own)
        remove_dead_code(graph)
        recompile(graph_module)
        return PassResult(graph_module, True)


def _is_dynamic(dequantize: Node) -> bool:
    behind = (read for scale in dequantize.all_input_nodes[1:] for read in scale.all_input_nodes)
    return any(read.target in ops.CHOOSE_QPARAMS_OPS for read in behind)
