"""A graph in training runs its groups in one step each, and shows, copies and saves the operators that it has."""

import copy
import io
from dataclasses import replace

import models
import pytest
import qat_quantizers
import quantizers
import torch
from torch import nn
from torch.fx import Interpreter

from zeropoint.backends import xnnpack
from zeropoint.graph.train_eval import freeze_batch_norm, move_exported_model_to_eval
from zeropoint.numerics.fake_quantize import disable_fake_quant, disable_observer
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize
from zeropoint.numerics.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.trained_module import TrainedModule
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

aten = torch.ops.aten
ONE_STEP = "unscaled_batch_norm("
LAYERS = {
    "conv": lambda: ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6()), (8, 3, 6, 6)),
    "no_bias": lambda: ((nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.1, momentum=0.5)), (8, 3, 6, 6)),
    "plain_norm": lambda: ((nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False), nn.ReLU()), (8, 3, 6)),
    "depthwise3d": lambda: ((nn.Conv3d(4, 4, 2, groups=4), nn.BatchNorm3d(4)), (4, 4, 3, 3, 3)),
    "transposed": lambda: ((nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()), (4, 3, 4, 4)),
    "linear": lambda: ((nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), (8, 6)),
}


def prepared_model(name="conv"):
    torch.manual_seed(0)
    layers, shape = LAYERS[name]()
    module = nn.Sequential(*layers)
    models.randomize_norms(module)
    x = torch.randn(shape)
    exported = torch.export.export(module.train(), (x,)).module()
    return prepare_qat_pt2e(exported, quantizers.ByHand(qat_quantizers.qat)), x


def step_by_step(model):
    """Returns a copy that runs its graph as it is written."""
    return Interpreter(copy.deepcopy(model))


def trained(module, run, x, steps=4):
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    outputs = []
    for step in range(steps):
        result = run(x + step / 10)
        outputs.append(result.detach())
        optimizer.zero_grad()
        result.square().mean().backward()
        optimizer.step()
    return outputs


@pytest.mark.parametrize("name", LAYERS)
def test_it_trains_as_the_graph_is_written(name):
    model, x = prepared_model(name)
    assert model.code.count(ONE_STEP) == 1
    written = step_by_step(model)
    expected = trained(written.module, written.run, x)
    for found, wanted in zip(trained(model, model, x), expected, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5)
    states = written.module.state_dict()
    for key, value in model.state_dict().items():
        assert torch.allclose(value.double(), states[key].double(), atol=2e-5), key


def test_the_graph_has_the_operators_that_programs_look_for():
    model, x = prepared_model()
    model(x)
    targets = [node.target for node in model.graph.nodes]
    assert targets.count(aten.div.Tensor) == 2
    assert targets.count(aten.batch_norm.default) == 1
    assert not any("unscaled" in str(target) for target in targets)
    model.graph.lint()


def test_in_eval_mode_batch_norm_is_in_the_layer():
    model, x = prepared_model()
    model(x)
    model.eval().apply(disable_observer)
    assert ONE_STEP not in model.code
    assert "batch_norm" not in model.code
    assert torch.allclose(model(x), step_by_step(model).run(x), atol=0.02)  # Here and there the next integer.
    model.apply(disable_fake_quant)
    assert torch.allclose(model(x), step_by_step(model).run(x), atol=1e-5)
    model.train()
    assert ONE_STEP in model.code


def xnnpack_trained(layers, shape, fakes):
    torch.manual_seed(0)
    module = nn.Sequential(*layers)
    module(torch.randn(shape))
    models.randomize_norms(module)
    exported = torch.export.export(module.train(), (torch.randn(shape),)).module()
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    if fakes is not None:
        fields = {name: getattr(config, name) for name in ("input_activation", "output_activation", "weight")}
        config = replace(config, **{name: fakes(spec) for name, spec in fields.items()})
    model = prepare_qat_pt2e(exported, xnnpack.XNNPACKQuantizer().set_global(config))
    trained(model, model, torch.randn(shape))
    return model.eval().apply(disable_observer)


