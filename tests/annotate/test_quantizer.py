"""Several quantizers, one after the other; what a quantizer may choose nodes by."""

import models
import pytest
import quantizers
import torch
from quantizers import KEY, annotate
from torch import nn

from zeropoint.annotate.annotation import QuantizationAnnotation, get_module_name_filter
from zeropoint.annotate.quantizer import ComposableQuantizer, Quantizer
from zeropoint.core.errors import AnnotationError
from zeropoint.graph.bind import Site
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.workflow import prepare_pt2e, prepare_with_plan

aten = torch.ops.aten
ACT = quantizers.activation()


class Recording(Quantizer):
    """Annotates the inputs of one operator, and records what is called."""

    def __init__(self, operator, calls=None):
        self.operator, self.calls = operator, [] if calls is None else calls

    def transform_for_annotation(self, model):
        self.calls.append(("transform", self.operator))
        return model

    def annotate(self, model):
        self.calls.append(("annotate", self.operator))
        for node in model.graph.nodes:
            if node.target is self.operator and KEY not in node.meta:
                annotate(node, {"input" if self.operator is aten.linear.default else "self": ACT}, ACT)
        return model

    def validate(self, model):
        self.calls.append(("validate", self.operator))

    def prepare_obs_or_fq_callback(self, model, edge_or_node_to_obs_or_fq):
        self.calls.append(("callback", self.operator))


class Remover(Recording):
    def annotate(self, model):
        for node in model.graph.nodes:
            node.meta.pop(KEY, None)
        return model


class Replacer(Recording):
    def annotate(self, model):
        for node in model.graph.nodes:
            if KEY in node.meta:
                node.meta[KEY] = QuantizationAnnotation()
        return model


class Adder(Recording):
    """Changes an annotation in place."""

    def annotate(self, model):
        for node in model.graph.nodes:
            if KEY in node.meta:
                node.meta[KEY].output_qspec = None
        return model


def test_each_quantizer_has_its_turn_at_every_stage():
    calls = []
    linear, relu = aten.linear.default, aten.relu.default
    composed = ComposableQuantizer([Recording(linear, calls), Recording(relu, calls)])
    _, plan = prepare_with_plan(models.exported(models.mlp), composed)
    stages = ("transform", "annotate", "validate", "callback")
    assert calls == [(stage, operator) for stage in stages for operator in (linear, relu)]
    assert {site.node.name for site in plan.specs} == {"linear", "relu", "linear_1"}


def test_the_first_quantizer_of_a_node_keeps_it():
    class Other(Recording):
        def annotate(self, model):
            for node in model.graph.nodes:
                if KEY not in node.meta and node.target is self.operator:
                    annotate(node, {"self": ACT})

    composed = ComposableQuantizer([Recording(aten.relu.default), Other(aten.relu.default)])
    _, plan = prepare_with_plan(models.exported(models.mlp), composed)
    assert [str(site) for site in plan.specs] == ["relu.self", "relu"]


@pytest.mark.parametrize(("second", "verb"), [(Remover, "removed"), (Replacer, "changed"), (Adder, "changed")])
def test_a_changed_annotation_names_both_quantizers(second, verb):
    composed = ComposableQuantizer([Recording(aten.relu.default), second(aten.relu.default)])
    words = rf"relu \(relu\).*: {second.__name__} {verb} the annotation that Recording made. Put the quantizer"
    with pytest.raises(AnnotationError, match=words):
        prepare_pt2e(models.exported(models.mlp), composed)


def test_a_program_that_catches_torchaos_error_catches_ours():
    composed = ComposableQuantizer([Recording(aten.relu.default), Remover(aten.relu.default)])
    with pytest.raises(RuntimeError, match="Remover removed"):
        prepare_pt2e(models.exported(models.mlp), composed)


def test_a_composed_quantizer_keeps_no_model():
    composed = ComposableQuantizer([Recording(aten.relu.default)])
    before = dict(vars(composed))
    for _ in range(2):
        prepare_pt2e(models.exported(models.mlp), composed)
    assert vars(composed) == before


def test_what_transform_returns_is_used():
    class Doubling(Recording):
        def transform_for_annotation(self, model):
            relu = models.find(model, "relu")
            with model.graph.inserting_after(relu):
                double = model.graph.call_function(aten.mul.Tensor, (relu, 2))
            double.meta["val"] = relu.meta["val"]
            relu.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
            return torch.fx.GraphModule(model, model.graph)

    prepared = prepare_pt2e(models.exported(models.mlp), Doubling(aten.relu.default))
    assert models.count(prepared, "mul") == 1


def test_transform_that_returns_no_model_is_an_error():
    class Forgetful(Recording):
        def transform_for_annotation(self, model):
            pass

    with pytest.raises(AnnotationError, match="Forgetful: transform_for_annotation returned NoneType, not the model"):
        prepare_pt2e(models.exported(models.mlp), Forgetful(aten.relu.default))


def test_the_callback_may_replace_observers_of_a_whole_group():
    class Wide(MinMaxObserver):
        pass

    def widen(model, observers):
        wide = {}
        for place, observer in observers.items():
            observers[place] = wide.setdefault(id(observer), Wide(dtype=torch.int8))

    model = models.exported(models.branches)
    cat = models.find(model, "cat")
    prepared = prepare_pt2e(model, quantizers.ByHand(quantizers.static, widen))
    read = [prepared.get_submodule(node.target) for node in cat.args[0]]
    assert [type(observer) for observer in read] == [Wide] * 3
    assert read[0] is read[1] is read[2]


def test_the_callback_sees_edges_and_nodes():
    seen = {}
    model = models.exported(models.mlp)
    prepare_pt2e(model, quantizers.ByHand(quantizers.static, lambda model, observers: seen.update(observers)))
    linear = models.find(model, "linear", 1)
    assert (models.find(model, "relu"), linear) in seen
    assert linear in seen
    assert len(seen) == 6


def test_sites_of_the_plan_are_in_the_order_of_the_graph():
    model = models.exported(models.mlp)
    _, plan = prepare_with_plan(model, quantizers.STATIC)
    first, second = (models.find(model, "linear", i) for i in (0, 1))
    assert list(plan.specs) == [
        Site(node, place) if place else Site(node) for node in (first, second) for place in ("input", "weight", "")
    ]


def test_module_name_filter():
    model = models.exported(models.net)
    for name, found in (
        ("blocks.0", {"conv2d", "batch_norm", "relu"}),
        ("blocks.1.conv", {"conv2d_1"}),
        ("head", {"linear"}),
    ):
        accepts = get_module_name_filter(name)
        calls = [node for node in model.graph.nodes if node.op == "call_function"]
        assert {node.name for node in calls if accepts(node)} == found
    assert not any(get_module_name_filter("blocks.*")(node) for node in model.graph.nodes)


def test_module_name_filter_takes_paths_of_strict_export():
    node = models.find(models.exported(models.mlp), "linear")
    node.meta["nn_module_stack"] = {"a": ("L['self'].sub", nn.Module), "b": ("L['self'].sub.linear", nn.Linear)}
    assert get_module_name_filter("sub")(node)
    assert get_module_name_filter("sub.linear")(node)
    assert not get_module_name_filter("linear")(node)
