"""What stands for the float values of a graph in integers, found from the dequantize operators on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node, map_arg

from zeropoint.core.dtypes import INTEGER_DTYPES
from zeropoint.graph.attributes import Names
from zeropoint.graph.bind import argument
from zeropoint.graph.chains import ancestors
from zeropoint.graph.constants import constant_nodes, evaluate
from zeropoint.graph.emit import Emitter, inherit
from zeropoint.graph.memory import Memory
from zeropoint.numerics import ops
from zeropoint.passes.reference.grid import CENTERED, Grid, Scale, along_axis
from zeropoint.passes.reference.moves import CLAMPS, MOVES, axis_after, bounds_of, padding_value, sources_of
from zeropoint.passes.reference.sums import Sum, requantized

aten = torch.ops.aten
PASS = "compute_in_integers"
LEAVES = (
    ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR, ops.DEQUANTIZE_PER_CHANNEL, ops.DEQUANTIZE_PER_TOKEN,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operand:
    """Integers minus their zero point, which an operator computes with.

    Args:
        integers: a node of int16; of int32 and int64 where the quantized integers are of 16 and 32 bits.
        scale: a number, or a node of float32 with one value, or with a value for each index of ``axis``; ``(..., 1)``
            where each row has its own.
        axis: along which there are several scales.
        by_row: each vector along the last axis has a scale of its own.
    """

    integers: Node
    scale: Scale
    axis: int | None
    by_row: bool = False

    @property
    def accumulator(self) -> torch.dtype:
        """The type that sums of products of such integers are held in."""
        return torch.int32 if self.integers.meta["val"].dtype == torch.int16 else torch.int64


class Integers:
    """The integers behind the float values of a graph.

    Each answer is a node right before the one that it stands for; what was asked twice is made once. A value whose
    memory others write to has none.

    Args:
        operators: what computes a sum of integers in place of an operator; None where there is none for its arguments.
    """

    def __init__(self, model: GraphModule, operators: Operators) -> None:
        self.model = model
        self.constants = constant_nodes(model)
        self.names = Names(model)
        self._operators = operators
        self._memory = Memory(model.graph)
        self._position = {node: i for i, node in enumerate(model.graph.nodes)}
        self._values: dict[object, Any] = {}
        self._grids: dict[Node, Grid | None] = {}
        self._sums: dict[Node, Sum | None] = {}
        self._operands: dict[Node, Operand | None] = {}
        self._on_grid: dict[tuple[Node, Grid], Node | None] = {}

    def emitter(self, node: Node) -> Emitter:
        """Returns what adds nodes right before one: before the first reader of a dequantize, which may be far.

        Else the integers of all weights would be there at once, as what they are computed with.
        """
        readers = [reader for reader in node.users if reader in self._position] if node.target in LEAVES else []
        return Emitter(min(readers, key=self._position.__getitem__, default=node), PASS, self._values)

    def grid(self, node: Any) -> Grid | None:
        """Returns the grid that a node's values lie on: a dequantize's, or of what moves such values; else None."""
        if not self._is_value(node):
            return None
        if node not in self._grids:
            self._grids[node] = self._find_grid(node)
        return self._grids[node]

    def sum(self, node: Node) -> Sum | None:
        """Returns what an operator computes as a sum of integers; None where it has no such form."""
        if node not in self._sums:
            compute = self._operators.get(node.target) if self._is_value(node) else None
            self._sums[node] = None if compute is None else compute(self, node)
        return self._sums[node]

    def operand(self, node: Any) -> Operand | None:
        """Returns a node's integers minus their zero point; None where its values lie on no grid."""
        grid = self.grid(node)
        if grid is None:
            return None
        if node not in self._operands:
            self._operands[node] = self._find_operand(node, grid)
        return self._operands[node]

    def operand_of_one_scale(self, node: Any) -> Operand | None:
        """Returns what ``operand`` does; None too where channels or rows have scales of their own."""
        operand = self.operand(node)
        return operand if operand is not None and operand.axis is None and not operand.by_row else None

    def on_grid(self, node: Node, grid: Grid) -> Node | None:
        """Returns the integers of a node's values on a grid; None where they are computed in float."""
        key = (node, grid)
        if key not in self._on_grid:
            found = self._find_integers(node, grid) if self._is_value(node) else None
            self._on_grid[key] = found
            if found is not None:
                _read_sizes_of(found, node)
        return self._on_grid[key]

    def constant(self, value: Any) -> torch.Tensor | None:
        """Returns the value of a number, or of a node that depends on parameters and constants only; else None."""
        if not isinstance(value, Node):
            return torch.tensor(value)
        behind = {value, *ancestors(value)}
        is_constant = all(node.all_input_nodes or node in self.constants for node in behind)
        return evaluate(self.model, value) if is_constant else None

    def tensor(self, anchor: Node, value: torch.Tensor) -> Node:
        """Returns the node of a new buffer, before the anchor."""
        path = self.names.new("_tensor_constant_")
        self.model.register_buffer(path, value.to(anchor.meta["val"].device))
        with anchor.graph.inserting_before(anchor):
            read = anchor.graph.get_attr(path)
        read.meta["val"] = anchor.meta["val"].new_empty(value.shape, dtype=value.dtype)
        inherit(read, anchor, PASS)
        self.constants.add(read)
        return read

    def _is_value(self, node: Any) -> bool:
        return isinstance(node, Node) and node.op == "call_function" and not self._memory.is_rewritten(node)

    def _find_grid(self, node: Node) -> Grid | None:
        if node.target in LEAVES:
            grid = Grid.of(node)
            return grid if grid.has_arithmetic else None
        if node.target in CLAMPS:
            grid = self.grid(argument(node, "self"))
            return None if grid is None or not grid.is_static or bounds_of(node) is None else grid
        if node.target not in MOVES or padding_value(node):
            return None
        grids = [self.grid(source) for source in sources_of(node)]
        known = [grid for grid in grids if grid is not None]
        if len(known) < len(grids) or known[0].by_row or not all(known[0].has_integers_of(grid) for grid in known):
            return None
        if known[0].axis is not None:
            axis = axis_after(node, known[0].axis)
            return None if axis is None else replace(known[0], axis=axis)
        return replace(known[0], low=min(grid.low for grid in known), high=max(grid.high for grid in known))

    def _find_integers(self, node: Node, grid: Grid) -> Node | None:
        if grid.dtype not in INTEGER_DTYPES:
            return None
        if node.target in LEAVES:
            return self._of_leaf(node, grid)
        if node.target in CLAMPS:
            bounds = bounds_of(node)
            if bounds is None or not grid.is_static:
                return None
            return self.on_grid(argument(node, "self"), grid.clamped(*bounds))
        if node.target in MOVES:
            return self._moved(node, grid)
        value = self.sum(node) if grid.is_static else None
        return None if value is None else requantized(self.emitter(node), value, grid)

    def _of_leaf(self, node: Node, grid: Grid) -> Node | None:
        own, integers = Grid.of(node), node.args[0]
        assert isinstance(integers, Node)
        if not own.has_arithmetic:
            return None
        if own.has_integers_of(grid):
            if grid.low <= own.low and own.high <= grid.high:
                return integers
            return self.emitter(node).call(aten.clamp.default, integers, grid.low, grid.high)
        operand = self.operand(node) if own.axis is None and grid.is_static else None
        if operand is None:
            return None
        return requantized(self.emitter(node), Sum(((operand.integers, operand.scale),)), grid)

    def _moved(self, node: Node, grid: Grid) -> Node | None:
        sources = {source: self.on_grid(source, grid) for source in sources_of(node)}
        if any(integers is None for integers in sources.values()):
            return None
        emit, value = self.emitter(node), padding_value(node)
        if value is not None:
            (integers,) = sources.values()
            amounts = argument(node, "pad")
            return (
                emit.call(aten.constant_pad_nd.default, integers, amounts, grid.integer(value))
                if grid.is_static
                else None
            )
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: sources.get(n, n))
        target = aten.reshape.default if node.target is aten.view.default else node.target  # Integers lie in order.
        return emit.call(target, *args, **kwargs)

    def _find_operand(self, node: Node, grid: Grid) -> Operand | None:
        emit = self.emitter(node)
        if padding_value(node) is not None:
            source = self.operand(argument(node, "self"))
            if source is None:
                return None
            padded = emit.call(aten.constant_pad_nd.default, source.integers, argument(node, "pad"), 0)
            return replace(source, integers=padded)
        integers = self.on_grid(node, grid)
        if integers is None:
            return None
        dtype, scale, zero_point = CENTERED[grid.dtype], grid.scale, grid.zero_point
        if isinstance(zero_point, Node):
            zero_point = along_axis(emit, zero_point, grid.axis, node.meta["val"].dim())
            zero_point = emit.call(aten.to.dtype, zero_point, dtype)
        if isinstance(scale, Node) and scale.meta["val"].dtype != torch.float32:  # Those chosen at run time.
            scale = emit.call(aten.to.dtype, scale, torch.float32)
        centered = emit.call(aten.sub.Tensor, emit.call(aten.to.dtype, integers, dtype), zero_point)
        return Operand(centered, scale, grid.axis, grid.by_row)


def _read_sizes_of(new: Node, node: Node) -> None:
    """Lets what asks for a size of a float value ask its integers: else that would be computed for its size."""
    for reader in list(node.users):
        if reader.target is aten.sym_size.int:
            reader.replace_input_with(node, new)


Operators: TypeAlias = dict[Any, Callable[[Integers, Node], "Sum | None"]]
