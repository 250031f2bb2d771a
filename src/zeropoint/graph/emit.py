"""Making nodes that carry the metadata of the node they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from zeropoint.graph.attributes import owner_and_name
from zeropoint.graph.compat import created_from, fake_mode_of

INHERITED = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "custom", "seq_nr", "partitioner_tag")
"""Metadata that a node passes on to the nodes that replace it."""


def inherit(node: Node, origin: Node, pass_name: str) -> None:
    """Gives the node the origin's place in the user's program, where it has none of its own."""
    for key in INHERITED:
        if key in origin.meta and key not in node.meta:
            node.meta[key] = origin.meta[key]
    node.meta.setdefault("from_node", created_from(origin, pass_name))


class Emitter:
    """Adds nodes before an anchor, with ``val`` computed and the anchor's metadata inherited."""

    def __init__(self, anchor: Node, pass_name: str) -> None:
        self.graph: Graph = anchor.graph
        self._anchor = anchor
        self._pass_name = pass_name
        self._mode = fake_mode_of(self.graph)

    @contextlib.contextmanager
    def _place(self) -> Generator[None]:
        with self.graph.inserting_before(self._anchor), self._mode or contextlib.nullcontext(), torch.no_grad():
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Returns a new ``call_function`` node; its ``val`` is what the target gives for its arguments' values."""
        with self._place():
            node = self.graph.call_function(target, args, kwargs)
            values, keywords = map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*values, **keywords)
        inherit(node, self._anchor, self._pass_name)
        return node


@torch.no_grad()
def complete_values(model: GraphModule) -> None:
    """Computes the ``val`` of tensors and calls that have none, as other packages leave theirs."""
    mode = fake_mode_of(model.graph)
    for node in model.graph.nodes:
        if "val" in node.meta:
            continue
        if node.op == "get_attr" and isinstance(tensor := _attribute(model, str(node.target)), torch.Tensor):
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
        elif node.op == "call_function":
            values, keywords = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode or contextlib.nullcontext():
                node.meta["val"] = node.target(*values, **keywords)


def _attribute(model: GraphModule, path: str) -> object:
    owner, name = owner_and_name(model, path)
    return getattr(owner, name, None)
