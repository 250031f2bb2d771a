"""Are these inputs ones that the graph was exported for?"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.core.errors import CalibrationError, NonFiniteError


def as_inputs(batch: Any, where: str) -> tuple[Any, ...]:
    """Returns a batch as the tuple of positional inputs; a single tensor becomes a tuple of one.

    Raises:
        CalibrationError: the batch is neither.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    what = f"is {type(batch).__name__}, not a tuple of inputs"
    raise CalibrationError(what, where=where, remedy="Give each batch as a tuple of the model's positional inputs.")


def check_inputs(model: GraphModule, inputs: tuple[Any, ...], where: str) -> None:
    """Raises when inputs do not fit the graph's placeholders in number, shape or dtype, or are not finite.

    Raises:
        CalibrationError: names the input, what it is and what the model was exported for.
        NonFiniteError: an input holds NaN or infinity.
    """
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(inputs)
    if len(leaves) != len(placeholders):
        what = f"has {len(leaves)} inputs, the model takes {len(placeholders)}"
        remedy = (
            f"They are: {', '.join(str(p.target) for p in placeholders)}. Leave labels out: [(x,) for x, _ in data]."
        )
        raise CalibrationError(what, where=where, remedy=remedy)
    for placeholder, value in zip(placeholders, leaves, strict=True):
        expected = placeholder.meta.get("val")
        if isinstance(expected, torch.Tensor):
            _check(value, expected, f"{where}, input {placeholder.target!r}")


def _check(value: Any, expected: torch.Tensor, where: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(f"is {type(value).__name__}, not a tensor", where=where)
    fits = value.dim() == expected.dim() and all(
        not isinstance(size, int) or size == given for size, given in zip(expected.shape, value.shape, strict=True)
    )
    if not fits:
        what = f"has shape {tuple(value.shape)}; the model was exported for {_shape(expected)}"
        remedy = "Bring the data into that shape, or export with dynamic_shapes."
        raise CalibrationError(what, where=where, remedy=remedy)
    if value.dtype != expected.dtype:
        what = f"is {value.dtype}; the model was exported for {expected.dtype}"
        raise CalibrationError(what, where=where, remedy=f"Convert it: x.to({expected.dtype}).")
    if not value.numel():
        raise CalibrationError(f"is empty: its shape is {tuple(value.shape)}", where=where, remedy="Leave it out.")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise NonFiniteError(f"holds {bad} NaN or infinite values", where=where, remedy="Clean the data.")


def _shape(value: torch.Tensor) -> str:
    return f"({', '.join(str(size) for size in value.shape)})"
