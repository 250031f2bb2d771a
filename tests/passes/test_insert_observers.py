"""Observers in the graph: where, how many, under which names."""

import copy

import models
import pytest
import quantizers
import torch
from quantizers import KEY, annotate
from torch import nn
from torch.fx import Graph, GraphModule

from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.backends import xnnpack
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import SharedQuantizationSpec
from zeropoint.graph.bind import Site
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.show import show
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers import HistogramObserver, MinMaxObserver, PerGroupMinMaxObserver
from zeropoint.numerics.observers.repeated import RepeatedObserver
from zeropoint.passes.insert_observers import insert_observers
from zeropoint.workflow import convert_pt2e, prepare_pt2e

aten = torch.ops.aten
ACT, OTHER = quantizers.activation(), quantizers.activation(quant_min=-127)


def prepared(build, function=quantizers.static):
    return prepare_pt2e(models.exported(build), quantizers.ByHand(function))


class Scaled(nn.Module):
    """An observer of a parameter only."""

    def __init__(self):
        super().__init__()
        self.scale, self.dtype = nn.Parameter(torch.ones(1)), torch.int8

    def calculate_qparams(self):
        return self.scale, torch.zeros(1)

    def forward(self, x):
        return x * self.scale


def test_observers_are_moved_to_the_models_device():
    with torch.device("meta"):
        model = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    observers = {
        Site(models.find(model, "linear")): Scaled(),
        Site(models.find(model, "placeholder")): MinMaxObserver(),
    }
    insert_observers(model, observers)
    assert all(
        tensor.device.type == "meta" for observer in observers.values() for tensor in observer.state_dict().values()
    )


def grouped(group_size):
    observer = PerGroupMinMaxObserver.with_args(group_size=group_size)
    return quantizers.weight(observer_or_fake_quant_ctr=observer)


@pytest.mark.parametrize(
    ("build", "place", "spec", "words"),
    [
        (
            models.linear,
            "weight",
            grouped(3),
            r"weight.* read as linear.weight: group_size=3 does not cut its rows of 4",
        ),
        (models.linear, "weight", grouped(1), "Choose a group_size of at least 2 that divides 4"),
        (models.linear, "bias", grouped(3), r"bias.*: its shape is \(3,\), and only matrices are quantized per group"),
        (models.linear, "input", grouped(2), r"input_1.* read as linear.input: it is no constant, and only constants"),
        (models.linear, "", grouped(3), "linear.*: it is no constant"),
        (models.conv_relu, "weight", grouped(3), r"its shape is \(3, 2, 3, 3\).*Use PerChannelMinMaxObserver for it"),
        (
            models.linear,
            "weight",
            quantizers.weight(observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=PerGroupMinMaxObserver)),
            "group_size=128 does not cut its rows of 4",
        ),
    ],
)
def test_what_cannot_be_cut_into_groups_names_the_tensor(build, place, spec, words):
    model = models.exported(build)
    node = next(node for node in model.graph.nodes if node.target in quantizers.GEMMS)
    annotate(node, {place: spec} if place else {}, None if place else spec)
    with pytest.raises(SpecError, match=words):
        prepare_pt2e(model, quantizers.ByHand(lambda model: None))
    assert "call_module" not in [node.op for node in model.graph.nodes]


def test_names_and_places():
    assert show(prepared(models.mlp)) == (
        "activation_post_process_1 = activation_post_process_1(0.weight)\n"
        "activation_post_process_4 = activation_post_process_4(2.weight)\n"
        "activation_post_process_0 = activation_post_process_0(input_1)\n"
        "linear = linear(activation_post_process_0, activation_post_process_1, 0.bias)\n"
        "activation_post_process_2 = activation_post_process_2(linear)\n"
        "relu = relu(activation_post_process_2)\n"
        "activation_post_process_3 = activation_post_process_3(relu)\n"
        "linear_1 = linear(activation_post_process_3, activation_post_process_4, 2.bias)\n"
        "activation_post_process_5 = activation_post_process_5(linear_1)\n"
        "return [activation_post_process_5]"
    )


def test_readers_use_the_call_of_the_producers_observer():
    model = prepared(models.branches)
    first = models.find(model, "linear")
    calls = [user for user in first.users if user.op == "call_module"]
    assert len(calls) == 1
    assert len(calls[0].users) == 3


