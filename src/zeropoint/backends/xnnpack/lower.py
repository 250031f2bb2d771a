"""From a converted graph to a ``.pte`` file that runs on the XNNPACK delegate."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.backends.xnnpack import edge
from zeropoint.backends.xnnpack.config import POLICY
from zeropoint.backends.xnnpack.embedding import look_up_bytes
from zeropoint.backends.xnnpack.repair import begin_names_with_letters, give_each_batch_norm_its_weight, repair
from zeropoint.backends.xnnpack.sound import SIZE_RULES, check_sound
from zeropoint.backends.xnnpack.transform import TO_LOWER, spell
from zeropoint.core.errors import LoweringError
from zeropoint.core.extras import import_extra
from zeropoint.core.policy import RECORD_KEY
from zeropoint.core.quiet import quiet_tree_specs
from zeropoint.graph.capture import capture, require_exported
from zeropoint.graph.compat import is_tensor_value, largest_size
from zeropoint.graph.copies import deep_copy
from zeropoint.graph.emit import complete_values
from zeropoint.graph.graph_pass import recompile
from zeropoint.graph.inputs import free_axes, free_sizes, inputs_for, with_free_sizes
from zeropoint.graph.no_ops import erase_no_ops
from zeropoint.graph.observers import has_observers
from zeropoint.numerics import ops

REFERENCE = torch.ops.higher_order.out_dtype
"""An operator that the reference representation has, and no other graph."""
EXAMPLES = "example_inputs"
LINES = 4
"""Of an error of ExecuTorch that are shown; the others are a print of its graph."""
CYCLE = "dependency cycle"
"""In the message of torch.fx where a piece reads what is computed from itself outside."""


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """A ``.pte`` file in memory.

    Args:
        pte: the bytes of the file.
        delegates: how many pieces run on the delegate; one is best.
        outside: the operators left outside of it, by name, with how often.
        free: the largest size of each axis of an input that is free, by ``input[axis]``.
    """

    pte: bytes
    delegates: int
    outside: tuple[tuple[str, int], ...]
    free: tuple[tuple[str, int], ...] = ()


def lower(converted: GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> bytes:
    """Returns the ``.pte`` file of a converted model.

    Args:
        converted: what ``convert_pt2e`` returned. It is not changed.
        example_inputs: positional inputs; their sizes are those of the file where these are not free.
        dynamic_shapes: which sizes are free, as in ``torch.export.export``; None: those that are free in the model.
            The runtime reserves memory for the largest size; one without an end may grow to 64, or to four times its
            size in ``example_inputs``.

    Raises:
        LoweringError: the delegate would compute an operator of the graph wrongly; names each. Or ExecuTorch fails.
        MissingExtraError: executorch is not installed.
    """
    return lower_program(converted, example_inputs, dynamic_shapes=dynamic_shapes).pte


def lower_program(
    converted: GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None
) -> LoweredProgram:
    """Returns what ``lower`` returns, with what became of its operators. Same arguments and errors."""
    inputs = inputs_for(require_exported(converted), example_inputs, EXAMPLES)
    model = repaired(converted)
    check_sound(model)
    return _lower(model, inputs, dynamic_shapes)


def repaired(converted: GraphModule) -> GraphModule:
    """Returns a copy of a converted model as it is lowered: spelled for the delegate, with all repairs made.

    Raises:
        LoweringError: it is not converted, or was annotated for another backend.
    """
    model = deep_copy(require_exported(converted))
    _check_made_for(model)
    _check_converted(model)
    complete_values(model)
    erase_no_ops(model)
    spell(model, TO_LOWER)
    look_up_bytes(model)
    repair(model)
    return model


def lower_float(model: nn.Module, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> LoweredProgram:
    """Returns the ``.pte`` file of a model as it is, in float: what a quantized one is compared with."""
    captured = deep_copy(capture(model, example_inputs, dynamic_shapes=dynamic_shapes))
    spell(captured, TO_LOWER)
    return _lower(captured, inputs_for(captured, example_inputs, EXAMPLES), dynamic_shapes)


def _check_made_for(model: GraphModule) -> None:
    policy = getattr(model.meta.get(RECORD_KEY), "policy", None)
    if policy is not None and policy.name != POLICY.name:
        what = f"the graph was annotated for the backend {policy.name!r}"
        raise LoweringError(what, where="xnnpack.lower", remedy="Annotate it with XNNPACKQuantizer.")


def _check_converted(model: GraphModule) -> None:
    if has_observers(model):
        what = "the model still has observers"
        raise LoweringError(what, where="xnnpack.lower", remedy="Give what convert_pt2e returned.")
    is_reference = getattr(model.meta.get(RECORD_KEY), "representation", None) == "reference"
    if is_reference or any(_is_integer_arithmetic(node) for node in model.graph.nodes):
        what = "the model is in the reference representation, and the delegate takes quantize and dequantize operators"
        remedy = "Convert with use_reference_representation=False, from a model that is prepared anew."
        raise LoweringError(what, where="xnnpack.lower", remedy=remedy)


def _is_integer_arithmetic(node: Node) -> bool:
    """True for what only the reference representation has: export drops the record that says so."""
    source = node.args[0] if node.target is torch.ops.aten.to.dtype else None
    return node.target is REFERENCE or (isinstance(source, Node) and source.target in ops.QUANTIZE_OPS)


def _lower(model: GraphModule, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> LoweredProgram:
    import_extra("executorch.kernels.quantized", "executorch")
    give_each_batch_norm_its_weight(model)
    begin_names_with_letters(model)
    recompile(model)
    exported = _exported(model, example_inputs, dynamic_shapes)
    check_sound(exported.graph_module, SIZE_RULES)
    try:
        return _divided(exported)
    except Exception as error:
        what = f"ExecuTorch could not lower the model: {_chain(error)}"
        remedy = (
            "Where the message names an operator that is quantized, leave that float (set_module_name or "
            "set_operator_type None); where lower_float fails on the float model as well, write it with others."
        )
        raise LoweringError(what, where="xnnpack.lower", remedy=remedy) from error


def _chain(error: BaseException) -> str:
    """Returns an error and those behind it in words: ExecuTorch names the operator in the first one only."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        parts.append(f"{type(current).__name__}: {' '.join(lines[:LINES])}")
        current = current.__cause__ or current.__context__
    return "\n  because of ".join(dict.fromkeys(parts))


