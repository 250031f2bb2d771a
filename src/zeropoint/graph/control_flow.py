"""Control flow in Python, for training.

torch differentiates a control flow operator by tracing its bodies with tensors that hold no values, and with respect to
its operands only. Fake quantizers look at values, and the parameters of a body that is prepared are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.compat import HigherOrderOperator, OpOverload

Body = Callable[..., Any]
Values = Sequence[Any]
higher_order = torch.ops.higher_order


def run_cond(predicate: Any, true_body: Body, false_body: Body, operands: Values = ()) -> Any:
    """Returns what ``torch.cond`` returns."""
    return (true_body if bool(predicate) else false_body)(*operands)


def run_while_loop(condition: Body, body: Body, carried: Values, operands: Values = ()) -> Any:
    """Returns what ``while_loop`` returns: what is carried after the last step."""
    while bool(condition(*carried, *operands)):
        carried = body(*carried, *operands)
    return tuple(carried)


def run_scan(body: Body, carried: Values, inputs: Values, operands: Values = ()) -> list[Any]:
    """Returns what ``scan`` returns: what is carried at last, and the other results of each step, stacked."""
    count = len(carried)
    steps: list[Values] = []
    for index in range(inputs[0].shape[0]):
        results = body(*carried, *(each[index] for each in inputs), *operands)
        carried = results[:count]
        steps.append(results[count:])
    return [*carried, *_stacked(steps)]


def run_map(body: Body, inputs: Values, operands: Values) -> list[Any]:
    """Returns what ``map`` returns: the results for each slice along the first axis, stacked."""
    return _stacked([body(*(each[i] for each in inputs), *operands) for i in range(inputs[0].shape[0])])


def _stacked(steps: Sequence[Values]) -> list[Any]:
    return [torch.stack(each) for each in zip(*steps, strict=True)]


IN_PYTHON: dict[Any, Callable[..., Any]] = {
    higher_order.cond: run_cond,
    higher_order.while_loop: run_while_loop,
    higher_order.scan: run_scan,
    higher_order.map_impl: run_map,
}
"""The operators whose last argument holds what each body reads last, and the same in Python."""
AS_OPERATORS = {function: operator for operator, function in IN_PYTHON.items()}


def is_control_flow(node: Node) -> bool:
    """True for an operator that runs graphs of its own, or the same in Python."""
    target = node.target
    if node.op != "call_function" or isinstance(target, OpOverload):  # Most are: looking one up takes 1 us.
        return False
    return isinstance(target, HigherOrderOperator) or target in AS_OPERATORS
