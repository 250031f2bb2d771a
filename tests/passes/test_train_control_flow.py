"""Training of layers inside of control flow: the gradients of the float model, and convert gives what was trained."""

import copy

import pytest
import torch
from test_body_parameters import MODELS, Cond, Convolution, Map, Nested, Scan, While, every_body, exported, quantizer
from torch import nn

from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.control_flow import AS_OPERATORS, IN_PYTHON
from zeropoint.numerics.fake_quantize import disable_fake_quant, disable_observer
from zeropoint.report.trained.check_convert import check_convert
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e


def scanned(module, x):
    carried, results = torch.zeros(2, 8), []
    for each in x:
        carried = module.a(each).relu() + carried
        results.append(carried * 0.5)
    return torch.stack(results)


def repeated(module, x):
    for _ in range(3):
        x = module.b(module.a(x).relu())
    return x


def nested(module, x):
    if x.sum() <= 0:
        return module.a(x)
    return module.a(x) if x[0, 0] > 0 else module.b(x).relu()


PLAIN = {
    Cond: lambda module, x: module.a(x).relu() + module.b(x) if x.sum() > 0 else module.b(x),
    Nested: nested,
    Scan: scanned,
    Map: lambda module, x: module.a(x).relu(),
    While: repeated,
}
"""What the models compute, in plain Python."""
KINDS = list(PLAIN)


def prepared_of(kind):
    module, model, x = exported(kind)
    return module, prepare_qat_pt2e(model, quantizer(is_qat=True)), x


def branches(x):
    """Returns inputs that take every way through the models."""
    other = x.abs()
    other.flatten()[0] = -0.5
    return [x, -x, other, -other, x.abs(), -x.abs()]


def train(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        for each in branches(x):
            optimizer.zero_grad()
            model(each).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_float_model(kind):
    module, prepared, x = prepared_of(kind)
    prepared.apply(disable_fake_quant)
    for each in branches(x):
        wanted, result = copy.deepcopy(module), copy.deepcopy(prepared)
        outputs = [PLAIN[kind](wanted, each), result(each)]
        assert torch.allclose(*outputs, atol=1e-6)
        for output in outputs:
            output.square().sum().backward()
        gradients = [
            sorted(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None and p.grad.any())
            for model in (wanted, result)
        ]
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
        assert gradients[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_model_is_the_trained_one(kind):
    _, prepared, x = prepared_of(kind)
    before = copy.deepcopy(prepared.state_dict())
    train(prepared, x)
    after = prepared.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in prepared.named_parameters())
    prepared.eval()
    prepared.apply(disable_observer)
    with torch.no_grad():
        wanted = [prepared(each) for each in branches(x)]
        converted = convert_pt2e(prepared)
        again = torch.export.export(converted, (x,)).module()
        for each, output in zip(branches(x), wanted, strict=True):
            assert (converted(each) - output).abs().max() < 0.015 * output.abs().max()  # Biases are rounded, as in use.
            assert torch.equal(again(each), converted(each))


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_compares_what_control_flow_returns(kind):
    _, prepared, x = prepared_of(kind)
    train(prepared, x)
    converted = convert_pt2e(copy.deepcopy(prepared))
    check = check_convert(prepared, converted, x)
    assert check.agrees
    assert "inside of control flow" in check.notes[0]
    for tensor in converted.buffers():
        if tensor.dtype == torch.int8:
            tensor.neg_()
    assert check_convert(prepared, converted, x).first is not None


def test_the_converted_model_has_the_operators_of_control_flow():
    _, prepared, x = prepared_of(Nested)
    train(prepared, x)
    in_training = {node.target for model in [prepared, *every_body(prepared)] for node in model.graph.nodes}
    converted = convert_pt2e(prepared)
    at_last = {node.target for model in [converted, *every_body(converted)] for node in model.graph.nodes}
    assert in_training & set(AS_OPERATORS)
    assert at_last & set(IN_PYTHON)
    assert not in_training & set(IN_PYTHON)
    assert not at_last & set(AS_OPERATORS)


def test_batch_norm_in_a_branch_trains_and_is_folded():
    module, prepared, x = prepared_of(Convolution)
    mean = module.norm.running_mean.clone()
    train(prepared, x)
    assert not torch.equal(module.norm.running_mean, mean)
    prepared.eval()
    prepared.apply(disable_observer)
    with torch.no_grad():
        wanted = [prepared(x), prepared(-x)]
        converted = convert_pt2e(prepared)
        assert not [n for body in every_body(converted) for n in body.graph.nodes if n.target in BATCH_NORMS]
        assert torch.allclose(converted(x), wanted[0], atol=1e-4)
        assert torch.allclose(converted(-x), wanted[1], atol=1e-4)


def test_a_prepared_model_is_copied_and_loaded():
    _, prepared, x = prepared_of(Nested)
    train(prepared, x)
    _, other, _ = prepared_of(Nested)
    other.load_state_dict(prepared.state_dict())
    prepared.apply(disable_observer)
    other.apply(disable_observer)
    with torch.no_grad():
        for each in branches(x):
            wanted = prepared(each)
            assert torch.equal(copy.deepcopy(prepared)(each), wanted)
            assert torch.equal(other(each), wanted)


class Dropping(nn.Module):
    """Dropout in the branches, and a parameter of its own outside of them that a branch reads too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        y = self.a(x)
        return torch.cond(x.sum() > 0, lambda z: self.drop(self.b(z)), lambda z: self.a(z), (y,))


def test_modes_reach_the_branches():
    x = torch.rand(4, 8)
    with torch.no_grad():
        model = torch.export.export(Dropping().train(), (x,)).module()
    prepared = prepare_qat_pt2e(model, quantizer(is_qat=True))
    prepared(x)
    prepared(-x)
    prepared.apply(disable_observer)
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    wanted = prepared(x)
    assert torch.equal(prepared(x), wanted)
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))
    assert (convert_pt2e(prepared)(x) - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_all_models_of_control_flow_are_trained_here():
    assert {*KINDS, Convolution} == set(MODELS)
