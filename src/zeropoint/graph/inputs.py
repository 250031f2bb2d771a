"""Are these inputs ones that the graph was exported for? And which of their sizes are free?"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.core.errors import CalibrationError, NonFiniteError
from zeropoint.graph.compat import depends_on_another, largest_size, size_in_example

SMALLEST_END, END_OVER_EXAMPLE = 64, 4
"""What a free size without an end may grow to at least, and as a multiple of the example's."""


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


def free_sizes(model: GraphModule, inputs: tuple[Any, ...]) -> Any:
    """Returns the ``dynamic_shapes`` of an export that leaves free what is free in the graph; None: nothing is.

    A size without an end gets one: 64, or four times the size in ``inputs``.

    Args:
        inputs: positional inputs that fit the graph.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    values = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
    free = [_free_axes(value, leaf) for value, leaf in zip(values, leaves, strict=True)]
    return pytree.tree_unflatten(free, structure) if any(free) else None


def _free_axes(value: Any, leaf: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return Dim.DYNAMIC
    if not isinstance(value, torch.Tensor):
        return None
    return {axis: _freedom(free, leaf.shape[axis]) for axis, free in free_axes(value).items()} or None


def _freedom(free: torch.SymInt, size: int) -> Any:
    end = largest_size(free)
    if end is None and depends_on_another(free):
        return Dim.DYNAMIC
    return Dim.DYNAMIC(max=max(SMALLEST_END, END_OVER_EXAMPLE * size) if end is None else end)


def free_axes(value: torch.Tensor) -> dict[int, torch.SymInt]:
    """Returns the sizes of a graph's value that are not fixed, by axis."""
    return {axis: size for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}


def with_free_sizes(model: GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns inputs for exporting the graph again: torch.export takes a free size of 0 or 1 as a fixed one.

    An input that has such a size becomes zeros of the size that the graph was exported with.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    values = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
    if any(_seems_fixed(value, leaf) for value, leaf in zip(values, leaves, strict=True)):
        leaves = [_of_example_size(value, leaf) for value, leaf in zip(values, leaves, strict=True)]
    return pytree.tree_unflatten(leaves, structure)


def _seems_fixed(value: Any, leaf: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return any(leaf.shape[axis] < 2 for axis in free_axes(value))


def _of_example_size(value: Any, leaf: Any) -> Any:
    sizes = [size_in_example(size) for size in value.shape] if isinstance(value, torch.Tensor) else [None]
    return leaf if None in sizes else leaf.new_zeros(sizes)


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
