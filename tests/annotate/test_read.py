"""Annotations of any package become a plan."""

from types import SimpleNamespace

import models
import pytest
import quantizers
import torch
from quantizers import KEY, annotate

from zeropoint.annotate.annotation import (
    QuantizationAnnotation,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_weight_qspec,
    is_annotated,
    is_valid_annotation,
)
from zeropoint.annotate.read import read_plan
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from zeropoint.graph.bind import Site
from zeropoint.graph.graph_pass import bodies
from zeropoint.numerics.observers import MinMaxObserver, PlaceholderObserver

ACT = quantizers.activation()


@pytest.fixture
def model():
    return models.exported(models.linear)


@pytest.fixture
def linear(model):
    return models.find(model, "linear")


def test_inputs_and_outputs_become_sites(model, linear):
    annotate(linear, {"input": ACT, "weight": quantizers.weight()}, ACT)
    plan = read_plan(model)
    assert plan.specs == {
        Site(linear, "input"): ACT,
        Site(linear, "weight"): quantizers.weight(),
        Site(linear): ACT,
    }


def test_none_means_not_quantized(model, linear):
    annotate(linear, {"input": None, "weight": ACT})
    assert set(read_plan(model).specs) == {Site(linear, "weight")}


def test_a_tensor_read_twice_is_two_sites():
    model = models.exported(models.adds)
    add = models.find(model, "add", 1)
    annotate(add, {"self": ACT})
    assert set(read_plan(model).specs) == {Site(add, "self"), Site(add, "other")}


def test_implicit_sharing_may_be_forbidden(model, linear):
    annotate(linear, {"input": ACT}, allow_implicit_sharing=False)
    assert read_plan(model).unshared == {linear}


def test_annotations_in_bodies_of_control_flow_are_read():
    model = models.exported(models.conditional)
    linears = [models.find(body, "linear") for _, body in bodies(model) if models.count(body, "linear")]
    for node in linears:
        annotate(node, {"input": ACT})
    assert [site.node for site in read_plan(model).specs] == linears


def foreign(**fields):
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            foreign(dtype=torch.int8, observer_or_fake_quant_ctr=MinMaxObserver, quant_min=-8, quant_max=7, extra=1),
            QuantizationSpec(torch.int8, MinMaxObserver, -8, 7),
        ),
        (
            foreign(dtype=torch.uint8, scale=0.5, zero_point=3, is_dynamic=False),
            FixedQParamsQuantizationSpec(torch.uint8, 0.5, 3),
        ),
        (foreign(edge_or_node="place"), SharedQuantizationSpec("place")),
        (
            foreign(derived_from=["a"], derive_qparams_fn=max, dtype=torch.int32, ch_axis=0),
            DerivedQuantizationSpec(["a"], max, torch.int32, ch_axis=0),
        ),
    ],
)
def test_specs_of_other_packages_are_known_by_their_attributes(model, linear, spec, expected):
    linear.meta[KEY] = foreign(input_qspec_map={}, output_qspec=spec)
    assert read_plan(model).specs == {Site(linear): expected}


def test_torchaos_own_classes(model, linear):
    torchao = pytest.importorskip("torchao.quantization.pt2e.quantizer")
    spec = torchao.QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
    linear.meta[KEY] = torchao.QuantizationAnnotation(
        {linear.args[0]: spec, linear.args[1]: torchao.SharedQuantizationSpec((linear.args[0], linear))},
        torchao.FixedQParamsQuantizationSpec(torch.int8, 0.5, 0),
    )
    assert list(read_plan(model).specs.values()) == [
        ACT,
        SharedQuantizationSpec((linear.args[0], linear)),
        FixedQParamsQuantizationSpec(torch.int8, 0.5, 0),
    ]


def test_a_literal_cannot_be_quantized(model, linear):
    linear.meta[KEY] = QuantizationAnnotation({2.5: ACT})
    with pytest.raises(
        AnnotationError, match=r"linear \(linear\).*: 2.5 is annotated as an input, but it is a literal"
    ):
        read_plan(model)


def test_an_input_that_is_not_read(model, linear):
    output = models.find(model, "output")
    linear.meta[KEY] = QuantizationAnnotation({output: ACT})
    with pytest.raises(AnnotationError, match=r"names the input output, which it does not read. It reads input_1, wei"):
        read_plan(model)


