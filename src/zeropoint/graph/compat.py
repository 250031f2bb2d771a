"""Private torch names, and the torch versions that have them. No other file imports one, with two exceptions.

``torch.utils._pytree`` is used everywhere; and ``numerics.ops``, a layer below, imports
``torch.ao.quantization.fx._decomposed`` (2.0 to 2.13) by its name, which registers operators.

| name | where | versions |
|---|---|---|
| FakeTensor | torch._subclasses.fake_tensor | 2.0 to 2.13 |
| OpOverload, HigherOrderOperator | torch._ops | 2.0 to 2.13 |
| NodeSource, NodeSourceAction | torch.fx.traceback | 2.6 to 2.13 |
| detect_fake_mode | torch._guards | 2.1 to 2.13 |
| Graph._codegen.pytree_info | torch.fx.graph | 1.13 to 2.13 |
| tree_flatten_spec | torch.fx._pytree | 1.13 to 2.13 |
| enable_python_dispatcher | torch._dispatch.python | 2.0 to 2.13 |
| no_dispatch | torch.utils._mode_utils | 2.0 to 2.13 |
| _C._current_graph_task_id | torch | 2.0 to 2.13 |
| _C._autograd._top_saved_tensors_default_hooks | torch | 2.5 to 2.13 |
| SymNode.hint, ShapeEnv.bound_sympy | torch.SymInt.node | 2.1 to 2.13 |
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx._pytree import tree_flatten_spec
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

__all__ = [
    "FakeTensor",
    "HigherOrderOperator",
    "OpOverload",
    "as_in_export",
    "created_from",
    "depends_on_another",
    "fake_like",
    "fake_mode_of",
    "fake_on",
    "flatten_as",
    "in_backward",
    "input_structure",
    "is_tensor_list",
    "is_tensor_value",
    "largest_size",
    "return_tuple",
    "saves_by_hooks",
    "size_in_example",
    "structures",
]


def in_backward() -> bool:
    """True inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def saves_by_hooks() -> bool:
    """True where a function decides what autograd keeps of a forward pass, as activation checkpointing does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return hooks is not None


def created_from(node: Node, pass_name: str) -> list[NodeSource]:
    """Returns the ``from_node`` metadata of a node that ``pass_name`` creates on behalf of ``node``.

    The history of ``node`` is shared, not copied: ``NodeSource(node)`` copies it, which is half the cost of a pass.
    """
    made = NodeSource(None, pass_name, [NodeSourceAction.CREATE])
    made.node_info = NodeSource.NodeInfo(node.name, str(node.target), id(node.graph))
    made.from_node = node.meta.get("from_node") or []
    return [made]


def structures(graph: Graph) -> tuple[pytree.TreeSpec, pytree.TreeSpec | None] | None:
    """Returns the structures of a graph's arguments and of its result; None where it takes and gives leaves."""
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else (info.in_spec, info.out_spec)


def input_structure(graph: Graph) -> pytree.TreeSpec | None:
    """Returns the structure of a graph's arguments, ``(positional, by name)``; None where it takes leaves."""
    found = structures(graph)
    return None if found is None else found[0]


def return_tuple(graph: Graph, count: int) -> None:
    """Makes what a graph returns a tuple of so many values, where it returned another structure."""
    codegen: Any = graph._codegen
    if hasattr(codegen, "pytree_info"):
        spec = pytree.tree_structure((0,) * count)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)


def flatten_as(tree: Any, structure: pytree.TreeSpec) -> list[Any]:
    """Returns the leaves of a tree in the order that a structure of the same shape has them.

    A list may stand for a tuple; values of a dictionary are found by their keys.
    """
    return tree_flatten_spec(tree, structure)


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """Returns the mode of the first fake tensor in the graph's ``val`` metadata; None when there is none."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return detect_fake_mode([node.meta["val"]])
    return None


@contextmanager
def as_in_export(mode: FakeTensorMode | None) -> Generator[None]:
    """Computes on the fake tensors of a mode as export does: outside of it, a padding fixes the sizes that are free."""
    if mode is None:
        yield
        return
    with mode, enable_python_dispatcher():
        yield


def fake_like(value: torch.Tensor, shape: Sequence[int] | torch.Size | None = None, dtype: Any = None) -> torch.Tensor:
    """Returns a fake tensor of the mode and device of ``value``, of another shape or dtype where one is given.

    Built directly where all sizes are known: running an operator on fake tensors takes ten times as long.
    """
    dtype = value.dtype if dtype is None else dtype
    wanted = value.shape if shape is None else shape
    if not isinstance(value, FakeTensor) or not all(isinstance(size, int) for size in wanted):
        return torch.empty_like(value, dtype=dtype) if shape is None else value.new_empty(shape, dtype=dtype)
    strides = value.stride() if shape is None else None
    with no_dispatch():
        if strides is None:
            elem = torch.empty(tuple(wanted), dtype=dtype, device="meta")
        else:
            elem = torch.empty_strided(tuple(wanted), strides, dtype=dtype, device="meta")
        return FakeTensor(value.fake_mode, elem, value.device)


def fake_on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a fake tensor of another device, with the sizes, strides and mode of one; any other tensor as it is."""
    if not isinstance(value, FakeTensor) or value.device == device:
        return value
    with no_dispatch():
        elem = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, elem, device)


def largest_size(size: torch.SymInt) -> int | None:
    """Returns the largest value that a free size may have; None where it has no end."""
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else None


def depends_on_another(size: torch.SymInt) -> bool:
    """True for a free size that is computed from others, such as ``s0 + 1``."""
    return not size.node.expr.is_Symbol


def size_in_example(size: int | torch.SymInt) -> int | None:
    """Returns a size of the inputs that a graph was exported with; None where it depends on their values."""
    return size if isinstance(size, int) else size.node.hint


def is_tensor_value(value: object) -> bool:
    """True when ``val`` metadata describes one tensor (not a list of tensors, not a number)."""
    return isinstance(value, torch.Tensor)


def is_tensor_list(value: object) -> bool:
    """True when ``val`` metadata describes several values, at least one of which is a tensor."""
    return isinstance(value, (list, tuple)) and any(is_tensor_value(item) for item in value)
