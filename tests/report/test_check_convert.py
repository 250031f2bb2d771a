"""Prepared against converted, site by site: agreement where nothing was changed, the place where something was."""

import copy

import models
import pytest
import qat_quantizers as qat
import torch
from quantizers import KEY, STATIC, ByHand, activation, annotate, weight
from torch import nn

import zeropoint
from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CalibrationError, ComparisonError
from zeropoint.core.specs import SharedQuantizationSpec
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import LAYERS
from zeropoint.numerics.fake_quantize import FakeQuantize, disable_fake_quant
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize, enable_range_learning
from zeropoint.numerics.observers import MinMaxObserver, MovingAverageMinMaxObserver, PerGroupMinMaxObserver
from zeropoint.report.trained.check_convert import ConvertCheck, check_convert
from zeropoint.report.trained.site_values import steps_apart
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

OURS = ByHand(qat.qat)


def xnnpack(**settings):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True, **settings))


def train(model, inputs, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        torch.manual_seed(step)
        result = model(*[torch.randn_like(x) for x in inputs])
        optimizer.zero_grad()
        result.square().mean().backward()
        optimizer.step()


def trained(module, inputs, quantizer=OURS):
    """Returns a model that was trained for some steps, and what became of a copy of it."""
    torch.manual_seed(0)
    models.randomize_norms(module)
    prepared = prepare_qat_pt2e(torch.export.export(module.train(), inputs).module(), quantizer)
    train(prepared, inputs)
    return prepared, convert_pt2e(copy.deepcopy(prepared))


def separable():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8)]
    layers += [nn.BatchNorm2d(8), nn.ReLU6(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 16, 5)]
    return nn.Sequential(*layers), (torch.randn(4, 3, 8, 8),)


def transposed():
    torch.manual_seed(1)
    layers = [nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 3, 1)]
    return nn.Sequential(*layers), (torch.randn(3, 4, 7),)


def with_int32_biases(model):
    qat.qat(model, bias=qat.derived_bias)


