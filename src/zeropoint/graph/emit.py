"""Making nodes that carry the metadata of the node they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from zeropoint.graph.attributes import owner_and_name
from zeropoint.graph.compat import OpOverload, as_in_export, created_from, fake_like, fake_mode_of
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import EXPORTED_KEY

INHERITED = (
    "debug_handle",
    "quantization_tag",
    "nn_module_stack",
    "source_fn_stack",
    "stack_trace",
    "torch_fn",
    "custom",
    "seq_nr",
    "partitioner_tag",
    EXPORTED_KEY,
)
"""Metadata that a node passes on to the nodes that replace it."""
MADE_BY = ("source_fn_stack", "torch_fn", "nn_module_stack")
"""Of it, the function or module whose operators ``get_source_partitions`` takes for its pattern."""
PLACE = tuple(key for key in INHERITED if key not in MADE_BY)


def inherit(node: Node, origin: Node, pass_name: str, keys: tuple[str, ...] = INHERITED) -> None:
    """Gives the node the origin's place in the user's program, where it has none of its own."""
    for key in keys:
        if key in origin.meta and key not in node.meta:
            node.meta[key] = origin.meta[key]
    if "from_node" not in node.meta:
        node.meta["from_node"] = created_from(origin, pass_name)


def inherit_place(node: Node, origin: Node, pass_name: str) -> None:
    """Gives a node that stands before or after the origin its line of the user's program, not its function and module.

    Passes of backends take all operators of a function for its pattern, and would find these in it.
    """
    inherit(node, origin, pass_name, PLACE)


class Fakes:
    """Fake tensors for metadata, one for each size and type: making one takes as long as making a node."""

    def __init__(self) -> None:
        self._made: dict[object, torch.Tensor] = {}

    def like(self, value: torch.Tensor, shape: torch.Size | None = None, dtype: Any = None) -> torch.Tensor:
        """Returns what ``fake_like`` does; a free size is made anew each time."""
        sizes = tuple(value.shape if shape is None else shape)
        stride = value.stride() if shape is None else None
        if not all(isinstance(size, int) for size in sizes):
            return fake_like(value, shape, dtype)
        key = (sizes, stride, value.dtype if dtype is None else dtype, value.device)
        if key not in self._made:
            self._made[key] = fake_like(value, shape, dtype)
        return self._made[key]


class Emitter:
    """Adds nodes before an anchor, with ``val`` computed and the anchor's metadata inherited.

    Args:
        anchor: the node before which nodes are added, and whose place in the user's program they inherit.
        pass_name: recorded in their ``from_node``.
        known: values found so far, by call; give one dictionary to the emitters of a pass, and equal calls on tensors
            of equal sizes are computed once.
    """

    def __init__(self, anchor: Node, pass_name: str, known: dict[object, Any] | None = None) -> None:
        self._known = {} if known is None else known
        self.graph: Graph = anchor.graph
        self._anchor = anchor
        self._pass_name = pass_name
        self._mode = fake_mode_of(self.graph)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Returns a new ``call_function`` node; its ``val`` is what the target gives for its arguments' values."""
        with self.graph.inserting_before(self._anchor):
            node = self.graph.call_function(target, args, kwargs)
        values, keywords = map_arg((args, kwargs), lambda n: n.meta["val"])
        key = (target, _signature((values, keywords)))
        if key not in self._known:
            with as_in_export(self._mode), torch.no_grad():
                self._known[key] = target(*values, **keywords)
        node.meta["val"] = self._known[key]
        inherit(node, self._anchor, self._pass_name)
        return node


def _signature(value: Any) -> object:
    """Returns what the result's size and type depend on; what has a free size is equal to nothing else."""
    match value:
        case torch.Tensor() if all(isinstance(size, int) for size in value.shape):
            return (tuple(value.shape), value.stride(), value.dtype, value.device)
        case list() | tuple():
            return tuple(_signature(item) for item in value)
        case dict():
            return tuple((name, _signature(item)) for name, item in value.items())
        case None | bool() | int() | float() | str() | torch.dtype() | torch.device() | OpOverload():
            return (type(value), value)
        case _:
            return object()


@torch.no_grad()
def complete_values(model: GraphModule) -> None:
    """Computes the ``val`` of tensors and calls that have none, as other packages leave theirs; in bodies too."""
    for _, body in bodies(model):
        complete_values(body)
    mode = fake_mode_of(model.graph)
    for node in model.graph.nodes:
        if "val" in node.meta:
            continue
        if node.op == "get_attr" and isinstance(tensor := _attribute(model, str(node.target)), torch.Tensor):
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
        elif node.op == "call_function":
            values, keywords = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with as_in_export(mode):
                node.meta["val"] = node.target(*values, **keywords)


def _attribute(model: GraphModule, path: str) -> object:
    owner, name = owner_and_name(model, path)
    return getattr(owner, name, None)
