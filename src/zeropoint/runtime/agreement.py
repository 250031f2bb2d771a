"""How one output of a file agrees with the converted model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.core.dtypes import is_float
from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.shaken import shaken

FLOOR_DB = 30.0
"""Below it a file does not compute its model: rounding alone leaves 40 dB and more."""
LOWEST_DB = 15.0
"""Below it a file is not accepted, however far the model's own outputs move."""
MARGIN_DB = 3.0
"""Two runs that differ by chance, such as file and model, agree so much less at times than two others."""
STEP = 1.01
"""One quantization step, with the float rounding of a dequantized value."""
ROUNDING = torch.finfo(torch.float32).eps
"""What float rounding may leave of values of about 1 where they should cancel to 0."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an output agrees.

    Args:
        sqnr_db: of a float output, in dB; of integers, booleans and numbers, infinite where all are equal, else minus
            infinity.
        steps: the largest difference in quantization steps, where the output comes straight from a dequantize.
        node: what the graph returns there; None for a constant.
        discrete: the output is no float tensor.
        actual: what the file returned.
        shaken_db: the SQNR of the model's own output after a change of its float values' last bits, in dB; found only
            where the file's is below 30 dB.
    """

    sqnr_db: float
    steps: float | None = None
    node: Node | None = None
    discrete: bool = False
    actual: Any = field(default=None, repr=False, compare=False)
    shaken_db: float = math.inf

    @property
    def within_one_step(self) -> bool:
        """True where no value is further than one quantization step away."""
        return self.steps is not None and self.steps <= STEP

    @property
    def is_right(self) -> bool:
        """True where the file computes this output.

        Values that lie halfway between two steps are rounded up here and down there, so an output whose values are all
        within one step is right, however many differ. So is one that agrees with the model's as the model does with
        itself once the last bits of its float values change.
        """
        as_itself = self.sqnr_db >= max(LOWEST_DB, self.shaken_db - MARGIN_DB)
        return self.sqnr_db >= FLOOR_DB or self.within_one_step or as_itself


@torch.no_grad()
def agreements(model: GraphModule, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> list[Agreement]:
    """Returns how each output of the file agrees with the model's, None left out.

    One that agrees in nothing where they return different numbers of values.
    """
    returned = next(node for node in model.graph.nodes if node.op == "output")
    nodes, expected = pytree.tree_leaves(returned.args[0]), pytree.tree_leaves(model(*inputs))
    pairs = [(n, e) for n, e in zip(nodes, expected, strict=True) if e is not None]
    actual = [value for value in outputs if value is not None]
    if len(pairs) != len(actual):
        return [Agreement(-math.inf)]
    found = [agreement(n if isinstance(n, Node) else None, e, a) for (n, e), a in zip(pairs, actual, strict=True)]
    if any(LOWEST_DB <= each.sqnr_db < FLOOR_DB and not each.is_right for each in found):
        expected_values = [e for _, e in pairs]
        found = [
            replace(f, shaken_db=db) for f, db in zip(found, _shaken_db(model, inputs, expected_values), strict=True)
        ]
    return found


def _shaken_db(model: GraphModule, inputs: tuple[Any, ...], expected: list[Any]) -> list[float]:
    """Returns the lowest SQNR of each output over runs whose float values were changed in their last bits."""
    runs = [[value for value in run if value is not None] for run in shaken(model, inputs)]
    return [min((_sqnr_db(e, run[i]) for run in runs), default=math.inf) for i, e in enumerate(expected)]


def _sqnr_db(expected: Any, actual: Any) -> float:
    return sqnr_db(expected, actual) if is_float(expected) else math.inf


def agreement(node: Node | None, expected: Any, actual: Any) -> Agreement:
    """Returns how one output of the file agrees with what the model's node, or a constant, gave."""
    reference, other = torch.as_tensor(expected), torch.as_tensor(actual)
    if not reference.is_floating_point() or not isinstance(expected, torch.Tensor):
        equal = reference.shape == other.shape and bool((reference == other).all())
        return Agreement(math.inf if equal else -math.inf, None, node, True, other)
    if reference.shape == other.shape and not reference.any() and bool((other.abs() <= ROUNDING).all()):
        return Agreement(math.inf, None, node)
    return Agreement(sqnr_db(reference, other), _steps(node, reference, other), node)


def _steps(node: Node | None, reference: torch.Tensor, actual: torch.Tensor) -> float | None:
    if node is None or node.target is not ops.DEQUANTIZE_PER_TENSOR or reference.shape != actual.shape:
        return None
    scale = node.args[1]
    assert isinstance(scale, float)
    return float((reference - actual).abs().max()) / scale if reference.numel() else 0.0