BUILDS = [models.net, models.mlp, models.called_twice, separable, transposed]
QUANTIZERS = {
    "ours": lambda: OURS,
    "per tensor": lambda: ByHand(lambda model: qat.qat(model, per_tensor=True)),
    "int32 biases": lambda: ByHand(with_int32_biases),
    "xnnpack": lambda: xnnpack(is_per_channel=True),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("build", BUILDS)
def test_what_was_trained_is_what_is_converted(build, name):
    module, inputs = build()
    prepared, converted = trained(module, inputs, QUANTIZERS[name]())
    check = check_convert(prepared, converted, inputs)
    assert check.first is None
    assert check.agrees
    assert check.largest_steps <= 1.001
    assert all(site.converted and site.sqnr_db > 30 for site in check.sites)
    calls = [node.name for node in prepared.graph.nodes if node.op == "call_module" and node.users]
    fakes = [name for name in calls if isinstance(prepared.get_submodule(name), FakeQuantize)]
    assert [site.prepared for site in check.sites] == fakes
    assert "is what was trained" in str(check)


def test_it_is_the_difference_of_the_two_models():
    """The last site gives the output, so its numbers follow from what the models return."""
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    wrong = models.find(converted, "dequantize_per_tensor", -1)
    scale = wrong.args[1]
    wrong.args = (wrong.args[0], scale * 1.5, *wrong.args[2:])
    converted.recompile()
    (result,) = check_convert(prepared, converted, inputs).sites[-1:]
    in_eval_mode = copy.deepcopy(prepared).eval()
    for each in in_eval_mode.modules():
        if isinstance(each, FakeQuantize):
            each.disable_observer()
    expected, found = in_eval_mode(*inputs), converted(*inputs)
    assert result.steps == pytest.approx(((expected - found).abs().max() / scale).item(), rel=1e-4)
    noise = (expected - found).square().sum()
    assert result.sqnr_db == pytest.approx((10 * torch.log10(expected.square().sum() / noise)).item(), rel=1e-4)


def weights_of(converted):
    return [node for node in converted.graph.nodes if str(node.target).startswith("_frozen_param")]


@pytest.mark.parametrize("index", range(3))
def test_a_weight_that_was_changed_is_named_first(index):
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    stored = weights_of(converted)[index]
    tensor = get_attribute(converted, stored.target)
    tensor.view(-1)[3] += 5 if tensor.view(-1)[3] < 100 else -5
    check = check_convert(prepared, converted, inputs)
    (dequantize,) = stored.users
    (layer,) = dequantize.users
    assert check.first.site == f"{layer.name}.weight"
    assert check.first.converted == dequantize.name
    assert check.first.own_steps == pytest.approx(5, abs=1e-3)
    assert [site for site in check.sites if not site.agrees] == [check.first]
    assert f"differs from {layer.name}.weight on: 5.00 steps" in str(check)


@pytest.mark.parametrize("factor", [0.8, 1.05])
@pytest.mark.parametrize("index", range(4))
def test_a_scale_that_was_changed_is_named_first(index, factor):
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    dequantize = [n for n in converted.graph.nodes if "dequantize_per_tensor" in str(n.target)][index]
    for node in (dequantize, dequantize.args[0]):
        node.args = (node.args[0], node.args[1] * factor, *node.args[2:])
    converted.recompile()
    first = check_convert(prepared, converted, inputs).first
    assert first.converted == dequantize.name
    assert first.site == dequantize.args[0].args[0].name


def test_a_bias_that_was_changed_is_found_behind_its_layer():
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    layers = [node for node in converted.graph.nodes if node.target in LAYERS]
    get_attribute(converted, argument(layers[1], "bias").target).data.add_(1.0)
    assert check_convert(prepared, converted, inputs).first.site == "hardtanh_1"


def test_a_site_that_is_gone_is_named():
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    dequantize = models.find(converted, "dequantize_per_tensor", 1)
    dequantize.replace_all_uses_with(dequantize.args[0].args[0])
    converted.graph.eliminate_dead_code()
    converted.recompile()
    check = check_convert(prepared, converted, inputs)
    assert (check.first.site, check.first.converted) == ("hardtanh", "")
    assert "not in the converted model" in str(check)


def test_a_float_layer_at_the_end_is_found_at_the_output():
    def first_layer(model):
        layer = models.find(model, "linear")
        inputs = {argument(layer, "input"): qat.fake_activation(), argument(layer, "weight"): qat.fake_weight()}
        layer.meta[KEY] = QuantizationAnnotation(inputs, qat.fake_activation(), _annotated=True)

    module, inputs = models.mlp()
    prepared, converted = trained(module, inputs, ByHand(first_layer))
    assert check_convert(prepared, converted, inputs).agrees
    converted.get_parameter("2.bias").data.add_(1.0)
    first = check_convert(prepared, converted, inputs).first
    assert first.site == "output 0"
    assert first.own_steps > 50


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_stay_as_they_are(mode):
    module, inputs = separable()
    prepared, converted = trained(module, inputs)
    prepared.train(mode)
    found = []
    for _ in range(2):
        states = [copy.deepcopy(model.state_dict()) for model in (prepared, converted)]
        modes = [[each.training for each in model.modules()] for model in (prepared, converted)]
        graphs = [[node.format_node() for node in model.graph.nodes] for model in (prepared, converted)]
        found.append((states, modes, graphs, torch.random.get_rng_state().clone()))
        check_convert(prepared, converted, inputs)
    (before, modes, graphs, random), (after, *others) = found
    assert others[:2] == [modes, graphs]
    assert torch.equal(random, others[2])
    for first, second in zip(before, after, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_learned_ranges_and_wrapped_models():
    act = LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127)
    module, inputs = separable()
    quantizer = ByHand(lambda model: qat.qat(model, act=activation(observer_or_fake_quant_ctr=act)))
    prepared, _ = trained(module, inputs, quantizer)
    prepared.apply(enable_range_learning)
    train(prepared, inputs)
    wrapped = nn.ModuleDict({"module": prepared})
    check = check_convert(wrapped, convert_pt2e(copy.deepcopy(prepared)), inputs[0])
    assert check.agrees
    assert check.sites


def test_a_shared_range():
    def shared(model):
        node = models.find(model, "cat")
        first, *others = argument(node, "tensors")
        like = SharedQuantizationSpec((first, node))
        maps = {first: qat.fake_activation(), **dict.fromkeys(others, like)}
        node.meta[KEY] = QuantizationAnnotation(maps, like, _annotated=True)

    module, inputs = models.branches()
    prepared, converted = trained(module, inputs, ByHand(shared))
    check = check_convert(prepared, converted, inputs)
    assert check.agrees
    assert len(check.sites) == 4


def dynamic_linear(model):
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=1)
    act = activation(observer_or_fake_quant_ctr=fake, is_dynamic=True)
    for node in model.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            annotate(node, {"input": act, "weight": qat.fake_weight()})


def test_ranges_chosen_at_run_time_are_those_of_the_inputs():
    module, inputs = models.mlp()
    prepared, converted = trained(module, inputs, ByHand(dynamic_linear))
    check = check_convert(prepared, converted, (inputs[0] * 30,))
    assert check.agrees
    assert len(check.sites) == 4
    assert models.count(converted, "choose_qparams") == 2


