"""Which nodes share memory."""

import models
import pytest
import quantizers
import torch
from quantizers import annotate
from torch import nn
from torch.fx import Graph
from torch.nn import functional as F

from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import AnnotationError
from zeropoint.graph.constants import attributes_behind, mutated_attributes
from zeropoint.graph.memory import Memory, remove_dead_writes, shares_memory_with, written_by
from zeropoint.workflow import convert_pt2e, prepare_pt2e

aten = torch.ops.aten
ACT = quantizers.activation()


def test_views_and_in_place_operators_share_memory():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    view = graph.call_function(aten.view.default, (x, [-1]))
    added = graph.call_function(aten.add_.Tensor, (view, y))
    fresh = graph.call_function(aten.add.Tensor, (x, y))
    assert [list(shares_memory_with(n)) for n in (view, added, fresh)] == [[x], [view], []]
    assert [list(written_by(n)) for n in (view, added, fresh)] == [[], [view], []]


def test_what_is_computed_from_a_weight_is_not_the_weight():
    """``embedding(weight, i).add_(x)`` writes to the rows taken, not to the weight."""

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, i, x):
            return self.table(i).add_(x)

    model = models.export(Embedded(), torch.tensor([1, 2]), torch.randn(2, 3))
    assert mutated_attributes(model.graph) == set()
    assert attributes_behind(models.find(model, "add_")) == set()


def test_relu_in_place_may_be_quantized():
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    model = models.export(module, torch.randn(2, 3))
    memory = Memory(model.graph)
    assert all(memory.write_after(node) is None for node in model.graph.nodes)


class PartlyChanged(nn.Module):
    """Writes to a row of a layer's result, then reads the whole."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        y[0].add_(10.0)
        return y * torch.ones(4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.export(PartlyChanged(), torch.randn(2, 4))


def test_a_write_through_a_view_that_is_read_later(model):
    linear, select, add, mul = (models.find(model, name) for name in ("linear", "select", "add_", "mul"))
    memory = Memory(model.graph)
    assert memory.is_rewritten(linear)
    assert memory.write_after(linear) is memory.write_after(select) is memory.write_from(add) is add
    assert memory.write_after(add) is memory.write_after(mul) is None


@pytest.mark.parametrize("place", ["linear", "select", "add_"])
def test_quantizing_what_would_lose_a_write_is_an_error(model, place):
    def function(model):
        node = models.find(model, place)
        annotate(node, {"self": ACT} if place == "add_" else {}, None if place == "add_" else ACT)

    with pytest.raises(AnnotationError, match=r"cannot be quantized: add_ \(add_\).* writes to its memory.*run_decomp"):
        prepare_pt2e(model, quantizers.ByHand(function))


def test_a_read_after_the_write_is_quantized_as_it_is_then(model):
    x = torch.randn(2, 4)
    expected = model(x)
    prepared = prepare_pt2e(model, quantizers.ByHand(lambda m: annotate(models.find(m, "mul"), {"self": ACT})))
    prepared(x)
    assert torch.allclose(convert_pt2e(prepared)(x), expected, atol=0.1)


def test_a_table_leaves_it_float_with_a_reason(model):
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    x = torch.randn(2, 4)
    expected = model(x)
    prepared = prepare_pt2e(model, quantizer)
    refusal = models.find(prepared, "linear").meta[DECISION_KEY].refusal
    assert refusal == "add_ writes to its memory in place, and that change would be lost"
    prepared(x)
    assert torch.allclose(convert_pt2e(prepared)(x), expected, atol=0.1)


def test_the_remedy_of_the_message_works():
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    program = torch.export.export(PartlyChanged(), (x,)).run_decompositions({})
    model = program.module()
    expected = model(x)
    prepared = prepare_pt2e(model, quantizers.ByHand(quantizers.static))
    prepared(x)
    assert torch.allclose(convert_pt2e(prepared)(x), expected, atol=0.2)


def test_a_cache_is_read_as_it_is_after_each_write():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 3))

        def forward(self, x):
            self.cache[0].copy_(x)
            return self.cache * torch.ones(3)

    model = models.export(Cache(), torch.ones(3))
    prepared = prepare_pt2e(
        model, quantizers.ByHand(lambda m: annotate(models.find(m, "mul"), {"self": ACT, "other": ACT}))
    )
    prepared(torch.tensor([1.0, 2.0, 3.0]))
    converted = convert_pt2e(prepared)
    for value in (1.0, 3.0):
        assert torch.allclose(converted(torch.full((3,), value))[0], torch.full((3,), value), atol=0.02)


def test_the_view_of_a_cache_that_is_written_through_cannot_be_quantized():
    model = models.exported(models.counter)
    with pytest.raises(AnnotationError, match="that change would be lost"):
        prepare_pt2e(model, quantizers.ByHand(lambda m: annotate(models.find(m, "select"), {}, ACT)))


# Writes that nothing sees.


def read_before(m, x):
    y = m.layer(x)
    z = y * 2
    F.relu_(y)
    return z


def through_a_view(m, x):
    y = m.layer(x)
    z = y * 2
    y[0].add_(1.0).mul_(2.0)
    return z


def not_read(m, x):
    F.relu_(m.layer(x))
    return x * 2


def of_an_input(m, x):
    F.relu_(x)
    return m.layer(x * 2)


def of_a_view_of_an_input(m, x):
    y = x[0]
    z = m.layer(x)
    y.add_(1.0)
    return z


def of_an_attribute(m, x):
    y = m.layer(x)
    m.state.add_(y.sum())
    return y


def of_what_is_returned(m, x):
    y = m.layer(x)
    y[0].add_(1.0)
    return y.t()


def read_later(m, x):
    y = m.layer(x)
    row = y[0]
    row.add_(1.0)
    return y * 2


def exported_with_state(function):
    torch.manual_seed(0)
    module = models.Applied(function, layer=nn.Linear(4, 4))
    module.register_buffer("state", torch.zeros(()))
    return models.export(module, torch.randn(2, 4))


@pytest.mark.parametrize("function", [read_before, through_a_view, not_read])
def test_writes_that_nothing_sees_are_removed(function):
    model = exported_with_state(function)
    x = torch.randn(2, 4)
    expected = model(x)
    assert any(list(written_by(node)) for node in model.graph.nodes)
    remove_dead_writes(model.graph)
    model.recompile()
    assert torch.equal(model(x), expected)
    assert not any(list(written_by(node)) for node in model.graph.nodes)
    assert models.count(model, "linear") == (function is not not_read)


@pytest.mark.parametrize(
    "function", [of_an_input, of_a_view_of_an_input, of_an_attribute, of_what_is_returned, read_later]
)
def test_writes_that_something_sees_stay(function):
    model = exported_with_state(function)
    nodes = [node.name for node in model.graph.nodes if list(written_by(node))]
    assert nodes
    remove_dead_writes(model.graph)
    assert [node.name for node in model.graph.nodes if list(written_by(node))] == nodes


def test_a_layer_whose_result_is_written_to_in_vain_is_quantized():
    model = exported_with_state(read_before)
    prepared = prepare_pt2e(model, XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    assert models.find(prepared, "linear").meta[DECISION_KEY].refusal is None
    assert models.count(prepared, "relu_") == 0
