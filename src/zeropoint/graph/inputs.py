"""Are these inputs ones that the graph was exported for? And which of their sizes are free?"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.core.errors import CalibrationError, NonFiniteError
from zeropoint.graph.compat import depends_on_another, flatten_as, input_structure, largest_size, size_in_example

SMALLEST_END, END_OVER_EXAMPLE = 64, 4
"""What a free size without an end may grow to at least, and as a multiple of the example's."""


def inputs_for(model: GraphModule, batch: Any, where: str) -> tuple[Any, ...]:
    """Returns a batch as the tuple of a graph's positional inputs, dictionaries in the order that the graph knows.

    Args:
        batch: a tuple or list of inputs, or a single tensor.

    Raises:
        CalibrationError: the batch is something else, or does not fit the graph in structure, number, shape, dtype or
            fixed value; names the input, what it is and what the model was exported for.
        NonFiniteError: an input holds NaN or infinity.
    """
    inputs = _as_tuple(batch, where)
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(inputs)
    if len(leaves) != len(placeholders):
        what = f"has {len(leaves)} inputs, the model takes {len(placeholders)}"
        remedy = (
            f"They are: {', '.join(str(p.target) for p in placeholders)}. Leave labels out: [(x,) for x, _ in data]."
        )
        raise CalibrationError(what, where=where, remedy=remedy)
    structure = input_structure(model.graph)
    if structure is not None:
        leaves = _in_order(inputs, structure, where)
        inputs = pytree.tree_unflatten(leaves, structure)[0]
    for placeholder, value in zip(placeholders, leaves, strict=True):
        if "val" in placeholder.meta:
            _check(value, placeholder.meta["val"], f"{where}, input {placeholder.target!r}")
    return inputs


def _as_tuple(batch: Any, where: str) -> tuple[Any, ...]:
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    what = f"is {type(batch).__name__}, not a tuple of inputs"
    raise CalibrationError(what, where=where, remedy="Give each batch as a tuple of the model's positional inputs.")


def _in_order(inputs: tuple[Any, ...], structure: pytree.TreeSpec, where: str) -> list[Any]:
    """Returns the leaves of inputs as the structure has them: a list may stand for a tuple, keys come in any order."""
    try:
        return flatten_as((inputs, {}), structure)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        wanted, found = (_structure_text(each) for each in (structure, pytree.tree_structure((inputs, {}))))
        raise CalibrationError(f"its inputs are {found}; the model takes {wanted}", where=where) from error


def _structure_text(structure: pytree.TreeSpec) -> str:
    """Returns the structure of positional inputs as Python writes it, with a point for each leaf."""
    leaves = [_LEAF] * structure.num_leaves
    return repr(pytree.tree_unflatten(leaves, structure)[0])


class _Leaf:
    def __repr__(self) -> str:
        return "."


_LEAF = _Leaf()


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


def _check(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        _check_tensor(value, expected, where)
    elif not isinstance(expected, torch.SymInt) and (isinstance(value, torch.Tensor) or value != expected):
        found = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        what = f"is {found}; the model was exported for {expected!r}, and that is fixed in it"
        raise CalibrationError(what, where=where, remedy="Export the model for this value, or make it a tensor.")


def _check_tensor(value: Any, expected: torch.Tensor, where: str) -> None:
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
