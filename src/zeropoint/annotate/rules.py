"""Rules: which configuration a node gets, by its name, module name, module type, operator or for the whole model."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import RuleError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import WRITTEN_KEY, describe, module_stack, operator_name

Choice = QuantizationConfig | None
Stack = tuple[tuple[str, str], ...]
ERASED_KEY = "zeropoint_erased"
"""Metadata of a model that is being prepared: the nodes that are no longer in its graph."""
NOT_SELECTED = "no rule selects it"


@dataclass
class Rules:
    """The user's choices. Precedence: node, module name, module type, operator type, global; the innermost module wins.

    A configuration of None means: leave float.
    """

    by_module_name: dict[str, Choice] = field(default_factory=dict)
    by_module_type: dict[str, Choice] = field(default_factory=dict)
    by_operator: dict[Any, Choice] = field(default_factory=dict)
    everything: Choice = None
    filter_function: Callable[[Node], bool] | None = None
    by_node_name: dict[str, Choice] = field(default_factory=dict)

    def choose(self, node: Node) -> tuple[Choice, str]:
        """Returns the node's configuration, or None with the reason why it stays float."""
        if self.filter_function is not None and not self.filter_function(node):
            return None, "the filter function leaves it out"
        rule = self._winner(node)
        return (self.everything, NOT_SELECTED) if rule is None else (rule[1], f"{rule[0]}, None) leaves it out")

    def _winner(self, node: Node) -> tuple[str, Choice] | None:
        return next(self.selecting(node.name, module_stack(node), targets_of(node)), None)

    def of_module(self, path: str) -> Choice:
        """Returns the configuration that a module has by its name, by that of one around it, or as all have it."""
        for around in paths_around(path):
            for pattern, config in reversed(self.by_module_name.items()):
                if matches(around, pattern):
                    return config
        return self.everything

    def selecting(self, name: str, stack: Stack, targets: tuple[Any, ...]) -> Iterator[tuple[str, Choice]]:
        """Yields the rules that select a node, the one that wins first: the beginning of its call, and its choice."""
        if name in self.by_node_name:
            yield f"set_node_name({name!r}", self.by_node_name[name]
        for path in paths_of(stack):
            for pattern, config in reversed(self.by_module_name.items()):
                if matches(path, pattern):
                    yield f"set_module_name({pattern!r}", config
        for _, kind in reversed(stack):
            if kind in self.by_module_type:
                yield f"set_module_type({kind}", self.by_module_type[kind]
        for target in targets:
            if target in self.by_operator:
                yield f"set_operator_type({target}", self.by_operator[target]

    def leaves_out(self, node: Node) -> bool:
        """True when a rule says that the node stays float, rather than no rule saying anything."""
        if self.filter_function is not None and not self.filter_function(node):
            return True
        rule = self._winner(node)
        return rule is not None and rule[1] is None

    def is_for_training(self) -> bool:
        """True when a configuration asks for fake quantizers."""
        chosen = [self.everything, *self.by_node_name.values(), *self.by_module_name.values()]
        chosen += self.by_module_type.values()
        return any(config is not None and config.is_qat for config in [*chosen, *self.by_operator.values()])

    def check_all_match(self, model: GraphModule) -> None:
        """Raises when a rule matches no node of the model, control flow bodies included, or cannot be honoured.

        A rule may match a node that was erased. What did nothing needs no more; what is computed by another node has
        to have the same configuration as that.

        Raises:
            RuleError: names the rule, and what the model has instead or which node computes what it selects.
        """
        nodes, gone_nodes = list(calls(model)), list(erased(model))
        stacks = [module_stack(node) for node in nodes] + [gone.stack for gone, _ in gone_nodes]
        targets = {target for node in nodes for target in targets_of(node)}
        targets |= {target for gone, _ in gone_nodes for target in gone.targets}
        paths = sorted({path for stack in stacks for path in paths_of(stack) if path})
        kinds = sorted({kind for stack in stacks for _, kind in stack})
        names = [node.name for node in nodes] + [gone.name for gone, _ in gone_nodes]
        for name in self.by_node_name:
            if name not in names:
                raise _unmatched(f"set_node_name({name!r})", "nodes", names)
        for pattern in self.by_module_name:
            if not any(matches(path, pattern) for path in paths):
                raise _unmatched(f"set_module_name({pattern!r})", "modules", paths)
        for kind in self.by_module_type:
            if kind not in kinds:
                raise _unmatched(f"set_module_type({kind})", "module types", kinds)
        for target in self.by_operator:
            if target not in targets:
                raise _unmatched(f"set_operator_type({target})", "operators", sorted({operator_name(n) for n in nodes}))
        if self.filter_function is not None and not any(self.filter_function(node) for node in nodes):
            raise RuleError("it accepts no node of the model", where="set_filter_function")
        for gone, layer in gone_nodes:
            if layer is not None:
                self._check_folded(gone, layer)

    def _check_folded(self, gone: Origin, layer: Origin) -> None:
        """Raises when a rule that selects a node, and not the layer that computes it, chooses otherwise than that."""
        rule, choice = next(self.selecting(gone.name, gone.stack, gone.targets), ("", None))
        of_layer = list(self.selecting(layer.name, layer.stack, layer.targets))
        chosen = of_layer[0][1] if of_layer else self.everything
        if not rule or choice == chosen or any(rule == other for other, _ in of_layer):
            return
        state = "stays float" if chosen is None else "is to be quantized" if choice is None else "is chosen otherwise"
        what = f"{gone.place} is folded into {layer.place}, which computes both and {state}"
        raise RuleError(what, where=f"{rule})", remedy="Set a rule for that layer, and leave this one out.")


