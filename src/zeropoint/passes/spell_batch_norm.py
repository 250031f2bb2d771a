"""Spell batch norm as export writes it, ``batch_norm``, whatever a device or a decomposition made of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.batch_norms import BATCH_NORMS, MULTIPLE, is_in_train_mode, keeps_statistics
from zeropoint.graph.bind import argument
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import PRODUCTS
from zeropoint.graph.source import WRITTEN_KEY
from zeropoint.passes.normalized_layers import Tensors, find_layer, linear_layer, refuse

aten = torch.ops.aten
PASS = "spell_batch_norm"
FUNCTIONAL = aten._native_batch_norm_legit_functional.default
UPDATED = {3: "running_mean", 4: "running_var"}
"""Results of the functional batch norm that are its new statistics."""


@graph_pass
def spell_batch_norm(model: GraphModule) -> None:
    """Replaces each batch norm by ``batch_norm``, which writes to its statistics itself.

    One that will not be folded gets a decision that says why. A product with a constant matrix before one that will
    becomes a linear layer.
    """
    for node in list(model.graph.nodes):
        if node.target in MULTIPLE:
            _spell(node)
    norms = [node for node in model.graph.nodes if node.target in BATCH_NORMS]
    tensors = Tensors(model) if norms else None
    for norm in norms:
        assert tensors is not None
        found = find_layer(norm, tensors)
        if isinstance(found, str):
            refuse(norm, found)
        elif found.layer.target in PRODUCTS:
            linear_layer(found.layer, tensors, PASS)


def _spell(norm: Node) -> None:
    """Replaces a batch norm of several results, of which the first alone is read; other ones stay."""
    results: dict[Any, Node] = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
    updated = UPDATED if norm.target is FUNCTIONAL and argument(norm, "training") else {}
    read = {i for i, result in results.items() if result.users and i not in updated}
    if read != {0} or len(results) != len(norm.users) or not all(_is_written(norm, results, i) for i in updated):
        return
    for i, name in updated.items():
        results[i].replace_all_uses_with(argument(norm, name))
    for copy in [user for name in updated.values() for user in argument(norm, name).users if _copies_itself(user)]:
        norm.graph.erase_node(copy)
    with norm.graph.inserting_before(norm):
        spelled = norm.graph.call_function(aten.batch_norm.default, _arguments(norm))
    spelled.meta |= {"val": results[0].meta["val"], WRITTEN_KEY: norm.target}
    inherit(spelled, norm, PASS)
    results[0].replace_all_uses_with(spelled)
    for node in (*results.values(), norm):
        norm.graph.erase_node(node)


def _is_written(norm: Node, results: dict[Any, Node], index: int) -> bool:
    """True when the new statistics of a functional batch norm end in the buffer of the old ones, and nowhere else."""
    buffer, new = argument(norm, UPDATED[index]), results.get(index)
    if new is None or not new.users or buffer.op != "get_attr":
        return False
    return all(
        user.target is FUNCTIONAL or (user.target is aten.copy_.default and user.args[0].target == buffer.target)  # type: ignore[union-attr]
        for user in new.users
    )


def _copies_itself(node: Node) -> bool:
    return node.target is aten.copy_.default and node.args[0] is node.args[1]


def _arguments(norm: Node) -> tuple[Any, ...]:
    """Returns the arguments of ``batch_norm`` that say the same."""
    tensors = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    momentum, eps = argument(norm, "momentum"), argument(norm, "eps")
    momentum = argument(norm, "exponential_average_factor") if momentum is None else momentum
    eps = argument(norm, "epsilon") if eps is None else eps
    training = is_in_train_mode(norm) or not keeps_statistics(norm)
    return (argument(norm, "input"), *tensors, training, momentum, eps, True)
