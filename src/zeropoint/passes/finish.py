"""End a pipeline: one module, one recompile, and only the tensors that the graph reads."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.train_eval import SwitchedModule, tell_mode


def finish(model: GraphModule, kind: type[GraphModule] = SwitchedModule) -> GraphModule:
    """Returns a new module of the same graph that holds just what the graph reads; metadata is kept.

    ``kind`` is the class of the outermost module. ``training`` says the mode of its graph, as ``train(was_training)``,
    a common idiom, relies on.
    """
    for path, body in list(bodies(model)):
        setattr(model, path, finish(body, GraphModule))
    model.graph.lint()
    finished = kind(model, model.graph, type(model).__name__)
    finished._tracer_cls = finished.graph._tracer_cls = None  # That of export cannot be built again by unpickling.
    finished.meta = dict(model.meta)
    nn.Module.train(finished, model.training)
    tell_mode(finished)
    _leave_unsaved(finished, model)
    return finished


def _leave_unsaved(finished: GraphModule, model: GraphModule) -> None:
    """Keeps out of the ``state_dict`` the buffers that the model kept out: torch copies each as one that is saved."""
    of_model = dict(model.named_modules())
    for path, module in finished.named_modules():
        if path in of_model:
            module._non_persistent_buffers_set |= of_model[path]._non_persistent_buffers_set & set(module._buffers)