def test_one_observer_under_several_names_where_it_observes_several_tensors():
    model = prepared(models.branches)
    cat = models.find(model, "cat")
    observers = [model.get_submodule(node.target) for node in cat.args[0]]
    assert len({node.target for node in cat.args[0]}) == 3
    assert observers[0] is observers[1] is observers[2]
    assert models.find(model, "output").args[0][0].op == "call_module"


def test_two_reads_of_one_tensor_by_different_specs_have_an_observer_each():
    def function(model):
        annotate(models.find(model, "linear", 1), {"input": ACT})
        annotate(models.find(model, "linear", 2), {"input": OTHER})

    model = prepared(models.branches, function)
    one, two = (models.find(model, "linear", i).args[0] for i in (1, 2))
    assert one is not two
    assert one.args == two.args


def test_a_reader_with_another_spec_than_the_producer_has_a_second_observer_after_the_first():
    def function(model):
        annotate(models.find(model, "linear", 0), {}, ACT)
        for i in (1, 2):
            annotate(models.find(model, "linear", i), {"input": OTHER})

    model = prepared(models.branches, function)
    one, two = (models.find(model, "linear", i).args[0] for i in (1, 2))
    assert one is two
    assert one.args[0].op == "call_module"
    assert one.args[0].args[0] is models.find(model, "linear")


def test_a_tensor_read_twice_by_one_node_is_observed_once():
    model = prepared(models.adds)
    add = models.find(model, "add", 1)
    assert add.args[0] is add.args[1]
    assert add.args[0].op == "call_module"


def test_keyword_arguments_are_observed():
    root, graph = nn.Linear(4, 3), Graph()
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    x.meta["val"], w.meta["val"] = torch.zeros(2, 4), root.weight.detach()
    linear = graph.call_function(aten.linear.default, (x,), {"weight": w})
    linear.meta["val"] = torch.zeros(2, 3)
    graph.output(linear)
    model = prepare_pt2e(GraphModule(root, graph), quantizers.STATIC)
    assert models.find(model, "linear").kwargs["weight"].op == "call_module"
    assert models.find(model, "linear").args[0].op == "call_module"


def test_lists_keep_their_other_items():
    def function(model):
        cat = models.find(model, "cat")
        cat.meta[KEY] = QuantizationAnnotation({cat.args[0][1]: ACT})

    model = prepared(models.branches, function)
    assert [node.op for node in models.find(model, "cat").args[0]] == ["call_function", "call_module", "call_function"]
    _, inputs = models.branches()
    model(*inputs)


@models.seeded
def in_place():
    return models.Applied(lambda m, x: m.a(x).relu_().add_(x), a=nn.Linear(4, 4)), (torch.randn(2, 4),)


def test_in_place_operators():
    def function(model):
        annotate(models.find(model, "relu_"), {"self": ACT}, ACT)
        annotate(models.find(model, "add_"), {"self": ACT, "other": ACT}, ACT)

    model = prepared(in_place, function)
    module, inputs = in_place()
    assert torch.equal(model(*inputs), module(*inputs))
    assert models.find(model, "add_").args[0].op == "call_module"


def test_a_buffer_that_is_written_to_is_not_cut_off():
    def function(model):
        annotate(models.find(model, "add_"), {"self": ACT, "other": ACT})

    model = prepared(models.counter, function)
    add = models.find(model, "add_")
    assert add.args[0].target is aten.select.int
    assert add.args[1].op == "call_module"
    x = torch.tensor([1.0, 2.0, 3.0])
    model(x)
    model(x)
    assert torch.equal(model.state, torch.stack([2 * x, torch.zeros(3)]))


def test_the_output_of_a_node_with_a_reader_in_a_list():
    def function(model):
        for i in range(3):
            annotate(models.find(model, "linear", i), {}, ACT)

    model = prepared(models.branches, function)
    assert all(node.op == "call_module" for node in models.find(model, "cat").args[0])


