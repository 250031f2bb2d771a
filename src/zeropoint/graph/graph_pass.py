"""``@graph_pass``: what every pass over a graph does besides its own work."""

from __future__ import annotations

import collections
import functools
import gc
import logging
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from torch.fx import Graph, GraphModule, Node

from zeropoint.core.errors import GraphError, ZeropointError
from zeropoint.core.flags import debug_level
from zeropoint.graph.control_flow import AS_OPERATORS, IN_PYTHON, is_control_flow
from zeropoint.graph.show import show
from zeropoint.graph.source import operator_name

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("zeropoint")


def bodies(model: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """Yields the bodies of the control flow operators (``cond``, ``while_loop``, ``scan``, ``map``), each once."""
    seen: set[str] = set()
    for node in model.graph.nodes:
        if not is_control_flow(node):
            continue
        for read in node.all_input_nodes:
            path = str(read.target)
            if read.op != "get_attr" or path in seen:
                continue
            body = model.get_submodule(path) if "." not in path and path in model._modules else None
            if isinstance(body, GraphModule):
                seen.add(path)
                yield path, body


def graphs_of(model: GraphModule) -> Iterator[GraphModule]:
    """Yields the bodies of the control flow in a model, those in them first, then the model."""
    for _, body in bodies(model):
        yield from graphs_of(body)
    yield model


def pipeline(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function of many passes without garbage collection.

    Graphs are millions of objects in cycles that all stay alive; looking through them is a fifth of the time.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return run


def graph_pass(
    function: Callable[Concatenate[GraphModule, P], R],
) -> Callable[Concatenate[GraphModule, P], R]:
    """Makes a function of a graph module a pass.

    Afterwards dead code is gone. An error names the pass. ``ZEROPOINT_DEBUG=1`` lints the graph and logs the time and
    the change in operators, ``3`` the graph; otherwise a pipeline lints once, at its end. The bodies of control flow
    operators are treated first, in the same way; the result is that of the outermost graph.
    """

    @functools.wraps(function)
    def run(model: GraphModule, *args: P.args, **kwargs: P.kwargs) -> R:
        for _, body in bodies(model):
            run(body, *args, **kwargs)
        before, start = _operators(model), time.perf_counter()
        try:
            result = function(model, *args, **kwargs)
            remove_dead_code(model.graph)
            if debug_level():
                model.graph.lint()
        except ZeropointError:
            raise
        except Exception as error:
            raise GraphError(f"the pass failed: {type(error).__name__}: {error}", where=function.__name__) from error
        _report(function.__name__, model, before, time.perf_counter() - start)
        return result

    return run


@graph_pass
def control_flow_in_python(model: GraphModule) -> None:
    """Lets control flow run in Python, so that gradients reach what its bodies hold."""
    for node in model.graph.nodes:
        node.target = IN_PYTHON.get(node.target, node.target)


@graph_pass
def control_flow_as_operators(model: GraphModule) -> None:
    """Undoes ``control_flow_in_python``."""
    for node in model.graph.nodes:
        node.target = AS_OPERATORS.get(node.target, node.target)  # type: ignore[arg-type]


def recompile(model: GraphModule) -> None:
    """Brings the code of a graph module and of the bodies of its control flow up to date: at the end of a pipeline."""
    for _, body in bodies(model):
        recompile(body)
    model.recompile()


def remove_dead_code(graph: Graph) -> None:
    """Erases the nodes that nothing reads and that have no side effect, as ``Graph.eliminate_dead_code`` does.

    Of that function's lint, which takes longer than most passes, only the order of nodes is checked. In a graph without
    an output, as a quantizer's ``transform_for_annotation`` may return it, nothing is dead.

    Raises:
        RuntimeError: a node is read before it is made; ``graph_pass`` adds the name of the pass.
    """
    seen: set[Node] = set()
    has_output = any(node.op == "output" for node in graph.nodes)
    for node in reversed(graph.nodes):
        if has_output and not node.users and not node.is_impure():
            graph.erase_node(node)
            continue
        early = next((user for user in node.users if user not in seen), None)
        if early is not None:
            raise RuntimeError(f"{early.name} reads {node.name} before it is made")
        seen.add(node)


def _operators(model: GraphModule) -> collections.Counter[str]:
    if not debug_level():
        return collections.Counter()
    return collections.Counter(operator_name(node) for node in model.graph.nodes)


def _report(name: str, model: GraphModule, before: collections.Counter[str], seconds: float) -> None:
    if not debug_level():
        return
    after = _operators(model)
    changes = {op: after[op] - before[op] for op in {*after, *before} if after[op] != before[op]}
    text = ", ".join(f"{op} {change:+d}" for op, change in sorted(changes.items())) or "no change"
    log.warning("%s: %.1f ms; %s", name, seconds * 1e3, text)
    if debug_level() >= 3:
        log.warning("%s", show(model))
