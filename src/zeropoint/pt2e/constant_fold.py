"""Constants computed once, in graphs that others made; ``convert_pt2e`` folds what it quantizes."""

from collections.abc import Callable

from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import Names, attribute_reads, owner_and_name
from zeropoint.graph.constants import constant_nodes, evaluate
from zeropoint.graph.graph_pass import recompile, remove_dead_code
from zeropoint.numerics import ops

__all__ = ["constant_fold"]


def constant_fold(gm: GraphModule, constraint_fn: Callable[[Node], bool] | None = None) -> None:
    """Replaces the operators that compute with constants alone by buffers ``_frozen_paramN``, in place.

    What dequantize operators give stays computed, so that weights stay integers. Tensors that nothing reads afterwards
    are dropped.

    Args:
        gm: any graph module.
        constraint_fn: says of an operator whether it may be replaced; None: each may.
    """
    graph, names = gm.graph, Names(gm)
    for node in _foldable(gm):
        if not node.users or (constraint_fn is not None and not constraint_fn(node)):
            continue
        path = names.new("_frozen_param")
        gm.register_buffer(path, evaluate(gm, node))
        with graph.inserting_before(node):
            frozen = graph.get_attr(path)
        frozen.meta = dict(node.meta)
        node.replace_all_uses_with(frozen)
        graph.erase_node(node)
    _drop_unread(gm)
    recompile(gm)


def _foldable(gm: GraphModule) -> list[Node]:
    """Returns the operators that read constants alone, the last of a chain first."""
    constants = constant_nodes(gm)
    folded: list[Node] = []
    stays: set[Node] = set()
    for node in gm.graph.nodes:
        if node not in constants or node.op == "get_attr":
            continue
        if node.target in ops.DEQUANTIZE_OPS or any(read in stays for read in node.all_input_nodes):
            stays.add(node)
        else:
            folded.append(node)
    return folded[::-1]


def _drop_unread(gm: GraphModule) -> None:
    """Removes dead operators, and the tensors of which no node is left."""
    before = {str(node.target) for node in attribute_reads(gm.graph)}
    remove_dead_code(gm.graph)
    after = {str(node.target) for node in attribute_reads(gm.graph)}
    for path in before - after:
        owner, name = owner_and_name(gm, path)
        delattr(owner, name)
