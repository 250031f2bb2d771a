"""A graph as short text, one line per node: for people, messages and golden tests."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.source import operator_name


def show(model: GraphModule) -> str:
    """Returns the graph as text: ``name = operator(arguments)`` for each call, numbers rounded to 4 digits."""
    return "\n".join(_line(node) for node in model.graph.nodes if node.op not in ("get_attr", "placeholder"))


def _line(node: Node) -> str:
    arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    match node.op:
        case "output":
            return f"return {_text(node.args[0])}"
        case "call_module":
            return f"{node.name} = {node.target}({', '.join(arguments)})"
        case _:
            return f"{node.name} = {operator_name(node)}({', '.join(arguments)})"


def _text(value: Any) -> str:
    match value:
        case Node():
            return str(value.target) if value.op == "get_attr" else value.name
        case list() | tuple():
            return "[" + ", ".join(_text(v) for v in value) + "]"
        case bool() | None | str():
            return str(value)
        case float():
            return f"{value:.4g}"
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case _:
            return str(value)
