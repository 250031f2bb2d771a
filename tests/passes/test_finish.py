"""The end of a pipeline, and what must hold then."""

import copy
import io

import models
import pytest
import quantizers
import torch
from torch.fx import Graph, GraphModule

from zeropoint.core.errors import GraphError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.invariants import Invariant, check_invariants
from zeropoint.numerics import ops
from zeropoint.passes.finish import finish
from zeropoint.passes.invariants import CONVERTED
from zeropoint.workflow import convert_pt2e, prepare_pt2e

aten = torch.ops.aten


def test_what_was_saved_whole_loads():
    _, inputs = models.linear()
    model = prepare_pt2e(models.exported(models.linear), quantizers.ByHand(quantizers.static))
    model(*inputs)
    for each in (model, convert_pt2e(copy.deepcopy(model))):
        file = io.BytesIO()
        torch.save(each, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(*inputs), each(*inputs))


def test_only_what_the_graph_reads_is_kept():
    model = models.exported(models.net)
    model.register_buffer("unused", torch.zeros(1000))
    finished = finish(model)
    assert "unused" not in finished.state_dict()
    _, inputs = models.net()
    assert torch.equal(finished(*inputs), models.exported(models.net)(*inputs))


def test_graph_metadata_and_mode_are_kept():
    model = models.exported(models.linear)
    model.meta["mine"] = 1
    finished = finish(model)
    assert finished.graph is model.graph
    assert finished.meta == {**model.meta}
    assert finished.training == model.training


def test_bodies_are_finished_too():
    model = models.exported(models.conditional)
    body = dict(bodies(model))["true_graph_0"]
    body.register_buffer("unused", torch.zeros(1))
    assert not [name for name in finish(model).state_dict() if "unused" in name]


def test_buffers_that_are_not_saved_stay_so():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

        def forward(self, x):
            return x + self.table

    model = models.export(Table(), torch.randn(3))
    before = set(model.state_dict())
    assert set(finish(model).state_dict()) == before


def quantized_graph(scale=0.5, zero_point=0):
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3)
    node = graph.call_function(ops.QUANTIZE_PER_TENSOR, (x, scale, zero_point, -128, 127, torch.int8))
    node.meta["val"] = torch.zeros(3, dtype=torch.int8)
    graph.output(node)
    return GraphModule({}, graph)


def test_a_right_graph_passes():
    check_invariants(quantized_graph(), CONVERTED, "convert_pt2e")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: quantized_graph(scale=-1.0), "each scale is positive and finite"),
        (lambda: quantized_graph(scale=float("inf")), "each scale is positive and finite"),
        (lambda: quantized_graph(zero_point=200), "each zero point lies in its range"),
        (lambda: prepare_pt2e(models.exported(models.linear), quantizers.STATIC), "no observer is left"),
    ],
)
def test_what_does_not_hold_names_pipeline_sentence_and_node(model, sentence):
    words = rf"(quantize_per_tensor|activation_post_process).*: after convert_pt2e: '{sentence}' does not hold"
    with pytest.raises(GraphError, match=words):
        check_invariants(model(), CONVERTED, "convert_pt2e")


def test_a_value_is_required_of_each_call():
    model = quantized_graph()
    del models.find(model, "quantize_per_tensor").meta["val"]
    with pytest.raises(GraphError, match="each call and each input has a value"):
        check_invariants(model, CONVERTED, "convert_pt2e")


def test_bodies_of_control_flow_are_checked():
    no_linear = Invariant("no linear layer", lambda model, node: node.target is not aten.linear.default)
    with pytest.raises(GraphError, match="no linear layer"):
        check_invariants(models.exported(models.conditional), (no_linear,), "p")
