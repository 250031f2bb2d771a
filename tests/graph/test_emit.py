"""Nodes that stand for others carry their metadata."""

import models
import torch

from zeropoint.graph.compat import FakeTensor
from zeropoint.graph.emit import Emitter, inherit

aten = torch.ops.aten


def test_a_new_node_has_a_value_and_its_anchors_place_in_the_program():
    model = models.exported(models.net)
    linear = models.find(model, "linear")
    doubled = Emitter(linear, "doubling").call(aten.mul.Tensor, linear.args[0], 2)
    assert doubled.next is linear
    assert isinstance(doubled.meta["val"], FakeTensor)
    assert doubled.meta["val"].shape == (2, 4)
    for key in ("nn_module_stack", "stack_trace"):
        assert doubled.meta[key] == linear.meta[key]
    (source,) = doubled.meta["from_node"]
    assert (source.name, source.pass_name) == ("linear", "doubling")


def test_several_results_and_keywords():
    model = models.exported(models.linear)
    anchor = models.find(model, "output")
    emit = Emitter(anchor, "p")
    pair = emit.call(aten.max.dim, models.find(model, "linear"), dim=1)
    assert [v.shape for v in pair.meta["val"]] == [(2,), (2,)]


def test_what_is_free_stays_free():
    """Padding outside of an export's context asks for the sizes as numbers, and makes them such."""
    free = {2: torch.export.Dim.DYNAMIC}
    model = torch.export.export(torch.nn.ReLU(), (torch.randn(1, 2, 5),), dynamic_shapes=(free,)).module()
    relu = models.find(model, "relu")
    padded = Emitter(relu, "p").call(aten.constant_pad_nd.default, relu.args[0], [1, 2])
    assert isinstance(padded.meta["val"].shape[2], torch.SymInt)
    assert padded.meta["val"].shape[2] == relu.meta["val"].shape[2] + 3
    assert isinstance(relu.meta["val"].shape[2], torch.SymInt)


def test_inherit_keeps_what_a_node_has():
    model = models.exported(models.net)
    conv, linear = models.find(model, "conv2d"), models.find(model, "linear")
    own = conv.meta["stack_trace"]
    inherit(conv, linear, "p")
    assert conv.meta["stack_trace"] == own


def test_inherit_does_not_invent_metadata():
    model = models.exported(models.net)
    node = model.graph.call_function(aten.relu.default, (models.find(model, "conv2d"),))
    inherit(node, models.find(model, "placeholder"), "p")
    assert set(node.meta) <= {"from_node", "custom", "stack_trace"}
