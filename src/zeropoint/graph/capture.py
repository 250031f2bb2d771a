"""From a module, an exported program or its module to a graph module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.core.arguments import require_bool
from zeropoint.core.errors import CaptureError, SpecError
from zeropoint.graph.copies import copy_graph, deep_copy
from zeropoint.graph.train_eval import SwitchedModule, mode_of, move_exported_model_to_eval


def capture(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
) -> GraphModule:
    """Returns the model as an exported graph module: in eval mode, or as it is where it is exported already.

    Args:
        model: an ``nn.Module`` (exported here, and left in the mode that it is in), an ``ExportedProgram``, or what its
            ``.module()`` gave. The mode of an export is that of the module when it was exported.
        example_inputs: positional inputs, shapes and dtypes as in use.
        dynamic_shapes: as in ``torch.export.export``, e.g. ``({0: torch.export.Dim.DYNAMIC},)`` for a free batch.
        strict: export with the tracing of Python bytecode, which some vendors' quantizers need.

    Raises:
        CaptureError: the model cannot be exported, or two example inputs are the same tensor object.
        SpecError: ``dynamic_shapes`` or ``strict`` is given for a model that is exported already.
    """
    require_bool("strict", strict, "capture")
    match model:
        case ExportedProgram():
            _check_not_given(model, dynamic_shapes, strict)
            return model.module()  # type: ignore[return-value]
        case GraphModule() if is_exported(model):
            _check_not_given(model, dynamic_shapes, strict)
            return model
        case nn.Module():
            return _export(model, example_inputs, dynamic_shapes, strict)
        case _:
            remedy = "Give an nn.Module, an ExportedProgram or the result of its .module()."
            raise CaptureError(f"got {type(model).__name__}, not a model", remedy=remedy)


def capture_in_eval_mode(
    model: nn.Module | ExportedProgram | GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None
) -> GraphModule:
    """Returns what ``capture`` does, in eval mode whatever mode it was exported in, with a graph of its own.

    Weights are shared with the model; but of one that was in train mode, which writes to its statistics, all is copied.

    Raises:
        CaptureError, SpecError: as ``capture``.
    """
    captured = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    return move_exported_model_to_eval(deep_copy(captured)) if mode_of(captured) else copy_graph(captured)


def capture_given(model: Any, example_inputs: tuple[Any, ...] | None, where: str) -> GraphModule:
    """Returns what ``capture`` does, for functions that take example inputs of modules only.

    Raises:
        CaptureError: as ``capture``; or a module that is not exported comes without example inputs.
    """
    if example_inputs is None and not isinstance(model, ExportedProgram) and not is_exported(model):
        remedy = "Give example_inputs=(x,), a tuple of positional inputs, or an exported program."
        raise CaptureError(f"{type(model).__name__} is not exported", where=where, remedy=remedy)
    return capture(model, () if example_inputs is None else example_inputs)


def capture_for_training(
    model: nn.Module | ExportedProgram | GraphModule, example_inputs: tuple[Any, ...], *, dynamic_shapes: Any = None
) -> GraphModule:
    """Returns the model as an exported graph module with weights of its own, for training.

    A module is exported in train mode: as it is where it is in that, so that what is frozen stays frozen. One that
    cannot be exported so with these inputs, such as a batch norm with one value per channel, is exported in eval mode.

    Raises:
        CaptureError, SpecError: as ``capture``.
    """
    if isinstance(model, nn.Module) and not is_exported(model):
        try:
            with _in_train_mode(model), torch.no_grad():
                exported = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
            return deep_copy(exported.module())  # type: ignore[return-value]
        except Exception:  # What export raises is of no one kind; in eval mode it is raised again, or does not matter.
            logging.getLogger(__name__).debug("export in train mode failed", exc_info=True)
    return deep_copy(capture(model, example_inputs, dynamic_shapes=dynamic_shapes))


def _check_not_given(model: object, dynamic_shapes: Any, strict: bool) -> None:
    """Refuses what is decided when a model is exported."""
    name = "dynamic_shapes" if dynamic_shapes is not None else "strict=True"
    if dynamic_shapes is not None or strict:
        what = f"{name} is given, but the model is exported already ({type(model).__name__}), and that is settled"
        remedy = f"Give {name} to torch.export.export, or the module in place of its export."
        raise SpecError(what, where="capture", remedy=remedy)


def is_exported(m: object) -> bool:
    """True for a graph module whose nodes carry values, as ``torch.export`` makes them."""
    return isinstance(m, GraphModule) and any("val" in node.meta for node in m.graph.nodes)


def require_exported(model: object) -> GraphModule:
    """Returns the model when it is an exported graph module.

    Raises:
        CaptureError: it is anything else, or was pickled; the message says how to export it.
    """
    if isinstance(model, GraphModule) and _is_pickled(model):
        remedy = "Save its state_dict(), and load that into a model that is exported and prepared anew."
        raise CaptureError("the graph was pickled, as torch.save(model) does, and lost its metadata", remedy=remedy)
    if isinstance(model, GraphModule) and is_exported(model):
        return model
    remedy = "Export it first: torch.export.export(model, example_inputs).module()."
    if isinstance(model, ExportedProgram):
        remedy = "Take its module: exported_program.module()."
    raise CaptureError(f"got {type(model).__name__}, not an exported graph module", remedy=remedy)


def _is_pickled(model: GraphModule) -> bool:
    """True for a graph of ours of whose inputs nothing is known: unpickling traces it anew, without metadata."""
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    return isinstance(model, SwitchedModule) and bool(inputs) and not any("val" in node.meta for node in inputs)


def _export(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, strict: bool) -> GraphModule:
    if not isinstance(inputs, tuple):
        remedy = "Give a tuple of positional inputs, e.g. (x,)."
        raise CaptureError(f"example_inputs is {type(inputs).__name__}, not a tuple", remedy=remedy)
    _check_distinct(inputs)
    with _in_eval_mode(model):
        try:
            with torch.no_grad():
                exported = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=strict)
        except Exception as error:
            remedy = "Make torch.export.export(model, example_inputs) work first; its message is above."
            what = f"torch.export could not export the model: {type(error).__name__}: {str(error).strip()}"
            raise CaptureError(what, where=type(model).__name__, remedy=remedy) from error
    return exported.module()  # type: ignore[return-value]


def _check_distinct(inputs: tuple[Any, ...]) -> None:
    """torch.export merges two inputs that are one object, nested ones too, without a word."""
    seen: dict[int, int] = {}
    for position, value in enumerate(pytree.tree_leaves(inputs)):
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) in seen:
            what = f"example inputs {seen[id(value)]} and {position} are one tensor object; export would merge them"
            raise CaptureError(what, remedy="Pass distinct tensors, e.g. x.clone().")
        seen[id(value)] = position


@contextmanager
def _in_train_mode(model: nn.Module) -> Generator[None]:
    """Trains every submodule for the duration, unless the module is in train mode already; then restores each one's."""
    if model.training:
        yield
        return
    training = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in training:
            if isinstance(module, SwitchedModule):
                module.train(mode)
            else:
                module.training = mode


