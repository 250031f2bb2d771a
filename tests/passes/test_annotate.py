"""A quantizer sees the whole model: first to transform it, then to annotate it."""

import models
import quantizers
import torch
from torch.fx import Graph, GraphModule

from zeropoint.graph.graph_pass import bodies
from zeropoint.passes.annotate import annotate
from zeropoint.workflow import prepare_pt2e


class Recording(quantizers.ByHand):
    """Notes which graphs it is given, and what was annotated by then."""

    def __init__(self):
        super().__init__(quantizers.static)
        self.transformed, self.annotated = [], []

    def transform_for_annotation(self, model):
        assert not any(quantizers.KEY in node.meta for node in model.graph.nodes)
        assert not self.annotated
        self.transformed.append(model)
        return model

    def annotate(self, model):
        self.annotated.append(model)
        return super().annotate(model)


def test_all_is_transformed_before_anything_is_annotated():
    model, quantizer = models.exported(models.conditional), Recording()
    parts = [body for _, body in bodies(model)]
    assert annotate(model, quantizer) is model
    assert quantizer.transformed == quantizer.annotated == [*parts, model]
    assert any(quantizers.KEY in node.meta for part in parts for node in part.graph.nodes)


def test_a_transform_may_return_a_graph_without_an_output():
    class Copying(quantizers.ByHand):
        def transform_for_annotation(self, model):
            graph = Graph()
            graph.graph_copy(model.graph, {})
            return GraphModule(model, graph)

    prepared = prepare_pt2e(models.exported(models.linear), Copying(quantizers.static))
    assert models.count(prepared, "linear") == 1
    assert prepared(torch.randn(models.linear()[1][0].shape)) is None