def _divided(exported: ExportedProgram) -> LoweredProgram:
    """Returns the program with all that the delegate takes in as few pieces as ExecuTorch's partitioner finds.

    Pieces of several operators can come to depend on each other; then each operator becomes a piece.
    """
    try:
        return _delegated(exported)
    except Exception as error:
        if CYCLE not in str(error):
            raise
        return _delegated(exported, per_op_mode=True)


def _delegated(exported: ExportedProgram, **settings: Any) -> LoweredProgram:
    exir = import_extra("executorch.exir", "executorch")
    partition = import_extra("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    configs = import_extra("executorch.backends.xnnpack.utils.configs", "executorch")
    with quiet_tree_specs():
        program = exir.to_edge_transform_and_lower(
            exported,
            partitioner=[partition.XnnpackPartitioner(**settings)],
            transform_passes=configs.get_transform_passes([edge.repair_program]),
        )
    _keep_beginnings(program.exported_program())
    delegates, outside = _whereabouts(program.exported_program())
    with quiet_tree_specs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mutation on a buffer")  # It says to do what is done here.
        pte = bytes(program.to_executorch().buffer)
    return LoweredProgram(pte, delegates, outside, _free(exported))


def _keep_beginnings(program: ExportedProgram) -> None:
    """Lets buffers that the model writes to begin as they are; else each would begin at 0, whatever it holds."""
    signature = program.graph_signature
    tensors: dict[str, Any] = {**program.constants, **program.state_dict}
    written = set(signature.buffers_to_mutate.values())
    begins = {name: tensors[path] for name, path in signature.inputs_to_buffers.items() if path in written}
    for node in program.graph.nodes:
        if node.name in begins and bool(begins[node.name].any()):
            node.meta["et_init_buffer"] = True


def _exported(model: GraphModule, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    if dynamic_shapes is None:
        dynamic_shapes = free_sizes(model, example_inputs)
        example_inputs = with_free_sizes(model, example_inputs)
    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, example_inputs)
    try:
        with torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        what = f"torch.export could not export the model: {type(error).__name__}: {str(error).strip()}"
        remedy = (
            "Sizes that are free here must be free in the export that was prepared: give both the same dynamic_shapes."
        )
        raise LoweringError(what, where="xnnpack.lower", remedy=remedy) from error


def _free(program: ExportedProgram) -> tuple[tuple[str, int], ...]:
    """Returns the free axes of a program's inputs with their largest sizes, where these have an end."""
    inputs = [
        node for node in program.graph.nodes if node.op == "placeholder" and is_tensor_value(node.meta.get("val"))
    ]
    free = [(f"{n.name}[{axis}]", largest_size(s)) for n in inputs for axis, s in free_axes(n.meta["val"]).items()]
    return tuple((axis, end) for axis, end in free if end is not None)


def _whereabouts(program: ExportedProgram) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Returns the number of delegate calls, and the operators that stand next to them."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [str(getattr(node.target, "__name__", node.target)) for node in calls]
    delegated = sum("executorch_call_delegate" in name for name in names)
    outside = Counter(n for n in names if "executorch_call_delegate" not in n and n != "getitem")
    return delegated, tuple(sorted(outside.items()))
