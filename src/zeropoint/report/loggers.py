"""Record what the nodes of a model compute, each under the node of the exported program that it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.core.errors import CaptureError
from zeropoint.graph.attributes import Names
from zeropoint.graph.compat import is_tensor_list, is_tensor_value
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.origin import NodeSourceDebugInfo, debug_info
from zeropoint.numerics import ops

Recording = tuple[str | None, object, list[object]]
"""Name of a node, the modules around it, and what it computed, one value for each run."""


class OutputLogger(nn.Module):
    """Records what passes through it, and returns it as it is.

    Args:
        debug_info: the node of the exported program.
        node_name: the node of this model.
        nn_module_stack: its metadata of that name.
    """

    _is_impure = True
    """Keeps it where nothing reads what it returns."""

    def __init__(
        self, debug_info: NodeSourceDebugInfo, node_name: str | None = None, nn_module_stack: object = None
    ) -> None:
        super().__init__()
        self.debug_info = debug_info
        self.node_name = node_name
        self.nn_module_stack = nn_module_stack
        self.stats: list[object] = []

    def forward(self, x: object) -> object:
        """Records a copy: operators that come later may write to the tensor."""
        self.stats.append(copied(x))
        return x

    def extra_repr(self) -> str:
        """Returns what it records, and how often it has."""
        return f"{self.debug_info}, node_name={self.node_name}, runs={len(self.stats)}"


def copied(value: Any) -> Any:
    """Returns a copy of the tensors of a value, without their gradients' history."""
    match value:
        case torch.Tensor():
            return value.detach().clone()
        case dict():
            return {key: copied(item) for key, item in value.items()}
        case list() | tuple():
            return like(value, [copied(item) for item in value])
        case _:
            return value


def like(sequence: Any, items: list[Any]) -> Any:
    """Returns the items as a sequence of the same type."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def prepare_for_propagation_comparison(model: GraphModule) -> GraphModule:
    """Returns a copy of a model that records what its nodes compute.

    Each node of the exported program is recorded once, at the last node that comes from it: after its observer, or
    quantized and dequantized. Integers between quantize and dequantize are not recorded, nor are parameters. A batch
    norm that was folded is recorded at the layer that computes it.

    Args:
        model: exported, prepared or converted.

    Raises:
        CaptureError: it is no graph module, or its nodes do not say where they come from.
    """
    if not isinstance(model, GraphModule):
        remedy = "Export it: torch.export.export(model, example_inputs).module()."
        raise CaptureError(f"got {type(model).__name__}, not a graph module", remedy=remedy)
    logged = deep_copy(model)
    names = Names(logged)
    sites = recorded_nodes(logged)
    if not sites:
        remedy = "Give the result of torch.export.export(...).module(), or what was made of it."
        raise CaptureError("its nodes do not say which node of an exported program they come from", remedy=remedy)
    for info, node in sites.items():
        logger = OutputLogger(info, node.name, _dequantized(node).meta.get("nn_module_stack"))
        _insert(logged, node, names.new(f"{node.name}_logger"), logger)
    logged.recompile()
    return logged


def recorded_nodes(model: GraphModule) -> dict[NodeSourceDebugInfo, Node]:
    """Returns the last node that comes from each node of the exported program, in the order of the graph."""
    found: dict[NodeSourceDebugInfo, Node] = {}
    for node in model.graph.nodes:
        source = _dequantized(node)
        info = debug_info(source)
        if info is not None and source.op != "get_attr" and _holds_real_values(node):
            found.pop(info, None)
            found[info] = node
    return found


def _holds_real_values(node: Node) -> bool:
    if node.target in (*ops.QUANTIZE_OPS, *ops.CHOOSE_QPARAMS_OPS):
        return False
    value = node.meta.get("val")
    return "val" not in node.meta or is_tensor_value(value) or is_tensor_list(value)


def _dequantized(node: Node) -> Node:
    """Returns what a dequantize gives back: torchao and we say differently where a dequantize comes from.

    That of a parameter gives its node, which is recorded nowhere.
    """
    while node.target in ops.DEQUANTIZE_OPS:
        quantized = node.args[0]
        assert isinstance(quantized, Node)
        if quantized.target not in ops.QUANTIZE_OPS:
            return quantized
        node = quantized.all_input_nodes[0]
    return node


def _insert(model: GraphModule, node: Node, name: str, logger: OutputLogger) -> None:
    model.add_submodule(name, logger)
    with model.graph.inserting_after(node):
        call = model.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, lambda reader: reader is not call)
    if "val" in node.meta:
        call.meta["val"] = node.meta["val"]


def extract_results_from_loggers(model: GraphModule) -> dict[NodeSourceDebugInfo, Recording]:
    """Returns what a model of ``prepare_for_propagation_comparison`` recorded, by the node of the exported program."""
    loggers = [each for each in model.children() if isinstance(each, OutputLogger) and each.stats]
    return {each.debug_info: (each.node_name, each.nn_module_stack, each.stats) for each in loggers}
