"""``quantize`` with a training loop: where it starts, what is kept and why, what is checked, what is refused."""

import copy
import dataclasses
import math

import models
import pytest
import torch
from quantizers import KEY, STATIC
from test_api import quantize_without_runtime
from torch import nn

import zeropoint as zp
from zeropoint import training
from zeropoint.algorithms.start_ranges import start_ranges
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_default_quantization_config
from zeropoint.core.errors import ComparisonError, GraphError, NonFiniteError, SpecError, VerificationError
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode
from zeropoint.numerics.fake_quantize import FakeQuantize, disable_fake_quant
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize
from zeropoint.numerics.observers import MovingAverageMinMaxObserver
from zeropoint.report.trained.training import decide, fit_db
from zeropoint.workflow import prepare_qat_pt2e


def pictures(count, seed):
    """Returns batches of pictures with a bright spot, and in which quarter it is."""
    random = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(count, 16, 1, 8, 8, generator=random)
    y = torch.randint(0, 4, (count, 16), generator=random)
    for quarter in range(4):
        rows, columns = divmod(quarter, 2)
        x[..., 4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] += (y == quarter)[..., None, None, None] * 0.6
    return x, y


X, Y = pictures(24, 1)
DATA = [(x,) for x in X[:6]]


def loop(model, lr=0.05, schedule=None, steps=24):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for x, y in zip(X[:steps], Y[:steps], strict=True):
        if schedule is not None:
            schedule.step(model)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    loop(model.train(), steps=14)
    return model.eval()


@pytest.fixture(scope="module")
def float_model():
    return small()


def accuracy(model):
    x, y = pictures(16, 2)
    return (model(x.flatten(0, 1)).argmax(-1) == y.flatten()).float().mean()


