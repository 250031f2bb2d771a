"""Move a graph to another device: its tensors, the devices that are written in it, and what its metadata says.

Export writes the device of the example inputs into ``torch.zeros``, ``torch.arange`` and ``x.to(device)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from zeropoint.core.errors import GraphError
from zeropoint.core.policy import RECORD_KEY
from zeropoint.graph.attributes import owner_and_name
from zeropoint.graph.compat import fake_on
from zeropoint.graph.observers import has_observers
from zeropoint.numerics import ops

Move = Callable[[torch.Tensor], torch.Tensor]
"""What ``nn.Module._apply`` is given: the new tensor for an old one."""
META = torch.device("meta")
CPU = torch.device("cpu")


def check_types_stay(graphs: Iterable[GraphModule], move: Move) -> None:
    """Raises when a move changes the type of the tensors of a quantized graph, such as ``half()``.

    Raises:
        GraphError: says from which type to which.
    """
    for model in graphs:
        if not _is_quantized(model):
            continue
        for dtype, device in {(t.dtype, t.device) for t in _tensors(model) if t.is_floating_point()}:
            moved = move(torch.empty(0, dtype=dtype, device=device)).dtype
            if moved != dtype:
                what = (
                    f"the graph is quantized, and its scales and float operators are of {dtype}; it cannot be {moved}"
                )
                remedy = f"Make the model {moved} before it is exported; .to(device) moves a graph that is quantized."
                raise GraphError(what, where="to", remedy=remedy)


def device_of(model: GraphModule) -> torch.device | None:
    """Returns the device that all tensors of a graph module are on; None where there are several, or no tensors."""
    devices = {tensor.device for tensor in _tensors(model)}
    return devices.pop() if len(devices) == 1 else None


def destination(move: Move) -> torch.device | None:
    """Returns where a move puts any tensor; None where each stays: found with tensors of no values.

    What goes to the CPU is told from what stays by a tensor of the meta device, which cannot be copied.
    """
    moved = move(torch.empty(0, device=CPU)).device
    if moved != CPU:
        return moved
    try:
        return None if move(torch.empty(0, device=META)).device == META else CPU
    except NotImplementedError:
        return CPU


def move_attributes(model: GraphModule, move: Move) -> None:
    """Moves the tensors that one graph reads and that are neither parameters nor buffers: constants of an export."""
    for path in {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}:
        owner, name = owner_and_name(model, path)
        if isinstance(value := vars(owner).get(name), torch.Tensor):
            setattr(owner, name, move(value))


def write_device(model: GraphModule, device: torch.device) -> None:
    """Changes the devices that are written in one graph, without its bodies, and in its metadata.

    A tensor that the program moved to one device is moved to this one too: export does not tell the two apart.
    """
    is_changed = False
    known: dict[int, torch.Tensor] = {}
    for node in model.graph.nodes:
        args, kwargs = (_with_device(each, device) for each in (node.args, node.kwargs))
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, is_changed = args, kwargs, True
        if device != META and "val" in node.meta:  # Fake tensors are of no device without memory.
            node.meta["val"] = pytree.tree_map_only(torch.Tensor, lambda t: _on(t, device, known), node.meta["val"])
    if is_changed:
        model.recompile()


def _with_device(arguments: Any, device: torch.device) -> Any:
    return map_aggregate(arguments, lambda value: device if isinstance(value, torch.device) else value)


def _on(value: torch.Tensor, device: torch.device, known: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(value) not in known:
        known[id(value)] = fake_on(value, device)
    return known[id(value)]


def _is_quantized(model: GraphModule) -> bool:
    if has_observers(model):
        return True
    if getattr(model.meta.get(RECORD_KEY), "representation", None) == "reference":
        return True
    return any(node.target in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS) for node in model.graph.nodes)


def _tensors(model: GraphModule) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
