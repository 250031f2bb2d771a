"""What ``lower`` would refuse of a prepared model, found before it is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.backends.xnnpack.sound import INT8_ONLY, wrong_activation, wrong_weight
from zeropoint.core.dtypes import INTEGER_DTYPES, integer_range, plain_dtype
from zeropoint.core.errors import LoweringError
from zeropoint.graph.bind import argument
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.layers import LAYERS
from zeropoint.graph.observers import observer_of
from zeropoint.graph.source import describe

SHOWN = 20
"""Lines of the message."""


def check_prepared(prepared: GraphModule) -> None:
    """Raises when the delegate has no kernels for the integers that the observers of a model ask for.

    Raises:
        LoweringError: names each operator, the integers that it would return or read, and what to do.
    """
    lines = list(dict.fromkeys(_wrong(prepared)))
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        what = "XNNPACK has no kernels for what this model is prepared for:\n  " + "\n  ".join(lines[:SHOWN] + more)
        raise LoweringError(what, where="xnnpack")


def _wrong(model: GraphModule) -> Iterator[str]:
    for _, body in bodies(model):
        yield from _wrong(body)
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        observer = observer_of(model, node)
        if observer is None or plain_dtype(observer.dtype) not in INTEGER_DTYPES:
            continue
        yield from _of_constant(node, observer) if node.args[0] in constants else _of_activation(node, observer)


def _of_constant(node: Node, observer: Any) -> Iterator[str]:
    for layer in node.users:
        is_weight = layer.target in LAYERS and argument(layer, "weight") is node
        if is_weight and (found := wrong_weight(plain_dtype(observer.dtype))) is not None:
            yield f"{describe(layer)}: {found[0]}. {found[1]}"


def _integers_of(observer: Any) -> tuple[torch.dtype, int, int]:
    dtype = plain_dtype(observer.dtype)
    low, high = integer_range(dtype)
    given = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    return dtype, low if given[0] is None else given[0], high if given[1] is None else given[1]


def _of_activation(node: Node, observer: Any) -> Iterator[str]:
    integers = wrong_activation(*_integers_of(observer))
    if integers is None:
        return
    source: Any = node.args[0]
    if source.op == "call_function":
        yield f"{describe(source)}: it returns {integers}. {INT8_ONLY}"
    else:
        yield from (f"{describe(reader)}: it reads {integers}. {INT8_ONLY}" for reader in node.users)
