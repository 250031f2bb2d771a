"""Parameters, buffers and submodules of a graph module by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from zeropoint.core.errors import GraphError


def owner_and_name(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the submodule that holds the attribute at ``path``, and the attribute's own name."""
    prefix, _, name = path.rpartition(".")
    return (model.get_submodule(prefix) if prefix else model), name


def get_attribute(model: nn.Module, path: str) -> torch.Tensor:
    """Returns the tensor at a dotted path.

    Raises:
        GraphError: there is no tensor there.
    """
    try:
        owner, name = owner_and_name(model, path)
        value = getattr(owner, name)
    except AttributeError as error:
        raise GraphError(f"the model has no attribute {path!r}", where=path) from error
    if not isinstance(value, torch.Tensor):
        raise GraphError(f"the attribute is {type(value).__name__}, not a tensor", where=path)
    return value


def set_parameter(model: nn.Module, path: str, value: torch.Tensor) -> None:
    """Puts a tensor at an existing dotted path, as what was there: parameter or buffer."""
    owner, name = owner_and_name(model, path)
    if name in owner._parameters:
        before = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(value, requires_grad=before is not None and before.requires_grad)
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, value)


def give_attributes(model: nn.Module, origin: nn.Module, paths: Iterable[str]) -> None:
    """Gives a module what another one has at these paths, as what it is there: parameter, buffer, saved or not, module.

    Modules that only hold something are new ones. A tensor that is neither parameter nor buffer becomes a buffer. What
    GraphModule does itself, in a tenth of the time.

    Raises:
        AttributeError: there is nothing at a path.
    """
    pairs = {"": (origin, model)}
    for path in paths:
        prefix, _, name = path.rpartition(".")
        source, target = _holders(prefix, pairs)
        if source is not target:  # Else the whole module was given already.
            _give(target, source, name)


def _holders(path: str, pairs: dict[str, tuple[nn.Module, nn.Module]]) -> tuple[nn.Module, nn.Module]:
    if path not in pairs:
        prefix, _, name = path.rpartition(".")
        source, target = _holders(prefix, pairs)
        if source is not target and name not in target._modules:
            target.add_module(name, nn.Module())
        pairs[path] = getattr(source, name), getattr(target, name)
    return pairs[path]


def _give(target: nn.Module, source: nn.Module, name: str) -> None:
    if name in source._parameters:
        target._parameters[name] = source._parameters[name]
    elif name in source._modules:
        target._modules[name] = source._modules[name]
    elif isinstance(value := getattr(source, name), torch.Tensor):
        target.register_buffer(name, value, persistent=name not in source._non_persistent_buffers_set)
    else:
        setattr(target, name, value)


class Names:
    """Gives unused attribute names ``prefix0, prefix1, ...`` in constant time each."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._next: dict[str, int] = {}

    def new(self, prefix: str) -> str:
        """Returns the next name with this prefix that the model does not have."""
        index = self._next.get(prefix, 0)
        while self._has(f"{prefix}{index}"):
            index += 1
        self._next[prefix] = index + 1
        return f"{prefix}{index}"

    def _has(self, name: str) -> bool:
        """As ``hasattr``, which takes a module ten times as long where the answer is no."""
        model = self._model
        held = name in model._modules or name in model._parameters or name in model._buffers
        return held or name in vars(model) or name in vars(type(model))


def get_new_attr_name_with_prefix(prefix: str) -> Callable[[nn.Module], str]:
    """Returns a function of a module that returns a name which it does not have: the prefix and a number.

    Dots become underscores. Where the module has names up to some number, as it has from earlier calls, the next is
    found in logarithmic time; where it has others, that with the smallest number need not be.
    """
    stem = prefix.replace(".", "_")

    def new_name(module: nn.Module) -> str:
        taken, free = -1, 0
        while hasattr(module, f"{stem}{free}"):
            taken, free = free, 2 * free + 1
        while free - taken > 1:
            middle = (taken + free) // 2
            taken, free = (middle, free) if hasattr(module, f"{stem}{middle}") else (taken, middle)
        return f"{stem}{free}"

    return new_name


def attribute_reads(graph: Graph) -> Iterator[Node]:
    """Yields the ``get_attr`` nodes of a graph."""
    yield from (node for node in graph.nodes if node.op == "get_attr")


def tensors_of(model: GraphModule) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by path, each path of a tied tensor too."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))