@pytest.mark.parametrize("build", [models.conditional, models.looped, models.scanned])
def test_bodies_of_control_flow(build):
    model = prepared(build)
    found = [body for _, body in bodies(model) if models.count(body, "linear")]
    assert found
    for body in found:
        assert models.find(body, "linear").args[0].op == "call_module"
    module, inputs = build()
    with torch.no_grad():
        assert torch.allclose(model(*inputs), module(*inputs), atol=1e-6)


def test_observers_are_told_what_they_observe():
    model = prepared(models.mlp)
    sites = {name: module.site for name, module in model.named_children() if hasattr(module, "site")}
    assert sites["activation_post_process_0"] == "input_1, read as linear.input"
    assert sites["activation_post_process_1"] == "_0_weight [0], read as linear.weight"
    assert sites["activation_post_process_2"].startswith("linear (linear) [0")


def test_constants_are_marked():
    model = prepared(models.mlp)
    marked = {name for name, module in model.named_children() if getattr(module, "constant_input", False)}
    assert marked == {"activation_post_process_1", "activation_post_process_4"}


def test_an_observer_of_a_constant_and_of_an_activation_sees_both_each_time():
    def function(model):
        linear = models.find(model, "linear")
        shared = SharedQuantizationSpec((linear.args[0], linear))
        annotate(linear, {"input": ACT, "weight": shared})

    model = prepared(models.linear, function)
    observer = model.activation_post_process_0
    assert not observer.constant_input
    model(torch.full((2, 4), 100.0))
    model(torch.full((2, 4), -100.0))
    assert (observer.min_val.item(), observer.max_val.item()) == (-100, 100)


def test_metadata_of_a_call():
    model = prepared(models.net)
    call = next(n for n in model.graph.nodes if n.op == "call_module" and n.args[0].name == "conv2d")
    conv = models.find(model, "conv2d")
    assert call.meta["val"] is conv.meta["val"]
    assert call.meta["stack_trace"] == conv.meta["stack_trace"]
    assert call.meta["from_node"][0].name == "conv2d"


def test_the_numbers_do_not_change():
    module, inputs = models.net()
    model = prepared(models.net)
    assert torch.allclose(model(*inputs), module(*inputs), atol=1e-5)


def test_names_are_found_in_linear_time():
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.zeros(1)
    observers = {}
    for _ in range(1500):
        node = graph.call_function(aten.relu.default, (node,))
        node.meta["val"] = torch.zeros(1)
        observers[Site(node)] = MinMaxObserver()
    graph.output(node)
    model = GraphModule({}, graph)
    insert_observers(model, observers)
    assert len(model._modules) == 1500
    assert "activation_post_process_1499" in model._modules


def test_graph_and_metadata_of_the_model_are_kept():
    model = models.exported(models.mlp)
    model.meta["mine"] = 1
    result = prepare_pt2e(model, quantizers.STATIC)
    assert result.graph is model.graph
    assert result.meta["mine"] == 1
    assert result is not model


def test_observers_of_different_kinds():
    def function(model):
        annotate(
            models.find(model, "add"), {"self": quantizers.activation(observer_or_fake_quant_ctr=HistogramObserver)}
        )

    assert isinstance(prepared(models.adds, function).activation_post_process_0, HistogramObserver)


def test_what_was_only_moved_is_not_looked_at_again():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 12)

        def forward(self, x):
            return self.layer(x).reshape(2, 2, 2, 3).transpose(1, 2).flatten(1)

    inputs = (torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).flatten(1),)
    graph = torch.export.export(Moves().eval(), inputs).module()
    config = xnnpack.get_symmetric_quantization_config()
    prepared = prepare_pt2e(graph, xnnpack.XNNPACKQuantizer().set_global(config))
    prepared(*inputs)
    calls = [m for name, m in prepared.named_children() if name.startswith("activation_post_process")]
    repeated = [m for m in calls if isinstance(m, RepeatedObserver)]
    assert len(calls) == 6
    assert len(repeated) == 3
    assert {id(m._answers[0]) for m in repeated} == {id(calls[2])}
    assert calls[2].batches == 1
    copied = copy.deepcopy(prepared)
    converted = convert_pt2e(copied)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    scales = [node.args[1] for node in converted.graph.nodes if node.target is quantize]
    assert len(set(scales[1:])) == 1
    assert torch.equal(converted(*inputs), convert_pt2e(prepared)(*inputs))