@dataclass(frozen=True, slots=True)
class Origin:
    """What rules see of a node: the modules around it and its operators; its description for messages, its name."""

    stack: Stack
    targets: tuple[Any, ...]
    place: str
    name: str


def origin_of(node: Node) -> Origin:
    """Returns what rules see of a node, which may be erased afterwards."""
    return Origin(module_stack(node), targets_of(node), describe(node), node.name)


def note_erased(model: GraphModule, gone: Iterable[Origin], layer: Origin | None = None) -> None:
    """Remembers nodes that are no longer in the graph, so that no rule about them is called wrong.

    Args:
        model: whose graph they were in; ``forget_erased`` ends it.
        gone: the nodes.
        layer: the node that computes them now; None where they did nothing.
    """
    model.meta.setdefault(ERASED_KEY, []).extend((origin, layer) for origin in gone)


def forget_erased(model: GraphModule) -> None:
    """Ends what ``note_erased`` began, in the bodies of control flow too."""
    model.meta.pop(ERASED_KEY, None)
    for _, body in bodies(model):
        forget_erased(body)


def erased(model: GraphModule) -> Iterator[tuple[Origin, Origin | None]]:
    """Yields what ``note_erased`` remembered: a node that is gone, and the one that computes it now."""
    yield from model.meta.get(ERASED_KEY, ())
    for _, body in bodies(model):
        yield from erased(body)


def targets_of(node: Node) -> tuple[Any, ...]:
    """Returns the operator of a node, its packet, and the operator that the user wrote where it was spelled anew."""
    written = node.meta.get(WRITTEN_KEY, node.target)
    own = (node.target, getattr(node.target, "overloadpacket", node.target))
    return own if written is node.target else (*own, written, getattr(written, "overloadpacket", written))


def calls(model: GraphModule) -> Iterator[Node]:
    """Yields the nodes that rules are about, those of control flow bodies last."""
    yield from (node for node in model.graph.nodes if node.op == "call_function")
    for _, body in bodies(model):
        yield from calls(body)


@functools.lru_cache(4096)
def paths_of(stack: Stack) -> tuple[str, ...]:
    """Returns the paths of the modules around a node, the innermost first.

    A ``ModuleList``, or a ``Sequential`` that is indexed, is never called, so it is in no stack: the paths say it.
    """
    paths: list[str] = []
    for path, _ in reversed(stack):
        parts = path.split(".")
        paths.extend(".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return tuple(dict.fromkeys(paths))


def paths_around(path: str) -> Iterator[str]:
    """Yields the path of a module, and those of the modules around it, the innermost first."""
    names = path.split(".")
    yield from (".".join(names[:count]) for count in range(len(names), 0, -1))


def matches(path: str, pattern: str) -> bool:
    """True when the path of a module is the pattern, or what it stands for as the name of a file."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _unmatched(rule: str, what: str, present: list[str]) -> RuleError:
    some = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
    return RuleError("the rule matches no node of the model", where=rule, remedy=f"The model's {what}: {some}.")


def type_name(kind: type | str) -> str:
    """Returns the name by which exported graphs know a module type."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
