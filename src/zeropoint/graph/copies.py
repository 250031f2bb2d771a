"""Copies of graphs that share weights, and the values that the buffers of a graph begin with."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from zeropoint.core.quiet import quiet_tree_specs
from zeropoint.graph.attributes import get_attribute, set_parameter
from zeropoint.graph.constants import mutated_attributes
from zeropoint.graph.graph_pass import bodies

T = TypeVar("T")


def copy_graph(model: GraphModule) -> GraphModule:
    """Returns the model with graphs of its own, the bodies of control flow too, and buffers of its own where it writes
    to them; other tensors are shared.
    """
    copied = GraphModule(model, deep_copy(model.graph))
    for path, body in list(bodies(model)):
        setattr(copied, path, copy_graph(body))
    for path in mutated_attributes(copied.graph):
        set_parameter(copied, path, get_attribute(copied, path).detach().clone())
    copied.meta.update(model.meta)
    return copied


def deep_copy(value: T) -> T:
    """Returns ``copy.deepcopy`` of a model or graph, without the warnings of torch's own tree specs."""
    with quiet_tree_specs():
        return copy.deepcopy(value)


def copied(value: Any) -> Any:
    """Returns a tensor of its own with the values of one, without its gradient; anything else as it is."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def restart(model: GraphModule, beginning: GraphModule) -> None:
    """Gives the buffers that the model writes to the values that they have in another one, which was not run yet."""
    for path in mutated_attributes(model.graph):
        set_parameter(model, path, get_attribute(beginning, path).detach().clone())
