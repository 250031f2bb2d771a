"""Exported graphs inside of other modules: wrappers for training, compiled modules, modules of a user."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule


def graphs_within(model: nn.Module) -> list[GraphModule]:
    """Returns the outermost graph modules of a module, itself included; not the bodies of their control flow."""
    return list(_walk(model))


def _walk(module: nn.Module) -> Iterator[GraphModule]:
    if isinstance(module, GraphModule):
        yield module
        return
    for child in module.children():
        yield from _walk(child)
