"""Sites, and the binding of a node's arguments to the names of its operator's schema."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Node

from zeropoint.graph.compat import OpOverload
from zeropoint.graph.schema import schema_of

PYTHON_ARGUMENTS = ((operator.getitem, ("sequence", "index")),)
"""Argument names of the Python functions in exported graphs that carry no schema; others are counted."""


class Site(NamedTuple):
    """One place where a tensor is read or made.

    ``Site(conv, "weight")`` is what conv reads as ``weight``; ``Site(cat, "tensors", 1)`` the second tensor that cat
    reads; ``Site(conv)`` what conv returns.
    """

    node: Node
    argument: str = ""
    element: int | None = None

    @property
    def is_output(self) -> bool:
        """True for what the node returns."""
        return not self.argument

    def __str__(self) -> str:
        if self.is_output:
            return f"{self.node.name}"
        place = self.argument if self.element is None else f"{self.argument}[{self.element}]"
        return f"{self.node.name}.{place}"


def argument_names(node: Node) -> tuple[str, ...]:
    """Returns the names of the node's positional arguments, in order; ``arg0, arg1, ...`` where there is no schema."""
    if isinstance(node.target, OpOverload):
        return schema_of(node.target).names
    for function, names in PYTHON_ARGUMENTS:
        if node.target is function:
            return names
    return tuple(f"arg{i}" for i in range(len(node.args)))


def bind(node: Node) -> dict[str, Any]:
    """Returns the arguments that the node passes, by name; those left to their defaults are absent."""
    bound, named = dict(zip(argument_names(node), node.args, strict=False)), node.kwargs
    return {**bound, **named} if named else bound


def argument(node: Node, name: str, default: Any = None) -> Any:
    """Returns the value of one argument: what the node passes, else the schema's default, else ``default``."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = argument_names(node)
    if name in names and (position := names.index(name)) < len(node.args):
        return node.args[position]
    if not isinstance(node.target, OpOverload):
        return default
    found = schema_of(node.target).defaults.get(name, default)
    return list(found) if isinstance(found, tuple) else found


def reads(node: Node) -> Iterator[tuple[Site, Node]]:
    """Yields each site at which the node reads another node's value, with that node, in the order of arguments."""
    for name, value in bind(node).items():
        if isinstance(value, Node):
            yield Site(node, name), value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Node):
                    yield Site(node, name, index), item


def source_of(site: Site) -> Any:
    """Returns what is read at a site that is no output: a node, or a literal."""
    value = bind(site.node)[site.argument]
    return value if site.element is None else value[site.element]


def set_argument(node: Node, name: str, value: Any) -> None:
    """Replaces one argument of the node, wherever it is passed."""
    names = argument_names(node)
    if name in node.kwargs or name not in names or names.index(name) > len(node.args):
        node.kwargs = {**node.kwargs, name: value}
        return
    position = names.index(name)
    node.args = (*node.args[:position], value, *node.args[position + 1 :])


def replace_read(site: Site, new: Node) -> None:
    """Makes the site read ``new``; other reads of the same node stay."""
    if site.element is None:
        set_argument(site.node, site.argument, new)
        return
    items = bind(site.node)[site.argument]
    changed = [new if i == site.element else item for i, item in enumerate(items)]
    set_argument(site.node, site.argument, type(items)(changed) if type(items) in (list, tuple) else changed)
