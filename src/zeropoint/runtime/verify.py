"""Does the file compute what the converted model computes? And if not, where does it begin to differ?"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.core.errors import CalibrationError, RuntimeFailure, VerificationError
from zeropoint.graph.source import describe
from zeropoint.numerics import ops
from zeropoint.runtime.agreement import FLOOR_DB, Agreement, agreements
from zeropoint.runtime.beginnings import beginning, first_place, output_quantize, places
from zeropoint.runtime.child import Batches, run_in_child
from zeropoint.runtime.executorch import check_identifier
from zeropoint.runtime.ties import explained, float_sources

Lower = Callable[[GraphModule, tuple[Any, ...]], bytes]


@dataclass(frozen=True, slots=True)
class Verification:
    """How a file compares with its converted model, over all inputs.

    Args:
        sqnr_db: the lowest SQNR of a float output, in dB; infinite where all are equal, or there is none.
        within_one_step: each output below 30 dB comes straight from a dequantize, and no value of it is further than
            one quantization step away: values halfway between two steps were rounded to the other one.
        integers_equal: all outputs of integers and booleans are equal. Where not, what they are computed from was
            verified in their place.
        batches: how many inputs were compared.
        shaken_db: where the file agrees by less than 30 dB, by how much the model agrees with itself once the last bits
            of its float values change; infinite elsewhere.
    """

    sqnr_db: float
    within_one_step: bool
    integers_equal: bool
    batches: int
    shaken_db: float = math.inf


def verify(pte: bytes, converted: GraphModule, batches: Batches, lower: Lower) -> Verification:
    """Returns how the file's outputs compare with the converted model's.

    A float output is right from 30 dB on, or when it is dequantized and no value is further than one step away, or when
    the model does not agree better with itself once the last bits of its float values change (see ``shaken``).
    Integers and booleans are right when they are equal; and also when the float values that they are computed from are
    right, and each follows from them or from values a step away: an argmax may find the other one of two scores that
    are a step apart.

    Args:
        pte: the bytes of the file.
        converted: the model that it was lowered from.
        batches: inputs to compare on: tensors, numbers and None, in tuples, lists and dictionaries.
        lower: makes a file of a part of the model, to find the first operator that differs.

    Raises:
        VerificationError: an output is not right; names the first operator whose result is not.
        RuntimeFailure: the file does not run; says the runtime's words, and the first operator with which it does not.
        FileError: the bytes are not those of a ``.pte`` file.
    """
    check_identifier(pte, "verify")
    try:
        actual = run_in_child(pte, batches)
    except RuntimeFailure as failure:
        named = _failure(failure, converted, batches[0], lower)
        if named is None:
            raise
        raise named from failure
    integers_equal, lowest, lowest_shaken = True, math.inf, math.inf
    for inputs, outputs in zip(batches, actual, strict=True):
        for found in agreements(converted, inputs, outputs):
            integers_equal = integers_equal and (found.is_right or not found.discrete)
            for each in _settled(found, converted, inputs, lower):
                lowest, lowest_shaken = min(lowest, each.sqnr_db), min(lowest_shaken, each.shaken_db)
                if not each.is_right:
                    raise _disagreement(each, converted, inputs, lower)
    within_one_step = lowest < FLOOR_DB and math.isinf(lowest_shaken)
    return Verification(lowest, within_one_step, integers_equal, len(batches), lowest_shaken)


# -- integers --------------------------------------------------------------------------------------------------------


def _settled(found: Agreement, converted: GraphModule, inputs: tuple[Any, ...], lower: Lower) -> Iterator[Agreement]:
    """Yields how an output agrees; of integers that differ, how the float values do that they are computed from."""
    node = found.node if found.discrete and not found.is_right else None
    sources = float_sources(node) if node is not None else []
    part = beginning(converted, [source.name for source in sources]) if sources else None
    values = _values(part, inputs, lower) if part is not None else None
    if node is None or part is None or values is None:
        yield found
        return
    for source, each in zip(sources, agreements(part, inputs, values), strict=True):
        yield replace(each, node=source)
    if not explained(converted, node, inputs, found.actual, dict(zip(sources, values, strict=True))):
        yield found


# -- what is wrong, and where ----------------------------------------------------------------------------------------


def _disagreement(found: Agreement, converted: GraphModule, inputs: tuple[Any, ...], lower: Lower) -> VerificationError:
    culprit = first_bad_operator(converted, inputs, lower, found.node)
    agree = f"agree with the converted model's by {found.sqnr_db:.1f} dB only (at least {FLOOR_DB:g} wanted)"
    what = "the file's integers are not what its values give" if found.discrete else f"the file's results {agree}"
    if culprit is None:
        remedy = "Every operator alone is right, and the whole is not: report it, with the model."
        return VerificationError(what, where="output", remedy=remedy)
    where = describe(culprit)
    return VerificationError(
        what, where=where, remedy=f"The first operator that differs is {where}: {_way_out(culprit)}"
    )


def _failure(
    failure: RuntimeFailure, converted: GraphModule, inputs: tuple[Any, ...], lower: Lower
) -> RuntimeFailure | None:
    """Returns the failure with the first operator with which it occurs; None where none is found."""
    if isinstance(failure.__cause__, subprocess.TimeoutExpired):
        return None
    output = converted.graph.find_nodes(op="output")[0]
    try:
        culprit = first_place(
            places(converted),
            output.all_input_nodes,
            lambda place: _values(beginning(converted, [place.name]), inputs, lower) is None,
        )
    except CalibrationError:  # The inputs are not the model's.
        return None
    if culprit is None:
        return None
    where = describe(culprit)
    remedy = f"The first operator with which the file does not run is {where}: {_way_out(culprit)}"
    return RuntimeFailure(failure.what, where=where, remedy=remedy)


def first_bad_operator(
    converted: GraphModule, inputs: tuple[Any, ...], lower: Lower, output: Node | None = None
) -> Node | None:
    """Returns the first operator whose result the file gets wrong; of those that an output depends on, if one is given.

    Integers are not compared, since they differ where ties are broken the other way: an output of integers is the
    first where the float values before it are right.
    """

    def goes_wrong(place: Node) -> bool:
        part = beginning(converted, [place.name])
        outputs = _values(part, inputs, lower)
        return outputs is None or not all(each.is_right for each in agreements(part, inputs, outputs))

    floats = [place for place in places(converted) if place.meta["val"].is_floating_point()]
    ends = [output] if output is not None else converted.graph.find_nodes(op="output")[0].all_input_nodes
    culprit = first_place(floats, ends, goes_wrong)
    is_discrete = output is not None and output.op == "call_function" and not output.meta["val"].is_floating_point()
    return output if culprit is None and is_discrete else culprit


def _values(part: GraphModule, inputs: tuple[Any, ...], lower: Lower) -> tuple[Any, ...] | None:
    """Returns what a file of the part gives; None where it cannot be made or run."""
    finite = pytree.tree_map_only(torch.Tensor, torch.nan_to_num, inputs)  # Lowering takes no others.
    try:
        return run_in_child(lower(part, finite), [inputs])[0]
    except CalibrationError:
        raise
    except (RuntimeError, AssertionError):
        return None


def _way_out(node: Node) -> str:
    """Returns what can be done about an operator that ExecuTorch gets wrong."""
    dequantized = [source for source in node.all_input_nodes if source.target in ops.DEQUANTIZE_OPS]
    if output_quantize(node) is not None or any(_is_weight(source) for source in dequantized):
        return "leave it float (set_module_name or set_operator_type None)."
    report = "write it with other operators, or report it to ExecuTorch."
    if dequantized:
        return f"it is float already. Leave the operators before it float as well, {report}"
    return f"it is float already, and ExecuTorch gets it wrong in float as well: {report}"


def _is_weight(dequantize: Node) -> bool:
    return dequantize.all_input_nodes[0].op == "get_attr"