@contextmanager
def _in_eval_mode(model: nn.Module) -> Generator[None]:
    """Evaluates every submodule for the duration, then restores each one's own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            if isinstance(module, SwitchedModule):
                module.train()
            else:
                module.training = True


class WrapperModule(nn.Module):
    """A function as a module, to be exported."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns."""
        return self.fn(*args, **kwargs)


def pattern_graph(
    pattern: Callable[..., Any], example_inputs: tuple[Any, ...], is_cuda: bool = False, **kwargs: Any
) -> GraphModule:
    """Returns the graph of a module or function, as a pattern to look for with ``torch.fx``'s matchers.

    What export adds to a program is left out: its checks of sizes, and what writes values back to inputs.

    Args:
        is_cuda: export with the inputs on the GPU, where some operators are spelled in another way.
        **kwargs: example inputs by name.
    """
    module = pattern if isinstance(pattern, nn.Module) else WrapperModule(pattern)
    if is_cuda:
        example_inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, example_inputs)
    model: Any = torch.export.export(module, example_inputs, kwargs, strict=True).module()
    for node in reversed(model.graph.nodes):
        is_write = node.target is torch.ops.aten.copy_.default
        if not node.users and (is_write or node.op == "call_module" or not node.is_impure()):
            model.graph.erase_node(node)
    model.recompile()
    return model