def learned(spec):
    observer = MovingAverageMinMaxObserver
    if spec.qscheme == torch.per_channel_symmetric:
        observer = MovingAveragePerChannelMinMaxObserver.with_args(ch_axis=spec.ch_axis)
    fake = LearnableFakeQuantize.with_args(observer=observer, eps=2**-12)
    return replace(spec, observer_or_fake_quant_ctr=fake)


@pytest.mark.parametrize("fakes", [None, learned], ids=["moving average", "learned"])
@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_is_the_converted_model_to_the_bit(name, fakes):
    layers, shape = LAYERS[name]()
    shape = (max(shape[0], 2), *shape[1:])
    model = xnnpack_trained((*layers, nn.Flatten(), nn.LazyLinear(3)), shape, fakes)
    x = torch.randn(64, *shape[1:])[: shape[0]] * 1.5
    expected = model(x)
    assert torch.equal(convert_pt2e(copy.deepcopy(model))(x), expected)
    assert torch.equal(convert_pt2e(model)(x), expected)


def test_gradients_in_eval_mode_are_those_of_the_graph():
    layers, shape = LAYERS["conv"]()
    model = xnnpack_trained((*layers, nn.Conv2d(4, 2, 1)), shape, None)
    x = torch.randn(shape)
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    written = step_by_step(model)
    expected = torch.autograd.grad(written.run(x).square().sum(), list(written.module.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert sqnr_db(other, one) > 25  # Rounded biases, and integers that lie next to each other.


def test_frozen_batch_norms_run_as_they_are():
    model, x = prepared_model()
    model(x)
    freeze_batch_norm(model)
    assert ONE_STEP not in model.code
    before = model.state_dict()["1.running_mean"].clone()
    model(x)
    assert torch.equal(model.state_dict()["1.running_mean"], before)


def test_copies_run_in_one_step_too():
    model, x = prepared_model()
    twin = copy.deepcopy(model)
    assert twin.code == model.code
    assert torch.equal(twin(x), model(x))


def test_a_saved_model_has_the_operators():
    model, x = prepared_model()
    model(x)
    file = io.BytesIO()
    torch.save(model, file)
    assert ONE_STEP in model.code
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    targets = [node.target for node in loaded.graph.nodes]
    assert targets.count(aten.div.Tensor) == 2
    assert targets.count(aten.batch_norm.default) == 1
    assert torch.allclose(loaded(x), model(x), atol=1e-5)


def test_a_graph_that_was_changed_runs_as_changed():
    model, x = prepared_model("no_bias")
    division = next(node for node in model.graph.nodes if getattr(node.meta.get("qat_conv_bn"), "role", "") == "output")
    with model.graph.inserting_after(division):
        doubled = model.graph.call_function(aten.mul.Tensor, (division, 2.0))
    division.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    model.recompile()
    assert ONE_STEP not in model.code
    assert torch.equal(step_by_step(model).run(x), model(x))


def test_it_is_converted_as_it_was_trained():
    model, x = prepared_model()
    trained(model, model, x)
    evaluated = qat_quantizers.in_eval_mode(model)
    expected = evaluated(x)
    converted = convert_pt2e(model)
    scale = models.find(converted, "output").args[0][0].args[1]
    assert (converted(x) - expected).abs().max() <= scale * 1.001


def test_code_is_made_once_for_each_switch(monkeypatch):
    layers, shape = LAYERS["conv"]()
    model = xnnpack_trained(layers, shape, None)
    made = []
    monkeypatch.setattr(
        TrainedModule, "recompile", lambda self, whole=TrainedModule.recompile: made.append(whole(self))
    )
    for mode, count in ((False, 0), (True, 1), (True, 1), (False, 2), (False, 2)):
        model.train(mode)
        assert len(made) == count


def test_frozen_batch_norms_are_folded_however_eval_mode_is_set():
    layers, shape = LAYERS["conv"]()
    model = xnnpack_trained(layers, shape, None).train()
    freeze_batch_norm(model)
    move_exported_model_to_eval(model)
    assert "batch_norm" not in model.code
    x = torch.randn(shape)
    expected = model(x)
    assert torch.equal(convert_pt2e(model)(x), expected)
