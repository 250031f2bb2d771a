"""Run a graph and look at the values of some nodes on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

Look = Callable[[Node, torch.Tensor], None]


class _Watcher(Interpreter):
    def __init__(self, model: GraphModule, look: Look, nodes: set[Node]) -> None:
        super().__init__(model)
        self._look, self._nodes = look, nodes

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes and isinstance(value, torch.Tensor):
            self._look(n, value)
        return value


@torch.no_grad()
def watch(model: GraphModule, batches: Sequence[tuple[Any, ...]], nodes: Iterable[Node], look: Look) -> None:
    """Runs the graph on each batch and calls ``look(node, value)`` for each of the nodes; nothing is kept."""
    watcher = _Watcher(model, look, set(nodes))
    for inputs in batches:
        watcher.run(*pytree.tree_leaves(inputs), enable_io_processing=False)
