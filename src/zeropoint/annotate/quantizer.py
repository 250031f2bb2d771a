"""What a quantizer is, and how several are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import EdgeOrNode
from zeropoint.graph.source import describe


class Quantizer(ABC):
    """Annotates a graph for one backend."""

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Returns the graph to annotate, changed where the backend needs it."""
        return model

    @abstractmethod
    def annotate(self, model: GraphModule) -> GraphModule:
        """Writes ``node.meta["quantization_annotation"]`` on the nodes that are to be quantized."""

    @abstractmethod
    def validate(self, model: GraphModule) -> None:
        """Raises when the annotated graph is not one that the backend can run."""

    def prepare_obs_or_fq_callback(  # noqa: B027  # a hook: doing nothing is the right default
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]
    ) -> None:
        """Sees, and may replace, the observers before they are inserted."""


class ComposableQuantizer(Quantizer):
    """Several quantizers, one after the other: the first to annotate a node keeps it.

    Raises (from ``annotate``):
        AnnotationError: a quantizer changed or removed what an earlier one annotated; the message names both.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        self.quantizers = list(quantizers)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Returns the graph after each quantizer's transformation, in order."""
        for quantizer in self.quantizers:
            model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Lets each quantizer annotate, in order."""
        owners: dict[Node, tuple[Quantizer, Any, str]] = {}
        for quantizer in self.quantizers:
            quantizer.annotate(model)
            _check_kept(owners, quantizer)
            for node in model.graph.nodes:
                annotation = node.meta.get(Q_ANNOTATION_KEY)
                if annotation is not None and node not in owners:
                    owners[node] = (quantizer, annotation, _contents(annotation))
        return model

    def validate(self, model: GraphModule) -> None:
        """Lets each quantizer check the graph."""
        for quantizer in self.quantizers:
            quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """Lets each quantizer see the observers, in order."""
        for quantizer in self.quantizers:
            quantizer.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)


def _contents(annotation: Any) -> str:
    """What an annotation said, so that a change in place is seen too."""
    return repr((list(annotation.input_qspec_map.items()), annotation.output_qspec))


def _check_kept(owners: dict[Node, tuple[Quantizer, Any, str]], quantizer: Quantizer) -> None:
    for node, (owner, annotation, contents) in owners.items():
        present = node.meta.get(Q_ANNOTATION_KEY)
        if present is annotation and _contents(present) == contents:
            continue
        verb = "removed" if present is None else "changed"
        who = f"{type(quantizer).__name__} {verb} the annotation that {type(owner).__name__} made"
        raise AnnotationError(who, where=describe(node), remedy="Put the quantizer that is to win first.")
