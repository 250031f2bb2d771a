"""Where a node comes from: its module path, module type and the user's source line."""

from __future__ import annotations

import functools
import re

from torch.fx import Node

WRITTEN_KEY = "zeropoint_written_as"
"""Metadata of a node that was spelled anew: the operator that the user wrote."""
EXPORTED_KEY = "zeropoint_exported_as"
"""Metadata of a node that is to be traced through passes: its name in the exported program."""
_ROOT = re.compile(r"^(L\['self'\]|L__self__)")
_INDEX = re.compile(r"\._modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]")
_NOT_THE_USERS = ("/torch/nn/", "/torch/_", "<eval_with_key>")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def module_stack(node: Node) -> tuple[tuple[str, str], ...]:
    """Returns ``(path, type name)`` of the modules around the node, the outermost first.

    Paths are those of ``named_modules()``. A parameter's node carries no stack of its own: its reader's is used.
    """
    return tuple((_normal_path(path), _type_name(kind)) for path, kind in _stack(node).values())


def _stack(node: Node) -> dict[str, tuple[str, object]]:
    stack = node.meta.get("nn_module_stack")
    if not stack and node.op == "get_attr" and node.users:
        stack = next(iter(node.users)).meta.get("nn_module_stack")
    return stack or {}


@functools.lru_cache(4096)
def _normal_path(path: str) -> str:
    dotted = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), _ROOT.sub("", path))
    return dotted.strip(".")


def _type_name(kind: object) -> str:
    if isinstance(kind, str):
        return kind
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def module_path(node: Node) -> str:
    """Returns the path of the innermost module that the node belongs to; empty for the model itself."""
    stack = _stack(node)
    return _normal_path(stack[next(reversed(stack))][0]) if stack else ""


def source_line(node: Node) -> str:
    """Returns ``file:line`` of the user's innermost source line; empty when export kept none."""
    return _users_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(4096)
def _users_line(stack_trace: str) -> str:
    """Strings only are kept, and the nodes of a module called in a loop share theirs."""
    frames = _FRAME.findall(stack_trace)
    own = [f for f in frames if not any(part in f[0] for part in _NOT_THE_USERS)]
    if not own:
        return ""
    file, line, _ = own[-1]
    return f"{file.rpartition('/')[2]}:{line}"


def operator_name(node: Node) -> str:
    """Returns the operator as a user writes it: ``conv2d``, ``add``; the node's kind when it calls nothing."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))


def describe(node: Node) -> str:
    """Returns the node with its operator, module and source line, for messages."""
    places = ", ".join(place for place in (module_path(node), source_line(node)) if place)
    name = f"{node.name} ({operator_name(node)})" if node.op == "call_function" else node.name
    return f"{name} [{places}]" if places else name
