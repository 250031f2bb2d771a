"""A graph in training, as it is run: the unscaling of each layer and its batch norm are one step."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph import PythonCode

from zeropoint.graph.bind import argument
from zeropoint.graph.explained import ExplainedModule
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.numerics.unscaled_batch_norm import unscaled_batch_norm
from zeropoint.passes.qat_batch_norm import Role, groups_in

aten = torch.ops.aten


class TrainedModule(ExplainedModule):
    """Runs its graph with each group of ``qat_batch_norm`` in train mode as one call of ``unscaled_batch_norm``.

    The graph itself has the operators that programs look for, and that is what is copied, saved and interpreted.
    """

    def recompile(self) -> PythonCode:
        """Brings ``forward`` up to date with the graph."""
        written = self._graph
        try:
            self.__dict__["_graph"] = written if self.__dict__.get("_as_written") else joined(written)
            return super().recompile()
        finally:
            self.__dict__["_graph"] = written

    def __reduce__(self) -> tuple[Any, ...]:
        self.__dict__["_as_written"] = True
        try:
            self.recompile()
            kind, arguments = super().__reduce__()
        finally:
            del self.__dict__["_as_written"]
            self.recompile()
        arguments[2][0].pop("_as_written")
        return kind, arguments


def joined(graph: Graph) -> Graph:
    """Returns a copy of the graph in which each group is one call; the graph itself where it has none."""
    if not any(_parts(members) for members in groups_in(graph)):
        return graph
    copied = Graph(graph.owning_module, graph._tracer_cls)
    copied.output(copied.graph_copy(graph, {}, return_output_node=False))
    copied._codegen = graph._codegen
    for members in groups_in(copied):
        parts = _parts(members)
        if parts is not None:
            _join(members["norm"], *parts)
    remove_dead_code(copied)
    return copied


def _parts(members: dict[Role, Node]) -> tuple[Node, Node, Node | None] | None:
    """Returns what is divided, by what, and the bias that is added, of a group in train mode that is whole."""
    output, norm = members.get("output"), members.get("norm")
    if output is None or norm is None or norm.target is not aten.batch_norm.default:
        return None
    if not argument(norm, "training") or argument(norm, "input") is not output:
        return None
    bias = None
    if output.target is aten.add.Tensor:
        output, added = output.args
        bias = _per_channel(added)
        if bias is None:
            return None
    if not isinstance(output, Node) or output.target is not aten.div.Tensor:
        return None
    scale = _per_channel(output.args[1])
    layer = output.args[0]
    if scale is None or not isinstance(layer, Node) or layer is not members.get("layer"):
        return None
    return layer, scale, bias


def _per_channel(node: Any) -> Node | None:
    """Returns the vector that is seen as one value for each index of the second axis."""
    if not isinstance(node, Node) or node.target is not aten.reshape.default:
        return None
    vector, shape = node.args
    is_second = isinstance(shape, (list, tuple)) and list(shape) == [1, -1, *[1] * (len(shape) - 2)]
    return vector if is_second and isinstance(vector, Node) else None


def _join(norm: Node, layer: Node, scale: Node, bias: Node | None) -> None:
    read = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "momentum", "eps")]
    with norm.graph.inserting_before(norm):
        result = norm.graph.call_function(unscaled_batch_norm, (layer, scale, bias, *read))
    result.meta = norm.meta
    norm.replace_all_uses_with(result)
    norm.graph.erase_node(norm)
