"""How far a model's own outputs move when the last bit of each float value changes.

A file adds in another order than PyTorch, so its float values differ in their last bits. Where scales are chosen at run
time, a value near the middle of two steps is then rounded to the other one; the whole row after it moves, and in a deep
model the next layers round more values differently. No file agrees better than the model agrees with itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.graph.constants import mutated_attributes

RUNS = 2
LAST_BIT = torch.finfo(torch.float32).eps


class _Shaken(fx.Interpreter):
    """Runs a graph; each float tensor that an operator returns is changed by -1, 0 or 1 of its last bit."""

    def __init__(self, model: GraphModule, seed: int) -> None:
        super().__init__(model)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function" or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        change = torch.randint(-1, 2, result.shape, generator=self.generator).to(result.device)
        return (result * (1 + LAST_BIT * change)).to(result.dtype)


@torch.no_grad()
def shaken(model: GraphModule, inputs: tuple[Any, ...]) -> list[list[Any]]:
    """Returns the outputs of the model in runs whose float values were changed in their last bits.

    None for a model that writes to buffers: another run of it is of another state.
    """
    if mutated_attributes(model.graph):
        return []
    return [pytree.tree_leaves(_Shaken(model, seed).run(*inputs)) for seed in range(RUNS)]
