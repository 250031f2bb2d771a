"""Let a quantizer annotate a graph and the bodies of its control flow."""

from __future__ import annotations

from torch.fx import GraphModule

from zeropoint.annotate.quantizer import Quantizer
from zeropoint.annotate.rules import forget_erased
from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.graph.graph_pass import bodies


def annotate(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Returns the model as the quantizer transformed and annotated it; ``validate`` sees the whole of it."""
    model = annotate_only(model, quantizer)
    quantizer.validate(model)
    forget_erased(model)
    return model


def annotate_only(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Returns the model as ``annotate`` does, before ``validate``, with the nodes noted that are no longer in it."""
    _check_quantizer(quantizer)
    model = _transform(model, quantizer)
    _annotate(model, quantizer)
    return model


def _check_quantizer(quantizer: object) -> None:
    methods = ("transform_for_annotation", "annotate", "validate", "prepare_obs_or_fq_callback")
    missing = [name for name in methods if not callable(getattr(quantizer, name, None))]
    if missing or isinstance(quantizer, type):
        name = quantizer.__name__ if isinstance(quantizer, type) else type(quantizer).__name__
        what = f"{name} is no quantizer object" + (f": it has no {', '.join(missing)}" if missing else "")
        raise SpecError(what, where="prepare", remedy="Give e.g. XNNPACKQuantizer().set_global(config).")


def _transform(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Returns the model transformed, bodies first; all of it before annotations, which nodes that are replaced lose."""
    for path, body in list(bodies(model)):
        setattr(model, path, _transform(body, quantizer))
    transformed = quantizer.transform_for_annotation(model)
    if not isinstance(transformed, GraphModule):
        what = f"transform_for_annotation returned {type(transformed).__name__}, not the model"
        raise AnnotationError(what, where=type(quantizer).__name__)
    return transformed


def _annotate(model: GraphModule, quantizer: Quantizer) -> None:
    for _, body in bodies(model):
        _annotate(body, quantizer)
    quantizer.annotate(model)