def test_weights_in_groups():
    fake = FakeQuantize.with_args(observer=PerGroupMinMaxObserver, group_size=2)
    settings = {"dtype": torch.int8, "quant_min": -8, "quant_max": 7, "observer_or_fake_quant_ctr": fake}

    def grouped(model):
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                annotate(node, {"weight": weight(**settings)})

    module, inputs = models.mlp()
    prepared, converted = trained(module, inputs, ByHand(grouped))
    assert check_convert(prepared, converted, inputs).agrees
    get_attribute(converted, weights_of(converted)[1].target)[0, 0] += 2
    assert check_convert(prepared, converted, inputs).first.site == "linear_1.weight"


def test_fake_quantizers_after_training():
    """``prepare_pt2e`` with fake quantizers: batch norm is folded before, ranges are observed in eval mode."""
    act = activation(observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MinMaxObserver))
    module, inputs = separable()
    exported = torch.export.export(module.eval(), inputs).module()
    prepared = prepare_pt2e(exported, ByHand(lambda model: qat.qat(model, act=act)))
    for factor in (1.0, 2.0):
        prepared(inputs[0] * factor)
    converted = convert_pt2e(copy.deepcopy(prepared))
    check = check_convert(prepared, converted, inputs)
    assert check.agrees
    assert any(site.site == "conv2d.weight" for site in check.sites)


def test_half_precision():
    module, inputs = models.mlp()
    prepared, converted = trained(module.bfloat16(), (inputs[0].bfloat16(),))
    assert check_convert(prepared, converted, inputs[0].bfloat16()).agrees


def test_differences_within_a_step_add_up():
    """For XNNPACK, weights that were not trained are moved by less than a step, so that biases are on a grid."""
    module, inputs = separable()
    exported = torch.export.export(module.eval(), inputs).module()
    prepared = prepare_pt2e(exported, xnnpack(is_per_channel=True))
    prepared(*inputs)
    check = check_convert(prepared, convert_pt2e(copy.deepcopy(prepared)), inputs)
    assert check.agrees
    assert 0 < max(site.own_steps for site in check.sites) <= 1.001 < check.largest_steps
    assert f"within one step, {check.largest_steps:.2f} with what those before differ by" in str(check)


def test_steps_of_other_shapes_and_values_that_are_no_numbers():
    one, scale = torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor(0.5)
    assert steps_apart(one, one.clone(), scale) == 0
    assert steps_apart(one, torch.tensor([2.0, torch.inf, torch.nan]), scale) == pytest.approx(2)
    assert steps_apart(one, torch.tensor([1.0, 5.0, torch.nan]), scale) == torch.inf
    assert steps_apart(one, torch.tensor([1.0, torch.inf, 0.0]), scale) == torch.inf
    assert steps_apart(one, one[:2], scale) == torch.inf
    assert steps_apart(one[:0], one[:0], scale) == 0


def observed():
    module, inputs = models.mlp()
    prepared = prepare_pt2e(models.export(module.eval(), *inputs), STATIC)
    prepared(*inputs)
    return prepared, inputs


def test_observers_do_not_round():
    prepared, inputs = observed()
    with pytest.raises(ComparisonError, match=r"observers only, which do not round.*prepare_qat_pt2e"):
        check_convert(prepared, convert_pt2e(copy.deepcopy(prepared)), inputs)


def test_the_prepared_model_is_a_copy():
    module, inputs = models.mlp()
    prepared, _ = trained(module, inputs)
    converted = convert_pt2e(prepared)
    with pytest.raises(ComparisonError, match=r"no fake quantizers.*copy\.deepcopy"):
        check_convert(prepared, converted, inputs)


def test_what_is_not_a_pair_is_refused():
    module, inputs = models.mlp()
    prepared, converted = trained(module, inputs)
    reference = convert_pt2e(copy.deepcopy(prepared), use_reference_representation=True)
    again = torch.export.export(converted, inputs).module()
    for wrong, words in ((prepared, "has observers"), (reference, "reference representation"), (again, "do not say")):
        with pytest.raises(ComparisonError, match=words):
            check_convert(prepared, wrong, inputs)
    with pytest.raises(ComparisonError, match="prepared is Sequential with 0 exported graphs"):
        check_convert(module, converted, inputs)
    with pytest.raises(CalibrationError, match="check_convert: has 2 inputs, the model takes 1"):
        check_convert(prepared, converted, (*inputs, *inputs))
    with pytest.raises(ComparisonError, match=r"4 of 5 fake quantizers are switched off|5 of 5"):
        check_convert(prepared.apply(disable_fake_quant), converted, inputs)


def test_it_is_public():
    assert zeropoint.check_convert is check_convert
    assert zeropoint.ConvertCheck is ConvertCheck