def ruin(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model(X[0])


def quantize(monkeypatch, model, train, **settings):
    return quantize_without_runtime(monkeypatch, model, (X[0],), DATA, train=train, **settings)


def test_training_makes_it_better_and_is_kept(monkeypatch, float_model):
    before, was_training = copy.deepcopy(float_model.state_dict()), []

    def train(model):
        was_training.append(model.training)
        loop(model, schedule=zp.QATSchedule(2, freeze_ranges_after=18, freeze_batch_norm_after=12))

    result = quantize(monkeypatch, float_model, train, evaluate=accuracy)
    kept = result.training
    assert was_training == [True]
    assert (kept.kept, kept.metric, kept.warning) == ("qat", "evaluate", "")
    assert kept.qat == pytest.approx(accuracy(result.model).item())
    assert kept.ptq == pytest.approx(accuracy(kept.ptq_model).item())
    assert kept.qat > kept.ptq + 0.02
    assert result.model is kept.qat_model
    assert kept.check.agrees
    assert len(kept.check.sites) == 10
    assert {"prepare training", "train", "evaluate"} <= set(result.stages_s)
    assert f"kept the trained model; evaluate: {kept.ptq:.6g} before, {kept.qat:.6g} trained" in str(result)
    assert all(torch.equal(before[name], value) for name, value in float_model.state_dict().items())
    assert not float_model.training


@pytest.mark.parametrize("evaluate", [accuracy, None])
def test_training_that_ruins_the_model_is_not_kept(monkeypatch, float_model, evaluate):
    result = quantize(monkeypatch, float_model, ruin, evaluate=evaluate)
    kept = result.training
    assert kept.kept == "ptq"
    assert kept.qat < kept.ptq
    assert result.model is kept.ptq_model
    assert kept.warning
    assert f"warning   {kept.warning}" in str(result)
    plain = quantize_without_runtime(monkeypatch, float_model, (X[0],), DATA)
    assert torch.equal(result.model(X[0]), plain.model(X[0]))
    assert result.accuracy == plain.accuracy


def test_without_training_it_is_as_good_as_the_float_model_allows(monkeypatch, float_model):
    result = quantize(monkeypatch, float_model, lambda model: None)
    assert result.training.kept == "qat"
    assert result.training.metric == "dB of fit to the float model"
    assert result.training.qat > 25


def test_it_starts_with_the_ranges_of_the_data(monkeypatch):
    """The oracle is the float module: smallest and largest values, over all batches, of what its layers give."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    models.randomize_norms(module)
    found = []

    def train(model):
        found.extend(each for each in model.modules() if isinstance(each, FakeQuantize) and not each.is_per_channel)
        assert all(each.observer_enabled.item() and each.fake_quant_enabled.item() for each in found)
        assert [is_in_train_mode(node) for node in model.graph.nodes if node.target in BATCH_NORMS] == [True]
        found[:] = [(each.scale.item(), each.zero_point.item()) for each in found]

    quantize_without_runtime(monkeypatch, module, (X[0],), iter(DATA), train=train)
    whole = torch.cat([x for (x,) in DATA])
    with torch.no_grad():
        tensors = [whole, module[:3](whole), module(whole)]
    expected = []
    for tensor in tensors:
        low, high = tensor.min().clamp(max=0), tensor.max().clamp(min=0)
        scale = (high - low) / 255
        expected.append((scale.item(), -128 - round((low / scale).item())))
    for mine, wanted in zip(sorted(set(found)), sorted(expected), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)


def test_statistics_and_states_stay_while_ranges_start():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module.register_buffer("calls", torch.zeros(1))
    models.randomize_norms(module)
    exported = torch.export.export(Counting(module).train(), (X[0],)).module()
    prepared = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(get_default_quantization_config(is_qat=True)))
    state = copy.deepcopy(prepared.state_dict())
    with start_ranges(prepared):
        for inputs in DATA:
            prepared(*inputs)
    for name, value in prepared.state_dict().items():
        if "activation_post_process" not in name:
            assert torch.equal(value, state[name]), name
    observers = [each for each in prepared.modules() if isinstance(each, MovingAverageMinMaxObserver)]
    assert {each.averaging_constant for each in observers} == {0.01}
    assert not any(each._forward_hooks for each in prepared.modules())


class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.inner(x) + self.calls


def test_a_model_that_writes_to_buffers(monkeypatch):
    torch.manual_seed(0)
    module = Counting(nn.Conv2d(1, 4, 3)).eval()
    result = quantize(monkeypatch, module, lambda model: model(X[0]).shape and None)
    assert result.model.state_dict()["calls"].item() == 0
    assert result.training.qat_model.state_dict()["calls"].item() == 0
    assert module.calls.item() == 0


LSQ = LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)


def learning_quantizer():
    config = get_default_quantization_config(is_qat=True)
    learned = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=LSQ)
    config = dataclasses.replace(config, input_activation=learned, output_activation=learned)
    return XNNPACKQuantizer().set_global(config)


def test_ranges_that_are_learned_start_there_too(monkeypatch, float_model):
    starts = []

    def train(model):
        learners = [each for each in model.modules() if isinstance(each, LearnableFakeQuantize)]
        starts.extend(each.scale.item() for each in learners)
        loop(model, 0.01, zp.QATSchedule(learn_ranges_after=0))
        starts.append([each.scale.item() for each in learners])

    result = quantize(monkeypatch, float_model, train, evaluate=accuracy, quantizer=learning_quantizer())
    assert min(starts[:-1]) > 2e-3
    assert starts[-1] != starts[:-1]
    assert result.training.check.agrees


def test_a_copy_or_a_wrapper_may_be_returned(monkeypatch, float_model):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    best = []

    def train(model):
        loop(model, 0.01)
        best.append(copy.deepcopy(model).eval())
        ruin(model)
        return Wrapper(best[0])

    result = quantize(monkeypatch, float_model, train, evaluate=accuracy)
    assert result.training.kept == "qat"
    expected = best[0](X[0])
    assert (result.model(X[0]) - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_exported_program_is_trained_and_left_alone(monkeypatch, float_model):
    program = torch.export.export(copy.deepcopy(float_model).train(), (X[0],))
    before = copy.deepcopy(program.state_dict)
    result = quantize(monkeypatch, program, lambda model: loop(model, 0.01), evaluate=accuracy)
    assert result.training.qat > 0.5
    assert result.training.ptq > 0.5
    assert not [row for row in result.coverage if row.operator == "batch_norm" and not row.is_quantized]
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())


def test_what_is_frozen_in_a_module_in_train_mode_stays_so(monkeypatch, float_model):
    module = copy.deepcopy(float_model).train()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    modes = []

    def train(model):
        modes.extend(is_in_train_mode(node) for node in model.graph.nodes if node.target in BATCH_NORMS)
        modes.extend(p.requires_grad for name, p in model.named_parameters() if name == "0.weight")

    quantize(monkeypatch, module, train)
    assert modes == [False, False]
    assert module.training
    assert not module[1].training


def test_a_batch_norm_of_one_value_per_channel_is_exported_in_eval_mode(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    data = [torch.randn(1, 4) for _ in range(4)]
    seen = []
    quantize_without_runtime(
        monkeypatch, module, (data[0],), data, train=lambda m: seen.append(m(torch.randn(6, 4)).shape)
    )
    assert seen == [(6, 2)]


def test_inside_of_no_grad(monkeypatch, float_model):
    with torch.no_grad():
        result = quantize(monkeypatch, float_model, lambda model: loop(model, 0.01), evaluate=accuracy)
    assert result.training.qat > 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": 3}, "quantize: train is int, not a function"),
        ({"train": nn.Linear(1, 1)}, "train is Linear, not a function"),
        ({"train": ruin, "evaluate": 0.5}, "evaluate is float, not a function"),
        ({"train": None, "evaluate": accuracy}, "there is no train="),
    ],
)
def test_arguments_that_are_no_functions(monkeypatch, float_model, settings, words):
    with pytest.raises(SpecError, match=words):
        quantize(monkeypatch, float_model, **settings)


def test_a_quantizer_of_observers_is_refused_before_anything_is_trained(monkeypatch, float_model):
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config())
    for each in (quantizer, STATIC):
        with pytest.raises(GraphError, match=r"quantize: train= needs fake quantizers.*is_qat=True"):
            quantize(monkeypatch, float_model, pytest.fail, quantizer=each)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (0.3, "train: it returned float. Train the given model in place and return None"),
        (nn.Linear(1, 1), "it returned Linear, which holds 0 exported graphs"),
        ({}, "it returned dict"),
        (small, "it returned function"),
    ],
)
def test_what_a_loop_may_not_return(monkeypatch, float_model, returned, words):
    with pytest.raises(SpecError, match=words):
        quantize(monkeypatch, float_model, lambda model: returned)


def test_a_loop_that_converts(monkeypatch, float_model):
    for train in (zp.convert_pt2e, lambda model: zp.convert_pt2e(model) and None):
        with pytest.raises(GraphError, match=r"train: the model has no fake quantizers after training"):
            quantize(monkeypatch, float_model, train)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("5.weight", math.nan, "5.weight: NaN in the model after training"),
        ("8.bias", math.inf, "8.bias: infinity in the model after training"),
        ("1.running_var", math.nan, "1.running_var: NaN"),
    ],
)
def test_a_parameter_that_is_no_number_is_named(monkeypatch, float_model, name, value, words):
    def train(model):
        with torch.no_grad():
            model.state_dict(keep_vars=True)[name].view(-1)[1] = value

    with pytest.raises(NonFiniteError, match=words):
        quantize(monkeypatch, float_model, train)


def test_fake_quantizers_left_off(monkeypatch, float_model):
    with pytest.raises(ComparisonError, match="10 of 10 fake quantizers are switched off"):
        quantize(monkeypatch, float_model, lambda model: model.apply(disable_fake_quant))
    late = zp.QATSchedule(observe_steps=1000)
    with pytest.raises(ComparisonError, match="switched off"):
        quantize(monkeypatch, float_model, lambda model: loop(model, 0.01, late))


def test_the_first_site_that_converts_to_something_else_is_named(monkeypatch, float_model):
    convert = training.convert_pt2e

    def wrong(model):
        converted = convert(model)
        node = models.find(converted, "dequantize_per_tensor", 1)
        node.args = (node.args[0], node.args[1] * 1.5, *node.args[2:])
        converted.recompile()
        return converted

    monkeypatch.setattr(training, "convert_pt2e", wrong)
    with pytest.raises(VerificationError, match=r"^hardtanh: the converted model differs by \d+\.\d+ steps from what"):
        quantize(monkeypatch, float_model, lambda model: None)


@pytest.mark.parametrize("wrong", ["0.5", None, torch.zeros(2), math.nan])
def test_an_evaluation_that_is_no_number_is_found_before_training(monkeypatch, float_model, wrong):
    with pytest.raises(SpecError, match=r"^evaluate: it returned .*, not a number"):
        quantize(monkeypatch, float_model, pytest.fail, evaluate=lambda model: wrong)


def test_an_evaluation_that_has_no_answer_for_the_trained_model(monkeypatch, float_model):
    answers = iter([0.5, math.nan])
    result = quantize(monkeypatch, float_model, lambda model: None, evaluate=lambda model: next(answers))
    assert result.training.kept == "ptq"
    assert "from 0.5 to nan" in result.training.warning


def test_evaluation_runs_on_a_copy_without_gradients(monkeypatch, float_model):
    seen = []

    def evaluate(model):
        seen.append((torch.is_grad_enabled(), KEY in model.meta))
        model.train()
        for buffer in model.buffers():
            buffer.zero_()
        return 1.0

    result = quantize(monkeypatch, float_model, lambda model: None, evaluate=evaluate)
    assert seen == [(False, False)] * 2
    assert result.model(X[0]).abs().max() > 0


def test_the_better_one_is_kept():
    assert decide("evaluate", 0.5, 0.5) == ("qat", "")
    assert decide("evaluate", 0.5, 0.4)[0] == "ptq"
    assert decide("fit", 30.0, 31.0) == ("qat", "")
    assert decide("fit", -1.0, -0.5) == ("qat", "")
    kept, warning = decide("fit", 30.0, 8.0)
    assert kept == "qat"
    assert "from 30.0 to 8.0 dB, as labels do too: whether it is better was not measured" in warning
    assert decide("fit", 30.0, -0.1)[0] == "ptq"
    kept, warning = decide("fit", math.nan, math.nan)
    assert kept == "qat"
    assert "no output is a float" in warning


def test_the_fit_is_0_for_the_mean_and_follows_the_noise():
    random = torch.Generator().manual_seed(0)
    reference = [torch.randn(8, 3, generator=random) + 50 for _ in range(4)]
    mean = torch.cat(reference).mean(0)
    assert fit_db(reference, [mean.expand(8, 3)] * 4) == pytest.approx(0, abs=1e-9)
    noise = [r + 0.1 * (r - mean) for r in reference]
    assert fit_db(reference, noise) == pytest.approx(20, abs=1e-4)
    assert fit_db(reference, reference) == math.inf
    assert fit_db(reference, [r * math.nan for r in reference]) == -math.inf
    assert fit_db([torch.ones(4, 2)], [torch.zeros(4, 2)]) == -math.inf
    assert fit_db([torch.randn(4)], [torch.zeros(5)]) == -math.inf
    masked = torch.tensor([[0.0, -torch.inf], [1.0, -torch.inf]])
    assert fit_db([masked], [masked + torch.tensor([0.1, 0.0])]) == pytest.approx(10 * math.log10(0.5 / 0.02), abs=1e-4)
    odd = [torch.randn(2, 3, generator=random), torch.randn(2, 4, generator=random)]
    assert fit_db(odd, [o + 0.1 for o in odd]) > 10
