"""Calls of observers and fake quantizers in a graph, of any package: known by what they can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.graph.graph_pass import bodies


def observer_of(model: GraphModule, node: Node) -> Any:
    """Returns the observer or fake quantizer that a node calls; None where it calls none."""
    if node.op != "call_module":
        return None
    path = str(node.target)
    module = model._modules.get(path) or model.get_submodule(path)
    return module if hasattr(module, "calculate_qparams") else None


def calls_observer(node: Any, named_modules: Mapping[str, nn.Module]) -> bool:
    """True for a node that calls an observer or fake quantizer, among the modules by path."""
    if not isinstance(node, Node) or node.op != "call_module":
        return False
    return hasattr(named_modules[str(node.target)], "calculate_qparams")


def has_observers(model: GraphModule) -> bool:
    """True when the model calls an observer, in the bodies of its control flow too."""
    if any(observer_of(model, node) is not None for node in model.graph.nodes):
        return True
    return any(has_observers(body) for _, body in bodies(model))


def is_fake_quantizer(observer: Any) -> bool:
    """True for a fake quantizer."""
    return hasattr(observer, "fake_quant_enabled")
