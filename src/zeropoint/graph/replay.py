"""Activation checkpointing: a model that is called again on the way back computes what it computed before.

``torch.utils.checkpoint`` keeps no activations and calls the model a second time in the backward pass. What a call
changes, ranges of observers and statistics of batch norm, would then be changed twice, and already changed where the
second call reads it: other scales, other gradients.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.batch_norms import BATCH_NORMS, STATISTICS
from zeropoint.graph.bind import argument
from zeropoint.graph.compat import in_backward, saves_by_hooks
from zeropoint.graph.constants import attributes_behind, mutated_attributes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.observers import observer_of

KEPT = 8
"""Calls of one model that may wait for their backward pass."""
_waiting: weakref.WeakKeyDictionary[nn.Module, deque[tuple[Any, _State]]] = weakref.WeakKeyDictionary()


@contextmanager
def replayed(model: GraphModule, inputs: Any) -> Generator[None]:
    """Runs a call of the model. One that checkpointing repeats begins as the first one did, and changes nothing."""
    if torch.compiler.is_compiling():
        yield
    elif in_backward():
        before = _take(model, _key(inputs))
        if before is None:
            yield
            return
        after = _State(model)
        before.restore()
        try:
            yield
        finally:
            after.restore()
    else:
        if saves_by_hooks():
            _waiting.setdefault(model, deque(maxlen=KEPT)).append((_key(inputs), _State(model)))
        yield


def _key(inputs: Any) -> Any:
    tensors = [each for each in pytree.tree_leaves(inputs) if isinstance(each, torch.Tensor)]
    return tuple((each.data_ptr(), each.shape) for each in tensors)


def _take(model: GraphModule, key: Any) -> _State | None:
    """Returns the state before the last call with these inputs, and forgets it."""
    waiting = _waiting.get(model, deque[tuple[Any, _State]]())
    found = next((each for each in reversed(waiting) if each[0] == key), None)
    if found is not None:
        waiting.remove(found)
    return None if found is None else found[1]


class _State:
    """What a call of a model may change, as it is now."""

    def __init__(self, model: GraphModule) -> None:
        graphs = [model, *(body for _, body in bodies(model))]
        modules = {module for graph in graphs for module in _observing(graph)}
        self._plain = {module: _numbers(module) for module in modules}
        self._tensors = {
            module: [{name: _clone(each) for name, each in kind.items()} for kind in _kinds(module)]
            for module in modules
        }
        written = {id(each): each for graph in graphs for each in _written(graph)}
        self._written = [(each, each.detach().clone()) for each in written.values()]

    def restore(self) -> None:
        """Puts all of it back. What autograd has kept of the tensors stays valid: they are written as data."""
        for tensor, value in self._written:
            tensor.data.copy_(value)
        for module, numbers in self._plain.items():
            module.__dict__.update(numbers)
        for module, kinds in self._tensors.items():
            for now, saved in zip(_kinds(module), kinds, strict=True):
                _put(now, saved)


def _observing(graph: GraphModule) -> Iterator[nn.Module]:
    for node in graph.graph.nodes:
        observer = observer_of(graph, node)
        if observer is not None:
            yield from observer.modules()


def _kinds(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of an observer that are no tensors and may be others after a call, such as counts."""
    plain = (int, float, tuple, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "training"}


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _put(now: dict[str, Any], saved: dict[str, torch.Tensor | None]) -> None:
    for name in set(now) - set(saved):
        del now[name]
    for name, value in saved.items():
        current = now.get(name)
        if current is None or value is None:
            now[name] = _clone(value)
        elif current.shape == value.shape:
            current.data.copy_(value)
        else:
            current.data = value.clone()


def _written(graph: GraphModule) -> Iterator[torch.Tensor]:
    """Yields the buffers that a call writes to; the operator of batch norm does not say that it does."""
    paths = mutated_attributes(graph.graph)
    for node in graph.graph.nodes:
        if node.target in BATCH_NORMS:
            for name in STATISTICS:
                statistic = argument(node, name)
                paths |= set() if statistic is None else attributes_behind(statistic)
    yield from (get_attribute(graph, path) for path in paths)
