"""What each constant of a converted model was in the float model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from zeropoint.core.errors import ComparisonError
from zeropoint.core.policy import EQUALIZED_KEY
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.bind import Site, bind, reads
from zeropoint.graph.constants import FLOAT_PATH_KEY, constant_nodes, evaluate, mutated_attributes
from zeropoint.graph.control_flow import is_control_flow
from zeropoint.graph.copies import copy_graph, deep_copy
from zeropoint.graph.layers import scale_inputs, scale_outputs
from zeropoint.graph.source import describe
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.fold_batch_norm import fold_batch_norm
from zeropoint.report.conversions import is_dequantize, is_quantize

WHERE = "compare"


def folded(float_model: GraphModule) -> GraphModule:
    """Returns the float model with the graph that prepare makes of it; parameters are shared."""
    model = copy_graph(float_model)
    canonicalize(model)
    fold_batch_norm(model)
    model.recompile()
    return model


def with_values(model: GraphModule, inputs: tuple[Any, ...]) -> GraphModule:
    """Returns the model, or a copy where nodes have no example value: torchao's convert gives what it inserts none."""
    if all("val" in node.meta for node in model.graph.nodes if node.op == "call_function"):
        return model
    copied = deep_copy(model)
    start = {path: get_attribute(copied, path).clone() for path in mutated_attributes(copied.graph)}
    with torch.no_grad():
        _Recorder(copied).run(*pytree.tree_leaves(pytree.tree_map_only(torch.Tensor, torch.clone, inputs)))
        for path, value in start.items():
            get_attribute(copied, path).copy_(value)
    return copied


class _Recorder(Interpreter):
    """Gives each node that has no example value one of the shape and dtype that it computes."""

    def run_node(self, n: Node) -> Any:
        """Runs a node."""
        found = super().run_node(n)
        if isinstance(found, torch.Tensor):
            n.meta.setdefault("val", torch.empty_like(found, device="meta"))
        return found


def float_constants(converted: GraphModule, reference: GraphModule) -> dict[Node, torch.Tensor]:
    """Returns the float tensor behind each constant of a converted model that compute nodes read.

    A constant is found by what reads it: the node of the same name and operator in ``reference``, the graph that
    ``folded`` returns, and the argument there. What equalization did to the two layers of a pair is done to it too.

    Raises:
        ComparisonError: a quantized constant is not in the float model, or is there in another shape.
    """
    named = {node.name: node for node in reference.graph.nodes}
    constants = constant_nodes(reference)
    factors = converted.meta.get(EQUALIZED_KEY, ())
    found: dict[Node, torch.Tensor] = {}
    for node in converted.graph.nodes:
        if node.op != "get_attr" or not _is_tensor(converted, node) or any(map(is_control_flow, node.users)):
            continue
        shape = get_attribute(converted, str(node.target)).shape
        value = _float_value(node, reference, named, constants, factors)
        value = torch.full(shape, value) if isinstance(value, (float, int)) else value
        if value is not None and value.shape == shape:
            found[node] = value
        elif any(is_dequantize(reader) and reader.args[0] is node for reader in node.users):
            place = describe(next((site.node for site in _reads_of(node)), node))
            there = "is not in the float model" if value is None else f"has shape {tuple(value.shape)} there"
            what = f"what {node.name} was made of {there}"
            remedy = "Give the float model that the quantized one was made of."
            raise ComparisonError(what, where=f"{WHERE}, {place}", remedy=remedy)
    return found


def _is_tensor(model: GraphModule, node: Node) -> bool:
    owner, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), name, None), torch.Tensor)


def _reads_of(constant: Node) -> Iterator[Site]:
    """Yields where compute nodes read a constant, dequantized or as it is."""
    for reader in constant.users:
        if is_dequantize(reader) and reader.args[0] is constant:
            yield from _reads_of(reader)
        elif is_quantize(reader) and reader.args[0] is constant:
            yield from (site for dequantize in reader.users for site in _reads_of(dequantize))
        elif not (is_dequantize(reader) or is_quantize(reader)):
            yield from (site for site, read in reads(reader) if read is constant)


def _float_value(
    node: Node, reference: GraphModule, named: dict[str, Node], constants: set[Node], factors: Any
) -> torch.Tensor | float | None:
    for site in _reads_of(node):
        there = named.get(site.node.name)
        if there is None or there.target != site.node.target:
            continue
        read: Any = bind(there).get(site.argument)
        read = read if site.element is None else read[site.element]
        if isinstance(read, Node) and read in constants:
            return _equalized(site, evaluate(reference, read), factors)
        if isinstance(read, (int, float)):  # XNNPACK's quantizer makes a constant of it, to quantize it.
            return float(read)
    path = str(node.meta.get(FLOAT_PATH_KEY, node.target))
    owner, _, name = path.rpartition(".")
    try:
        value = getattr(reference.get_submodule(owner), name, None)
    except AttributeError:
        return None
    return value.detach() if isinstance(value, torch.Tensor) else None


def _equalized(site: Site, value: torch.Tensor, factors: Any) -> torch.Tensor:
    """Returns a weight or bias as equalization left it: the same function, channels of the activation scaled."""
    for first, second, factor in factors:
        if site.node.name == first and site.argument == "weight":
            value = scale_outputs(site.node, value, 1 / factor)
        elif site.node.name == first and site.argument == "bias":
            value = value / factor
        elif site.node.name == second and site.argument == "weight":
            value = scale_inputs(site.node, value, factor)
    return value
