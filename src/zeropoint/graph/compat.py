"""Private torch names, all of them, and the torch versions that have them. No other file imports one.

| name | where | versions |
|---|---|---|
| FakeTensor | torch._subclasses.fake_tensor | 2.0 to 2.13 |
| OpOverload, HigherOrderOperator | torch._ops | 2.0 to 2.13 |
| NodeSource, NodeSourceAction | torch.fx.traceback | 2.6 to 2.13 |
| detect_fake_mode | torch._guards | 2.1 to 2.13 |
"""

from __future__ import annotations

import torch
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

__all__ = ["FakeTensor", "HigherOrderOperator", "OpOverload", "created_from", "fake_mode_of"]


def created_from(node: Node, pass_name: str) -> list[NodeSource]:
    """Returns the ``from_node`` metadata of a node that ``pass_name`` creates on behalf of ``node``."""
    return [NodeSource(node, pass_name, [NodeSourceAction.CREATE])]


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """Returns the mode of the first fake tensor in the graph's ``val`` metadata; None when there is none."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return detect_fake_mode([node.meta["val"]])
    return None


def is_tensor_value(value: object) -> bool:
    """True when ``val`` metadata describes one tensor (not a list of tensors, not a number)."""
    return isinstance(value, torch.Tensor)
