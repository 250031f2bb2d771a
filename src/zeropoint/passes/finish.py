"""End a pipeline: one module, one recompile, and only the tensors that the graph reads."""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, GraphModule

from zeropoint.graph.attributes import give_attributes
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.train_eval import SwitchedModule, tell_mode

HOLDING = ("get_attr", "call_module")
"""Kinds of nodes that read something of the module."""


def finish(model: GraphModule, kind: type[GraphModule] = SwitchedModule) -> GraphModule:
    """Returns a new module of the same graph that holds just what the graph reads; metadata is kept.

    ``kind`` is the class of the outermost module. ``training`` says the mode of its graph, as ``train(was_training)``,
    a common idiom, relies on.
    """
    for path, body in list(bodies(model)):
        setattr(model, path, finish(body, GraphModule))
    model.graph.lint()
    finished = kind(nn.Module(), Graph(), type(model).__name__)
    give_attributes(finished, model, (str(node.target) for node in model.graph.nodes if node.op in HOLDING))
    finished.graph = model.graph
    finished._tracer_extras = model.graph._tracer_extras or {}
    finished._tracer_cls = finished.graph._tracer_cls = None  # That of export cannot be built again by unpickling.
    finished.meta = dict(model.meta)
    nn.Module.train(finished, model.training)
    tell_mode(finished)
    return finished
