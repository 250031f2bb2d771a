"""Spell operators as export writes them, where ``ExportedProgram.run_decompositions()`` spelled them otherwise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.emit import Emitter
from zeropoint.graph.sizes import have_equal_sizes
from zeropoint.graph.source import WRITTEN_KEY

aten = torch.ops.aten

CONVOLUTION = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def recompose(model: GraphModule, known: dict[object, Any]) -> None:
    """Replaces the operators of a decomposed program by what they were made of; values stay the same.

    Quantizers and passes know the operators of export: ``conv2d``, not ``convolution``.
    """
    found = [node for node in model.graph.nodes if node.op == "call_function" and node.target in REWRITINGS]
    constants = constant_nodes(model) if found else set[Node]()
    for node in found:
        REWRITINGS[node.target](_Decomposed(node, constants, known))


class _Decomposed:
    """A node to be replaced, with what that needs."""

    def __init__(self, node: Node, constants: set[Node], known: dict[object, Any]) -> None:
        self.node, self.constants, self._known = node, constants, known

    def arguments(self, *names: str) -> tuple[Any, ...]:
        """Returns the values of arguments of the node."""
        return tuple(argument(self.node, name) for name in names)

    def replace(self, results: list[Node], target: Any, *args: Any) -> None:
        """Makes a new node stand for each of ``results``, which are the place's node or come after it."""
        new = Emitter(results[0], "recompose", self._known).call(target, *args)
        new.meta[WRITTEN_KEY] = self.node.target
        for result in results:
            result.replace_all_uses_with(new)


def _convolution(place: _Decomposed) -> None:
    """``convolution`` is every convolution, of any number of dimensions, transposed or not."""
    x, weight, bias, stride, padding = place.arguments("input", "weight", "bias", "stride", "padding")
    transposed, dilation, output_padding, groups = place.arguments("transposed", "dilation", "output_padding", "groups")
    targets, rest = (
        (TRANSPOSED, (output_padding, groups, dilation)) if transposed else (CONVOLUTION, (dilation, groups))
    )
    place.replace([place.node], targets[weight.meta["val"].dim() - 2], x, weight, bias, stride, padding, *rest)


def _product(place: _Decomposed) -> None:
    """``x @ w.permute(1, 0) + b`` is a linear layer, with the views to a matrix and back where it has them.

    A product that the user wrote with ``w.t()`` is not: it stays what a quantizer expects.
    """
    is_sum = place.node.target is aten.addmm.default
    x, transposed = place.arguments("mat1" if is_sum else "self", "mat2")
    bias = argument(place.node, "self") if is_sum else None
    if not _transposes_a_constant(place, transposed) or (is_sum and not _is_bias(place, place.node, bias)):
        return
    source, result = _around_views(x, place.node)
    place.replace([result], aten.linear.default, source, transposed.all_input_nodes[0], bias)


def _around_views(x: Node, product: Node) -> tuple[Node, Node]:
    """Returns what is viewed as the matrix ``x`` and the view of the product that has as many axes; else both."""
    reader = sole_reader(product)
    if x.target is not aten.view.default or reader is None or reader.target is not aten.view.default:
        return x, product
    source = x.all_input_nodes[0]
    before, columns = source.meta["val"].shape, product.meta["val"].shape[1:]
    keeps_rows = have_equal_sizes(before[-1:], x.meta["val"].shape[1:])
    returns_rows = have_equal_sizes((*before[:-1], *columns), reader.meta["val"].shape)
    return (source, reader) if keeps_rows and returns_rows else (x, product)


def _batched_product(place: _Decomposed) -> None:
    """A linear layer of an input whose memory is not in order: a batch of products with one weight, and a sum."""
    x, weights = place.arguments("self", "mat2")
    expanded = _before_views(weights)
    transposed = expanded.all_input_nodes[0] if expanded.target is aten.expand.default else expanded
    is_whole = have_equal_sizes(transposed.meta["val"].shape, weights.meta["val"].shape[1:])
    if not is_whole or not _transposes_a_constant(place, transposed):
        return
    result = _after_views(place.node)
    reader = sole_reader(result)
    bias = argument(reader, "other") if reader is not None and reader.target is aten.add.Tensor else None
    if reader is not None and argument(reader, "self") is result and _is_bias(place, reader, bias):
        result = reader
    else:
        bias = None
    place.replace([result], aten.linear.default, x, transposed.all_input_nodes[0], bias)


def _before_views(node: Node) -> Node:
    while node.target is aten.view.default and _keeps_sizes(node):
        node = node.all_input_nodes[0]
    return node


def _after_views(node: Node) -> Node:
    reader = sole_reader(node)
    while reader is not None and reader.target is aten.view.default and _keeps_sizes(reader):
        node, reader = reader, sole_reader(reader)
    return node


def _keeps_sizes(view: Node) -> bool:
    return have_equal_sizes(view.all_input_nodes[0].meta["val"].shape, view.meta["val"].shape)


def _transposes_a_constant(place: _Decomposed, node: Node) -> bool:
    if node.target is not aten.permute.default or node not in place.constants or node.meta["val"].dim() != 2:
        return False
    return [axis % 2 for axis in argument(node, "dims")] == [1, 0]


def _is_bias(place: _Decomposed, adding: Node, bias: Any) -> bool:
    """True when ``adding`` adds a constant with a value for each column, as it is."""
    if not isinstance(bias, Node) or bias not in place.constants:
        return False
    factors = (argument(adding, "alpha", 1), argument(adding, "beta", 1))
    return factors == (1, 1) and have_equal_sizes(bias.meta["val"].shape, adding.meta["val"].shape[-1:])


def _renamed(target: Any, *names: str) -> Callable[[_Decomposed], None]:
    """Returns the rewriting of an operator to another that takes these arguments of it."""

    def rewrite(place: _Decomposed) -> None:
        place.replace([place.node], target, *place.arguments(*names))

    return rewrite


def _first_result(target: Any, *taken: str | bool) -> Callable[[_Decomposed], None]:
    """Returns the rewriting of an operator of several results to one that returns the first of them.

    ``taken`` are the names of the arguments that it takes of the other, and flags that it has besides.
    """

    def rewrite(place: _Decomposed) -> None:
        readers = list(place.node.users)
        if readers and all(reader.target is operator.getitem and reader.args[1] == 0 for reader in readers):
            args = (argument(place.node, each) if isinstance(each, str) else each for each in taken)
            place.replace(readers, target, *args)

    return rewrite


REWRITINGS: dict[Any, Callable[[_Decomposed], None]] = {
    aten.convolution.default: _convolution,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _batched_product,
    aten._softmax.default: _renamed(aten.softmax.int, "self", "dim"),
    aten._log_softmax.default: _renamed(aten.log_softmax.int, "self", "dim"),
    aten._adaptive_avg_pool2d.default: _renamed(aten.adaptive_avg_pool2d.default, "self", "output_size"),
    aten.max_pool2d_with_indices.default: _first_result(
        aten.max_pool2d.default, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    ),
    aten._native_batch_norm_legit_no_training.default: _first_result(
        aten.batch_norm.default,
        "input",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        False,
        "momentum",
        "eps",
        False,
    ),
    aten.native_layer_norm.default: _first_result(
        aten.layer_norm.default, "input", "normalized_shape", "weight", "bias", "eps"
    ),
}
"""How an operator is rewritten, for each that is. What is replaced is dead code then."""
