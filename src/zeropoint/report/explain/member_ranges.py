"""The smallest and largest value of chosen tensors of a graph, over batches of data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from zeropoint.core.errors import CalibrationError
from zeropoint.graph.copies import copy_graph
from zeropoint.graph.inputs import inputs_for
from zeropoint.graph.observers import observer_of

Ranges = dict[Node, tuple[float, float]]
"""Smallest and largest value of tensors, by the node that makes each."""


class _Measuring(Interpreter):
    """Runs a graph in float, past its observers, and keeps the range of some nodes."""

    def __init__(self, model: GraphModule, names: set[str]) -> None:
        super().__init__(model)
        self.names = names
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        """Returns what a node computes; an observer returns what it is given."""
        if observer_of(self.module, n) is not None:  # type: ignore[arg-type]
            return self.env[n.args[0]]  # type: ignore[index]
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, torch.Tensor) and value.numel() and value.is_floating_point():
            low, high = (float(end) for end in torch.aminmax(value))
            before = self.ranges.get(n.name, (low, high))
            self.ranges[n.name] = min(low, before[0]), max(high, before[1])
        return value


def measure(model: GraphModule, nodes: Iterable[Node], data: Iterable[Any]) -> Ranges:
    """Returns the smallest and largest float value of each node's tensor; those in bodies are left out.

    The model is run as it is in float: neither its buffers nor its observers change.

    Raises:
        CalibrationError: there is no data, or a batch does not fit the model.
    """
    named = {node.name: node for node in nodes if node.graph is model.graph}
    run = _Measuring(copy_graph(model), set(named))
    count = 0
    with torch.no_grad():
        for count, batch in enumerate(data, start=1):
            run.run(*inputs_for(model, batch, f"calibration batch {count - 1}"))
    if not count:
        raise CalibrationError("calibration_data is empty", where="explain", remedy="Give some batches of real data.")
    return {named[name]: ends for name, ends in run.ranges.items()}
