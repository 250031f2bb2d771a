"""Train and eval mode, and the device, of exported models, where export has written them into the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node, Tracer

from zeropoint.core.errors import CaptureError
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode, keeps_statistics, set_train_mode
from zeropoint.graph.bind import argument, argument_names, set_argument
from zeropoint.graph.counters import Counters
from zeropoint.graph.devices import check_types_stay, destination, device_of, move_attributes, write_device
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.late_code import LateCode
from zeropoint.graph.no_ops import DROPOUTS
from zeropoint.graph.source import module_stack

aten = torch.ops.aten
NORMS = (*BATCH_NORMS, aten.instance_norm.default)
RANDOM = (
    *DROPOUTS, aten.native_dropout.default, aten.rrelu.default, aten.rrelu_.default, aten.rrelu_with_noise.default,
    aten.rrelu_with_noise_functional.default, aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data,
    aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data,
)  # fmt: skip
"""Operators that draw random numbers in train mode only."""
ATTENTION = aten.scaled_dot_product_attention.default
FLAGS = ("training", "train", "use_input_stats")
"""Names of the argument that says the mode."""
FROZEN_KEY = "zeropoint_frozen"
"""Metadata of a norm that stays in eval mode."""
_DROPOUT_MODULES = "torch.nn.modules.dropout."
HELD_KEY = "zeropoint_held"
"""Metadata of a batch norm that ``freeze_batch_norm`` put into eval mode, and ``thaw_batch_norm`` lets go again."""
DROPOUT_P_KEY = "zeropoint_dropout_p"
"""Metadata of an attention in eval mode: its dropout in train mode."""


def move_exported_model_to_eval(model: GraphModule) -> GraphModule:
    """Returns the model, its graph changed to eval mode: what ``eval()`` does to the module that was exported.

    Dropout of each kind and RReLU do nothing random, batch norm and instance norm use their running statistics and
    leave them as they are, and batches are not counted. Probabilities, ``eps`` and ``momentum`` stay. A norm without
    running statistics has one mode only, and stays too. The bodies of control flow operators are changed as well.
    Nothing is done twice; a graph that changes is recompiled, another one is not.

    Raises:
        CaptureError: the model is no graph module.
    """
    return _move(model, training=False)


def move_exported_model_to_train(model: GraphModule) -> GraphModule:
    """Returns the model, its graph changed to train mode: what ``train()`` does to the module that was exported.

    What was exported in eval mode is trained too, batch norm with its running statistics as a start. Not so a norm that
    was in eval mode while another one of the model, or an ``nn.Dropout``, was in train mode: it was frozen, and its
    statistics stay. What export left out in eval mode cannot come back: the dropout of attention, which is a number
    there; and a batch norm with ``momentum=None``, exported in eval mode, has momentum 0 in its graph, so that its
    statistics stay.

    Raises:
        CaptureError: the model is no graph module.
    """
    return _move(model, training=True)


def freeze_batch_norm(model: GraphModule) -> int:
    """Lets each batch norm normalize by its running statistics and leave them as they are, in train mode too.

    Its weight and bias still train, and dropout still drops. Bodies of control flow are changed as well. A graph that
    changes is recompiled. Returns how many batch norms have running statistics.
    """
    _mark_frozen(_deciding(model))
    return sum(_hold(graph, _batch_norms(graph)) for graph in _graphs(model))


def thaw_batch_norm(model: GraphModule) -> None:
    """Undoes ``freeze_batch_norm``: a model in train mode normalizes by each batch again. Others stay frozen."""
    for graph in _graphs(model):
        held = [norm for norm in _batch_norms(graph) if norm.meta.pop(HELD_KEY, False)]
        for norm in held:
            norm.meta.pop(FROZEN_KEY, None)
        if held and model.training:
            counters = Counters(graph)
            for norm in held:
                set_train_mode(norm, True)
                counters.start(norm)
            graph.recompile()


def count_batch_norms(model: GraphModule) -> int:
    """Returns how many batch norms have running statistics, in the bodies of control flow too."""
    return sum(len(_batch_norms(graph)) for graph in _graphs(model))


def _batch_norms(model: GraphModule) -> list[Node]:
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS and keeps_statistics(node)]


def _hold(model: GraphModule, norms: list[Node]) -> int:
    counters = Counters(model) if norms else None
    is_changed = False
    for norm in norms:
        if FROZEN_KEY not in norm.meta:
            norm.meta[FROZEN_KEY] = norm.meta[HELD_KEY] = True
        if is_in_train_mode(norm):
            set_train_mode(norm, False)
            is_changed = True
        if counters is not None:
            is_changed |= counters.stop(norm)
    if is_changed:
        model.recompile()
    return len(norms)


def allow_exported_model_train_eval(model: GraphModule) -> GraphModule:
    """Returns the model, whose ``train()`` and ``eval()`` now do what the functions above do; copies of it do too.

    Models that ``prepare_pt2e`` and ``convert_pt2e`` return are such already.

    Raises:
        CaptureError: the model is no graph module.
    """
    _require_graph(model)
    for name in ("train", "eval"):  # Export, and torchao, put functions there that refuse.
        model.__dict__.pop(name, None)
    become(model, SwitchedModule)
    tell_mode(model)
    return model


class SwitchedModule(LateCode):
    """A graph module whose ``train()``, ``eval()`` and ``to(device)`` change its graph, as they do an ``nn.Module``."""

    runs_otherwise_in_eval = False
    """Its code depends on ``training``, besides on the graph."""

    def train(self, mode: bool = True) -> SwitchedModule:
        """Returns the module, moved to train mode, or to eval mode."""
        _move(self, training=mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SwitchedModule:
        """Returns the module, its tensors changed: what ``to``, ``cuda``, ``cpu``, ``half`` and their like call.

        Raises:
            GraphError: the tensors of a graph that is quantized would be of another type.
        """
        graphs = list(_graphs(self))
        check_types_stay(graphs, fn)
        before = device_of(self)
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        for graph in graphs:
            move_attributes(graph, fn)
        device = destination(fn) if before is None else device_of(self)
        if device is not None and device != before:
            for graph in graphs:
                write_device(graph, device)
        return self

    def __copy__(self) -> GraphModule:
        return _rebuild(_kind(self), super().__copy__, ())

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        arguments[0]["_tracer_cls"] = BufferTracer
        return _rebuild, (_kind(self), rebuild, arguments)


class BufferTracer(Tracer):
    """Traces an unpickled graph: what is computed of buffers, such as running statistics, stays computed."""

    proxy_buffer_attributes = True


def _kind(model: GraphModule) -> type[GraphModule]:
    return next(each for each in type(model).__mro__ if not each.__qualname__.endswith("GraphModuleImpl"))


def _rebuild(kind: type[GraphModule], rebuild: Callable[..., GraphModule], arguments: tuple[Any, ...]) -> GraphModule:
    model = rebuild(*arguments)
    become(model, kind)
    return model


def become(model: GraphModule, kind: type[GraphModule]) -> None:
    """Makes a graph module one of a kind, in place: torch gives each a class of its own, whose base this changes."""
    if not isinstance(model, kind):
        own = type(model)
        own.__bases__ = (kind, *(base for base in own.__bases__ if not issubclass(kind, base)))


def mode_of(model: GraphModule) -> bool | None:
    """Returns True for a graph in train mode; None where nothing depends on the mode.

    Norms and modules for dropout decide where there are some: a function may drop values in eval mode too.
    """
    modes = [(_decides(node), mode) for node in _nodes(model) if (mode := _mode(node)) is not None]
    deciding = [mode for decides, mode in modes if decides]
    return any(deciding or (mode for _, mode in modes)) if modes else None


def _decides(node: Node) -> bool:
    """True for a norm, and for the dropout of a module such as ``nn.Dropout``: both have the mode of their module."""
    return node.target in NORMS or any(kind.startswith(_DROPOUT_MODULES) for _, kind in module_stack(node)[-1:])


def tell_mode(model: GraphModule) -> None:
    """Sets ``training`` of the model and its modules to the mode of its graph: export leaves it True."""
    mode = mode_of(model)
    if mode is not None:
        _set_flags(model, mode)


def _move(model: GraphModule, training: bool) -> GraphModule:
    _require_graph(model)
    _mark_frozen(_deciding(model))
    is_turned = model.training != training
    _set_flags(model, training)
    for graph in _graphs(model):
        is_switched = _switch(graph, training)
        if is_switched or (is_turned and getattr(graph, "runs_otherwise_in_eval", False)):
            graph.recompile()
    return model


def _deciding(model: GraphModule) -> list[Node]:
    return [node for node in _nodes(model) if _decides(node) and _mode(node) is not None]


def _mark_frozen(deciding: list[Node]) -> None:
    """Remembers the norms that are in eval mode while another one, or dropout, is in train mode."""
    if any(map(_mode, deciding)):
        for norm in (node for node in deciding if node.target in NORMS):
            norm.meta.pop(FROZEN_KEY, None)
            if not _mode(norm):
                norm.meta[FROZEN_KEY] = True


def _switch(model: GraphModule, training: bool) -> bool:
    """Changes one graph, without its bodies; True where there was something to change."""
    nodes = [(node, mode) for node in model.graph.nodes if (mode := _mode(node)) is not None]
    counters = Counters(model) if any(node.target in BATCH_NORMS for node, _ in nodes) else None
    is_changed = False
    for node, mode in nodes:
        if mode != training and not (training and FROZEN_KEY in node.meta):
            _set_mode(node, training)
            is_changed = True
            if training and counters is not None and node.target in BATCH_NORMS:
                counters.start(node)
        if not training and counters is not None and node.target in BATCH_NORMS:
            is_changed |= counters.stop(node)
    return is_changed


def _mode(node: Node) -> bool | None:
    """Returns True for an operator in train mode; None for one that has no mode, or one only."""
    if node.target in BATCH_NORMS:
        return is_in_train_mode(node) if keeps_statistics(node) else None
    if node.target in NORMS:
        return bool(argument(node, "use_input_stats")) if keeps_statistics(node) else None
    if node.target is ATTENTION:
        return True if argument(node, "dropout_p") else False if DROPOUT_P_KEY in node.meta else None
    return bool(argument(node, _flag(node))) if node.target in RANDOM else None


def _set_mode(node: Node, training: bool) -> None:
    if node.target in BATCH_NORMS:
        set_train_mode(node, training)
    elif node.target is not ATTENTION:
        set_argument(node, _flag(node), training)
    elif training:
        set_argument(node, "dropout_p", node.meta.pop(DROPOUT_P_KEY))
    else:
        node.meta[DROPOUT_P_KEY] = argument(node, "dropout_p")
        set_argument(node, "dropout_p", 0.0)


def _flag(node: Node) -> str:
    return next(name for name in FLAGS if name in argument_names(node))


def _graphs(model: GraphModule) -> Iterator[GraphModule]:
    yield model
    for _, body in bodies(model):
        yield from _graphs(body)


def _nodes(model: GraphModule) -> Iterator[Node]:
    yield from (node for graph in _graphs(model) for node in graph.graph.nodes if node.op == "call_function")


def _set_flags(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training


def _require_graph(model: object) -> None:
    if not isinstance(model, GraphModule):
        remedy = "Call its own train() or eval(), or export it: torch.export.export(model, example_inputs).module()."
        raise CaptureError(f"got {type(model).__name__}, not a graph module", remedy=remedy)
