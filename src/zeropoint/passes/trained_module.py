"""A graph prepared for training, as it is run.

In training the unscaling of each layer and its batch norm are one step; in eval mode it is what is converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode

from zeropoint.graph.bind import argument
from zeropoint.graph.explained import ExplainedModule
from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.numerics.unscaled_batch_norm import unscaled_batch_norm
from zeropoint.passes.form_in_use import Chain, chain_of, fold_in_use
from zeropoint.passes.qat_batch_norm import Role, groups_in

aten = torch.ops.aten


class TrainedModule(ExplainedModule):
    """Runs its graph with each group of ``qat_batch_norm`` in train mode as one call of ``unscaled_batch_norm``.

    In eval mode batch norm is folded, and biases are rounded, as ``convert_pt2e`` will do: ``fold_in_use``. The graph
    itself has the operators that programs look for, and that is what is copied and saved.
    """

    runs_otherwise_in_eval = True

    def recompile(self) -> PythonCode:
        """Brings ``forward`` up to date with the graph."""
        written = self._graph
        try:
            self.__dict__["_graph"] = written if self.__dict__.get("_as_written") else as_run(self)
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


def as_run(model: GraphModule) -> Graph:
    """Returns a copy of the graph in which each group is one call, or folded."""
    graph = model._graph
    copied = Graph(graph.owning_module, graph._tracer_cls)
    copied.output(copied.graph_copy(graph, {}, return_output_node=False))
    copied._codegen = graph._codegen
    for members in groups_in(copied):
        parts = _parts(members)
        if parts is not None:
            _join(members["norm"], *parts)
    if not model.training:
        fold_in_use(copied, model)
    remove_dead_code(copied)
    return copied


def _parts(members: dict[Role, Node]) -> Chain | None:
    """Returns the chain of a group in train mode that is whole."""
    chain = chain_of(members)
    return chain if chain is not None and argument(members["norm"], "training") else None


def _join(norm: Node, layer: Node, scale: Node, bias: Node | None) -> None:
    read = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "momentum", "eps")]
    with norm.graph.inserting_before(norm):
        result = norm.graph.call_function(unscaled_batch_norm, (layer, scale, bias, *read))
    result.meta = norm.meta
    norm.replace_all_uses_with(result)
    norm.graph.erase_node(norm)