def test_something_else_is_no_spec(model, linear):
    linear.meta[KEY] = QuantizationAnnotation({linear.args[0]: "int8"})
    with pytest.raises(AnnotationError, match=r"str is no quantization spec. A spec has edge_or_node"):
        read_plan(model)


def test_a_spec_of_another_package_that_cannot_be_is_refused(model, linear):
    linear.meta[KEY] = foreign(output_qspec=foreign(dtype=torch.int8, scale=-1.0, zero_point=0))
    with pytest.raises(SpecError, match=r"scale=-1\.0"):
        read_plan(model)


def test_the_output_of_an_operator_with_several():
    class Top(torch.nn.Module):
        def forward(self, x):
            values, indices = x.max(1)
            return values, indices

    model = models.export(Top(), torch.randn(2, 3))
    node = models.find(model, "max")
    annotate_output_qspec(node, ACT)
    with pytest.raises(AnnotationError, match=r"returns no single tensor. Annotate the getitem nodes"):
        read_plan(model)
    del node.meta[KEY]
    taken = next(iter(node.users))
    annotate_output_qspec(taken, ACT)
    assert set(read_plan(model).specs) == {Site(taken)}


def test_annotations_are_made_in_steps(linear):
    assert not is_annotated(linear)
    annotate_input_qspec_map(linear, linear.args[0], ACT)
    annotate_output_qspec(linear, ACT)
    assert linear.meta[KEY] == QuantizationAnnotation({linear.args[0]: ACT}, ACT)
    assert not is_annotated(linear)


def test_valid_annotations():
    assert not is_valid_annotation(None)
    assert not is_valid_annotation(QuantizationAnnotation())
    assert is_valid_annotation(QuantizationAnnotation(output_qspec=ACT))
    assert is_valid_annotation(QuantizationAnnotation({"node": None}))


def test_specs_of_a_configuration():
    config = QuantizationConfig(ACT, ACT, quantizers.weight(), None)
    assert get_input_act_qspec(config) is get_output_act_qspec(config) is ACT
    assert get_weight_qspec(config) == quantizers.weight()
    assert get_bias_qspec(config) is None
    assert get_input_act_qspec(None) is get_weight_qspec(None) is get_bias_qspec(None) is None


@pytest.mark.parametrize(
    ("get", "config", "words"),
    [
        (get_weight_qspec, (None, None, ACT, None), "qscheme=torch.per_tensor_affine of the weight. Use one of"),
        (get_input_act_qspec, (quantizers.weight(), None, None, None), "per_channel_symmetric of an activation"),
        (get_output_act_qspec, (None, quantizers.weight(), None, None), "per_channel_symmetric of an activation"),
    ],
)
def test_schemes_that_a_role_cannot_have(get, config, words):
    with pytest.raises(SpecError, match=words):
        get(QuantizationConfig(*config))


def integers(*args):
    model = models.export(models.Applied(lambda m, x: (x + 2).clamp(0)), *args)
    return model, models.find(model, "add")


@pytest.mark.parametrize("output", [None, ACT])
@pytest.mark.parametrize("kind", [QuantizationSpec, FixedQParamsQuantizationSpec])
def test_integers_cannot_be_quantized(output, kind):
    spec = ACT if kind is QuantizationSpec else FixedQParamsQuantizationSpec(torch.int8, 0.5, 0)
    model, add = integers(torch.arange(4))
    annotate(add, {} if output else {"self": spec}, spec if output else None)
    place = "add" if output else r"add\.self"
    match = rf"add \(add\).*: {place} is torch.int64, and its annotation asks for int8.*. Annotate tensors of a float"
    with pytest.raises(AnnotationError, match=match):
        read_plan(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_integers_may_be_left_as_they_are(dtype):
    model, add = integers(torch.arange(4))
    placeholder = QuantizationSpec(dtype, PlaceholderObserver)
    annotate(add, {"self": placeholder}, placeholder)
    assert set(read_plan(model).specs.values()) == {placeholder}
    annotate(add, {"self": None})
    assert read_plan(model).specs == {}
