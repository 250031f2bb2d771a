"""How far what two models computed is apart, node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from zeropoint.core.errors import ComparisonError
from zeropoint.graph.origin import NodeSourceDebugInfo
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.loggers import Recording, like

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class QuantizationComparisonResult:
    """A value, and its reference: tensors, or lists, tuples and dictionaries of them.

    Raises:
        ComparisonError: they differ in shape or structure, or are no tensors.
    """

    actual: Any
    ref: Any

    def __post_init__(self) -> None:
        for name, value in (("actual", self.actual), ("ref", self.ref)):
            if not isinstance(value, (torch.Tensor, list, tuple, dict)):
                raise ComparisonError(f"{name} is {type(value).__name__}, not a tensor, list, tuple or dictionary")
        if not _have_equal_shapes(self.ref, self.actual):
            what = f"ref and actual differ in shape: {_shapes(self.ref)} and {_shapes(self.actual)}"
            raise ComparisonError(what, remedy="Run both models on the same inputs.")

    @property
    def mse_loss(self) -> Any:
        """The mean squared error of each tensor, in the structure of the value."""
        return self.loss(F.mse_loss)

    @property
    def sqnr(self) -> Any:
        """The signal to quantization noise ratio of each tensor in dB, the reference being the signal."""
        return self.loss(lambda actual, ref: torch.tensor(sqnr_db(ref, actual)))

    def loss(self, loss_function: Loss) -> Any:
        """Returns ``loss_function(actual, ref)`` in float32 of each tensor, in the structure of the value."""
        return _loss(loss_function, self.actual, self.ref)

    def __repr__(self) -> str:
        return f"QuantizationComparisonResult(mse_loss={self.mse_loss}, sqnr={self.sqnr})"


@dataclass(frozen=True, slots=True)
class NodeAccuracySummary:
    """How a node of the exported program compares in two models.

    Args:
        debug_info: that node.
        actual_node_name: where it was recorded.
        actual_module_stack: the innermost module around that.
        ref_node_name: the same of the reference.
        ref_module_stack: the same of the reference.
        results: one for each run.
    """

    debug_info: NodeSourceDebugInfo
    actual_node_name: str
    actual_module_stack: str
    ref_node_name: str
    ref_module_stack: str
    results: Sequence[QuantizationComparisonResult]


def compare_results(
    ref_results: Mapping[NodeSourceDebugInfo, Recording], actual_results: Mapping[NodeSourceDebugInfo, Recording]
) -> dict[NodeSourceDebugInfo, NodeAccuracySummary]:
    """Returns how the nodes that both recordings have compare, in the order of the reference.

    Raises:
        ComparisonError: they have no node in common; one model ran more often; or a node's values differ in shape.
    """
    common = [info for info in ref_results if info in actual_results]
    if not common:
        what, remedy = "the two recordings have no node in common", "Run each model before its results are extracted."
        if ref_results and actual_results:
            remedy = "Make both models of one torch.export.export(...).module(): its nodes are not those of another."
        raise ComparisonError(what, where="compare_results", remedy=remedy)
    return {info: _summary(info, ref_results[info], actual_results[info]) for info in common}


def _summary(info: NodeSourceDebugInfo, ref: Recording, actual: Recording) -> NodeAccuracySummary:
    (ref_name, ref_stack, ref_values), (name, stack, values) = ref, actual
    where = f"{info.name}, recorded at {ref_name} and {name}"
    if len(ref_values) != len(values):
        what = f"the reference has {len(ref_values)} values, the other model {len(values)}"
        raise ComparisonError(what, where=where, remedy="Run both models on the same inputs, in the same order.")
    try:
        pairs = zip(values, ref_values, strict=True)
        results = [QuantizationComparisonResult(actual=value, ref=ref_value) for value, ref_value in pairs]
    except ComparisonError as error:
        raise ComparisonError(error.what, where=where, remedy=error.remedy) from error
    return NodeAccuracySummary(info, name or "", _innermost(stack), ref_name or "", _innermost(ref_stack), results)


def _innermost(stack: object) -> str:
    """Returns the path of the innermost module of ``nn_module_stack`` metadata."""
    return str(list(stack.values())[-1][0]) if isinstance(stack, dict) and stack else str(stack)


def _have_equal_shapes(ref: Any, actual: Any) -> bool:
    match ref, actual:
        case torch.Tensor(), torch.Tensor():
            return ref.shape == actual.shape
        case ((list() | tuple()), (list() | tuple())):
            return len(ref) == len(actual) and all(map(_have_equal_shapes, ref, actual))
        case dict(), dict():
            return ref.keys() == actual.keys() and all(_have_equal_shapes(ref[key], actual[key]) for key in ref)
        case _:
            return type(ref) is type(actual) and bool(ref == actual)


def _shapes(value: Any) -> Any:
    match value:
        case torch.Tensor():
            return tuple(value.shape)
        case list() | tuple():
            return [_shapes(item) for item in value]
        case dict():
            return {key: _shapes(item) for key, item in value.items()}
        case _:
            return value


def _loss(loss: Loss, actual: Any, ref: Any) -> Any:
    match actual:
        case torch.Tensor():
            return loss(actual.to(torch.float32), ref.to(torch.float32))
        case list() | tuple():
            return like(actual, [_loss(loss, *pair) for pair in zip(actual, ref, strict=True)])
        case dict():
            return {key: _loss(loss, item, ref[key]) for key, item in actual.items()}
        case _:
            return None
