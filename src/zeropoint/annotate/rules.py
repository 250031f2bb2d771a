"""Rules: which configuration a node gets, by module name, module type, operator or for the whole model."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import RuleError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.source import module_stack, operator_name

Choice = QuantizationConfig | None
WRITTEN_KEY = "zeropoint_written_as"
"""Metadata of a node that a backend spelled anew: the operator that the user wrote."""
NOT_SELECTED = "no rule selects it"


@dataclass
class Rules:
    """The user's choices. Precedence: module name, module type, operator type, global; the innermost module wins.

    A configuration of None means: leave float.
    """

    by_module_name: dict[str, Choice] = field(default_factory=dict)
    by_module_type: dict[str, Choice] = field(default_factory=dict)
    by_operator: dict[Any, Choice] = field(default_factory=dict)
    everything: Choice = None
    filter_function: Callable[[Node], bool] | None = None

    def choose(self, node: Node) -> tuple[Choice, str]:
        """Returns the node's configuration, or None with the reason why it stays float."""
        if self.filter_function is not None and not self.filter_function(node):
            return None, "the filter function leaves it out"
        stack = module_stack(node)
        for path in _paths(stack):
            for pattern, config in reversed(self.by_module_name.items()):
                if _matches(path, pattern):
                    return config, f"set_module_name({pattern!r}, None) leaves it out"
        for _, kind in reversed(stack):
            if kind in self.by_module_type:
                return self.by_module_type[kind], f"set_module_type({kind}, None) leaves it out"
        for target in targets_of(node):
            if target in self.by_operator:
                return self.by_operator[target], f"set_operator_type({target}, None) leaves it out"
        return self.everything, NOT_SELECTED

    def leaves_out(self, node: Node) -> bool:
        """True when a rule says that the node stays float, rather than no rule saying anything."""
        config, reason = self.choose(node)
        return config is None and reason != NOT_SELECTED

    def is_for_training(self) -> bool:
        """True when a configuration asks for fake quantizers."""
        chosen = [self.everything, *self.by_module_name.values(), *self.by_module_type.values()]
        return any(config is not None and config.is_qat for config in [*chosen, *self.by_operator.values()])

    def check_all_match(self, model: GraphModule) -> None:
        """Raises when a rule matches no node of the model, control flow bodies included.

        Raises:
            RuleError: names the rule and what the model has instead.
        """
        nodes = list(_calls(model))
        stacks = [module_stack(node) for node in nodes]
        paths = sorted({path for stack in stacks for path in _paths(stack) if path})
        kinds = sorted({kind for stack in stacks for _, kind in stack})
        for pattern in self.by_module_name:
            if not any(_matches(path, pattern) for path in paths):
                raise _unmatched(f"set_module_name({pattern!r})", "modules", paths)
        for kind in self.by_module_type:
            if kind not in kinds:
                raise _unmatched(f"set_module_type({kind})", "module types", kinds)
        for target in self.by_operator:
            if not any(target in targets_of(node) for node in nodes):
                raise _unmatched(f"set_operator_type({target})", "operators", sorted({operator_name(n) for n in nodes}))
        if self.filter_function is not None and not any(self.filter_function(node) for node in nodes):
            raise RuleError("it accepts no node of the model", where="set_filter_function")


def targets_of(node: Node) -> tuple[Any, ...]:
    """Returns the operator of a node, its packet, and the operator that the user wrote where it was spelled anew."""
    written = node.meta.get(WRITTEN_KEY, node.target)
    own = (node.target, getattr(node.target, "overloadpacket", node.target))
    return own if written is node.target else (*own, written, getattr(written, "overloadpacket", written))


def _calls(model: GraphModule) -> Iterable[Node]:
    yield from (node for node in model.graph.nodes if node.op == "call_function")
    for _, body in bodies(model):
        yield from _calls(body)


@functools.lru_cache(4096)
def _paths(stack: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Returns the paths of the modules around a node, the innermost first.

    A ``ModuleList``, or a ``Sequential`` that is indexed, is never called, so it is in no stack: the paths say it.
    """
    paths: list[str] = []
    for path, _ in reversed(stack):
        parts = path.split(".")
        paths.extend(".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return tuple(dict.fromkeys(paths))


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _unmatched(rule: str, what: str, present: list[str]) -> RuleError:
    some = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
    return RuleError("the rule matches no node of the model", where=rule, remedy=f"The model's {what}: {some}.")


def type_name(kind: type | str) -> str:
    """Returns the name by which exported graphs know a module type."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
