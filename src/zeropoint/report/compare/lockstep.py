"""Run a converted model in float and quantized at once, node by node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.compat import OpOverload
from zeropoint.graph.constants import constant_nodes, evaluate, mutated_attributes
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.schema import schema_of
from zeropoint.numerics import ops
from zeropoint.report.conversions import chooses_qparams, is_dequantize, is_quantize

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {aten.relu_.default: aten.relu.default, aten.hardtanh_.default: aten.hardtanh.default}
"""Activations that write to their input, which would take the gradient there away."""
Look = Callable[[Node, Any, Any, dict[Node, Any], dict[Node, Any]], None]
"""Called with a node, its float value, its quantized value, and the values of what it reads in either."""


class Lockstep:
    """A converted model, run in float and quantized on the same inputs.

    In float, a quantize and a dequantize return what they read, and constants are those of the float model. Buffers
    that the model writes to have a copy for each, which goes on from batch to batch.

    Args:
        model: converted, with quantize and dequantize operators.
        constants: the float tensors of its constants.
    """

    def __init__(self, model: GraphModule, constants: dict[Node, torch.Tensor]) -> None:
        self.model, self.constants = model, constants
        self.nodes = list(model.graph.nodes)
        self._dead = _last_reads(self.nodes)
        self._float_bodies = {name: _without_quantization(body) for name, body in bodies(model)}
        self._mutated = mutated_attributes(model.graph)
        self.known = self._fixed_values()
        self._fused = {node: grid for node in self.nodes if (grid := _grid_of_pair(node)) is not None}
        self._quantizes = frozenset(filter(is_quantize, self.nodes))
        self._dequantizes = frozenset(filter(is_dequantize, self.nodes))
        self._choosing = frozenset(filter(chooses_qparams, self.nodes))
        self.restart()

    @property
    def has_state(self) -> bool:
        """True when the model writes to buffers."""
        return bool(self._mutated)

    def restart(self) -> None:
        """Gives the buffers that the model writes to the values that they have in the model."""
        start = {path: get_attribute(self.model, path).detach() for path in self._mutated}
        self._buffers = tuple({path: value.clone() for path, value in start.items()} for _ in range(2))

    def run(self, inputs: tuple[Any, ...], look: Look, with_gradients: bool = False) -> tuple[Any, Any]:
        """Returns the outputs in float and quantized; ``look`` is called for each node in the order of the graph.

        Args:
            with_gradients: the float values can be differentiated.
        """
        leaves = iter(pytree.tree_leaves(inputs))
        floats: dict[Node, Any] = {}
        quantized: dict[Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                value = next(leaves)
                floats[node], quantized[node] = _input(value, with_gradients), _input(value, False)
            else:
                floats[node] = self._differentiated(node, floats) if with_gradients else self.float_value(node, floats)
                quantized[node] = self.quantized_value(node, quantized)
            look(node, floats[node], quantized[node], floats, quantized)
            if node.op == "output":
                break
            for dead in self._dead[node]:
                del floats[dead], quantized[dead]
        self._detach()
        return floats[self.nodes[-1]], quantized[self.nodes[-1]]

    @torch.enable_grad()
    def _differentiated(self, node: Node, values: dict[Node, Any]) -> Any:
        return self.float_value(node, values)

    def run_quantized(self, inputs: tuple[Any, ...], cure: Any = None) -> Any:
        """Returns the outputs of the quantized model.

        Args:
            cure: gives another value of a node, from the node and the values so far, or None.
        """
        leaves, values = iter(pytree.tree_leaves(inputs)), dict[Node, Any]()
        for node in self.nodes:
            other = cure(node, values) if cure is not None else None
            if other is not None:
                values[node] = other
            elif node.op == "placeholder":
                values[node] = _input(next(leaves), False)
            else:
                values[node] = self.quantized_value(node, values)
            for dead in self._dead[node]:
                del values[dead]
        return values[self.nodes[-1]]

    def quantized_value(self, node: Node, values: dict[Node, Any]) -> Any:
        """Returns what a node computes in the quantized model."""
        if node in self.known:
            return self.known[node]
        if node in self._fused or (node in self._dequantizes and node.args[0] in self._fused):
            return self.again(node, values[node.args[0]], values)  # type: ignore[index]
        if node.op == "get_attr":
            path = str(node.target)
            return self._buffers[1][path] if path in self._mutated else attribute(self.model, path)
        return _computed(self.model, node, values)

    def again(self, node: Node, value: torch.Tensor, values: dict[Node, Any]) -> torch.Tensor:
        """Returns what a quantize or dequantize gives for another first argument.

        A pair of one scale and zero point is computed at once: a quantize then gives what its dequantize does.
        """
        if node in self._fused:
            return _rounded(value, *self._fused[node])
        if node.args[0] in self._fused:
            return value
        args, kwargs = map_arg((node.args[1:], node.kwargs), lambda n: values[n])
        assert callable(node.target)
        return node.target(value, *args, **kwargs)

    def float_value(self, node: Node, values: dict[Node, Any]) -> Any:
        """Returns what a node computes in float."""
        if node.op == "get_attr":
            path = str(node.target)
            if path in self._mutated:
                return self._buffers[0][path]
            return self._float_bodies.get(path) or self.constant(node)
        if node in self._quantizes:
            source = values[node.args[0]]  # type: ignore[index]
            return source.view_as(source)  # Its own, so that the gradient is that of what reads these integers.
        if node in self._dequantizes:
            return values[node.args[0]]  # type: ignore[index]
        if node in self._choosing:
            return None
        if node.target is operator.getitem and values[node.args[0]] is None:  # type: ignore[index]
            return None
        return _computed(self.model, node, values, IN_PLACE.get(node.target, node.target))

    def _fixed_values(self) -> dict[Node, torch.Tensor]:
        """Returns the constants that are stored as integers, dequantized: once, not for each batch."""
        constants = constant_nodes(self.model)
        return {node: evaluate(self.model, node) for node in self.nodes if node in constants and is_dequantize(node)}

    def float_weight(self, site: Any) -> torch.Tensor:
        """Returns the float tensor of a site that is a constant."""
        found = self.constants.get(site.source)
        return evaluate(self.model, site.source) if found is None else found

    def constant(self, node: Node) -> Any:
        """Returns a constant of the float model; where that has none, of the converted one, dequantized."""
        if node in self.constants:
            return self.constants[node]
        return attribute(self.model, str(node.target))

    def _detach(self) -> None:
        for path in self._buffers[0]:
            self._buffers[0][path] = self._buffers[0][path].detach()


def _grid_of_pair(node: Node) -> tuple[float, int, int, int] | None:
    """Returns scale, zero point and limits of a quantize per tensor whose readers all undo it; None for another."""
    if node.target is not ops.QUANTIZE_PER_TENSOR or node.kwargs or len(node.args) < 6:
        return None
    scale, zero_point, low, high = node.args[1:5]
    value = node.all_input_nodes[0].meta.get("val")
    is_pair = all(
        user.target is ops.DEQUANTIZE_PER_TENSOR
        and user.args[1:] == node.args[1:]
        and not user.kwargs
        and all(isinstance(r.target, OpOverload) and schema_of(r.target).is_pure for r in user.users)
        for user in node.users
    )
    is_plain = getattr(value, "dtype", None) == torch.float32 and low <= zero_point <= high  # type: ignore[operator]
    return (scale, zero_point, low, high) if is_pair and is_plain else None  # type: ignore[return-value]


def _rounded(value: torch.Tensor, scale: float, zero_point: int, low: int, high: int) -> torch.Tensor:
    """Returns a tensor quantized and dequantized, in a fifth of the time of ``fake_quantize_per_tensor_affine``."""
    return (value * (1.0 / scale)).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)


def attribute(model: GraphModule, path: str) -> Any:
    """Returns a tensor without its gradient, or a submodule, by its path."""
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _computed(model: GraphModule, node: Node, values: dict[Node, Any], target: Any = None) -> Any:
    if node.op == "output":
        return map_arg(node.args[0], lambda n: values[n])
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    return (node.target if target is None else target)(*args, **kwargs)  # type: ignore[operator]


def _input(value: Any, with_gradient: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().clone()
    if with_gradient and value.is_floating_point():
        with torch.enable_grad():
            return value.requires_grad_().clone()  # Operators may write to it, which a leaf forbids.
    return value


def _last_reads(nodes: Collection[Node]) -> dict[Node, list[Node]]:
    """Returns for each node those that no later one reads."""
    seen, found = set[Node](), {node: list[Node]() for node in nodes}
    for node in reversed(list(nodes)):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                found[node].append(read)
        if node not in seen and node.op != "output":
            found[node].append(node)
    return found


def _without_quantization(body: GraphModule) -> GraphModule:
    """Returns a copy of a body of control flow in which nothing is rounded but its constants."""
    copied = deep_copy(body)
    for node in list(copied.graph.nodes):
        quantized = node.args[0] if is_dequantize(node) else None
        if isinstance(quantized, Node) and is_quantize(quantized):
            node.replace_all_uses_with(quantized.args[0])  # type: ignore[arg-type]
            copied.graph.erase_node(node)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied
