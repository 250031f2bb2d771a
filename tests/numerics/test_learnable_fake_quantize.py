"""Fake quantizers that learn: values and gradients against the papers' formulas and torchao's, switches, and state."""

import copy
import warnings

import models
import pytest
import qat_quantizers as qat
import torch
from quantizers import ByHand
from torch import nn

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.learnable_fake_quantize import (
    LearnableFakeQuantize,
    disable_range_learning,
    enable_range_learning,
)
from zeropoint.numerics.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
)
from zeropoint.numerics.straight_through import learned_fake_quantize
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import observer as torchao_observers
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize as Theirs

INT8 = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
CASES = [
    ("MovingAverageMinMaxObserver", {"quant_min": 0, "quant_max": 255, "dtype": torch.uint8}),
    ("MinMaxObserver", {**INT8, "qscheme": torch.per_tensor_symmetric}),
    ("PerChannelMinMaxObserver", {**INT8, "qscheme": torch.per_channel_symmetric, "ch_axis": 1}),
    ("MovingAveragePerChannelMinMaxObserver", {"qscheme": torch.per_channel_affine, "ch_axis": 0}),
    ("MinMaxObserver", {"quant_min": 0, "quant_max": 15, "dtype": torch.uint8}),
]
ALL = {
    each.__name__: each
    for each in (
        MinMaxObserver, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver, PerChannelMinMaxObserver,
    )
}  # fmt: skip


def data(seed=3):
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed))


def learning(observer=MinMaxObserver, **arguments):
    """Returns one that has seen data and learns."""
    module = LearnableFakeQuantize(observer, **{**INT8, **arguments})
    module(data())
    module.enable_range_learning()
    return module


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("observer", "arguments"), CASES, ids=str)
def test_values_and_gradients_as_torchao(observer, arguments, scaled):
    ours = LearnableFakeQuantize(ALL[observer], use_grad_scaling=scaled, **arguments)
    theirs = Theirs(getattr(torchao_observers, observer), use_grad_scaling=scaled, **arguments)
    for learns in (False, True):
        leaves = [(data() * (1 + learns)).requires_grad_() for _ in range(2)]
        results = []
        for module, leaf in zip((ours, theirs), leaves, strict=True):
            results.append(module(leaf))
            results[-1].square().sum().backward()
            module.enable_range_learning()
        assert torch.equal(*results)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert torch.equal(ours.scale, theirs.scale)
    assert torch.allclose(ours.scale.grad, theirs.scale.grad, rtol=1e-4)
    if ours.zero_point.requires_grad:
        assert torch.allclose(ours.zero_point.grad, theirs.zero_point.grad, rtol=1e-4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in ("dtype", "qscheme", "ch_axis", "quant_min", "quant_max", "use_grad_scaling"):
        assert getattr(ours, name) == getattr(theirs, name)
    for one, other in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 0.0), (0.04, 17.0), (0.02, -30.0), (0.03, -128.0)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gradients_are_those_of_the_papers(scale, zero_point, scaled, per_channel):
    """torch's kernels take another zero point on the way back than on the way forth where it is negative."""
    settings = {"observer": PerChannelMinMaxObserver, "qscheme": torch.per_channel_affine} if per_channel else {}
    module = learning(use_grad_scaling=scaled, **settings)
    with torch.no_grad():
        module.scale.fill_(scale)
        module.zero_point.fill_(zero_point)
    x = (data() * 3).requires_grad_()
    weight = data(4)
    (module(x) * weight).sum().backward()
    value = x.detach() / module.scale.detach()[0] + zero_point
    low, high = value.round() < -128, value.round() > 127
    of_scale = torch.where(low, -128 - zero_point, torch.where(high, 127 - zero_point, value.round() - value)) * weight
    of_zero_point = torch.where(low | high, -scale, 0.0) * weight
    factor = (x.numel() * 127) ** -0.5 if scaled else 1.0
    for parameter, expected in ((module.scale, of_scale), (module.zero_point, of_zero_point)):
        total = expected.sum((1, 2)) if per_channel else expected.sum().reshape(1)
        assert torch.allclose(parameter.grad, total * factor, rtol=1e-3, atol=1e-3 * factor)
    assert torch.equal(x.grad, weight * ~(low | high))


def test_each_group_learns_its_own_scale():
    observer = PerGroupMinMaxObserver.with_args(group_size=5, qscheme=torch.per_channel_symmetric)
    module, x = learning(observer), data()
    module(x * 2).square().sum().backward()
    assert module.scale.grad.shape == module.scale.shape == (4, 6, 1)
    alone = learning()
    with torch.no_grad():
        alone.scale.copy_(module.scale[2, 3])
        alone.zero_point.zero_()
    alone(x[2, 3] * 2).square().sum().backward()
    assert torch.allclose(alone.scale.grad, module.scale.grad[2, 3])


def test_learning_reduces_the_error():
    module, x = learning(use_grad_scaling=True, quant_min=-8, quant_max=7), data()
    with torch.no_grad():
        module.scale.mul_(2)
    before = (module(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    assert (module(x) - x).square().mean().item() < 0.4 * before


def test_an_optimizer_made_before_the_first_tensor_has_the_parameters():
    module = LearnableFakeQuantize(PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, **INT8)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    module(data())
    module.enable_range_learning()
    before = module.scale.detach().clone()
    module(data() * 2).sum().backward()
    optimizer.step()
    assert not torch.equal(before, module.scale)


def test_switches():
    module = LearnableFakeQuantize(MinMaxObserver, **INT8)
    model = nn.Sequential(module, nn.ReLU())
    x = data()
    model(x)
    observed = module.scale.clone()
    model.apply(enable_range_learning)
    assert (module.observer_enabled.item(), module.learning_enabled.item()) == (0, 1)
    assert module.scale.requires_grad
    assert module.zero_point.requires_grad
    model(10 * x)
    assert torch.equal(module.scale, observed)
    model.apply(disable_range_learning)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    module.enable_range_learning()
    module.enable_observer()
    assert module.learning_enabled.item() == 0
    model(10 * x)
    assert module.scale.item() > observed.item() * 9
    module.disable_fake_quant()
    assert module(x) is x


def test_learning_that_is_enabled_first_starts_with_the_first_tensor():
    module = LearnableFakeQuantize(MinMaxObserver, **INT8)
    module.enable_range_learning()
    x = data()
    result = module(x)
    assert torch.equal(result, FakeQuantize(MinMaxObserver, **INT8)(x))
    assert result.requires_grad


def test_the_zero_point_of_a_symmetric_scheme_is_not_learned():
    module = LearnableFakeQuantize(MinMaxObserver, dtype=torch.uint8, qscheme=torch.per_tensor_symmetric)
    module(data())
    module.enable_range_learning()
    assert module.calculate_qparams()[1].item() == 127  # torchao's is 0, which clamps negative values
    assert not module.zero_point.requires_grad
    x = data()
    assert (module(x) - x).abs().max() < module.scale


def test_a_scale_stays_above_eps():
    module = learning(MinMaxObserver.with_args(eps=0.25))
    with torch.no_grad():
        module.scale.fill_(-1)
    assert module(data()).isfinite().all()
    assert module.calculate_qparams()[0].item() == 0.25


def test_nothing_seen():
    module = LearnableFakeQuantize(MinMaxObserver, **INT8)
    with pytest.raises(CalibrationError, match="no data"):
        module.calculate_qparams()
    assert module(torch.empty(0)).numel() == 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_loaded_state_needs_no_tensor(per_channel):
    observer = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    arguments = {**INT8, "qscheme": torch.per_channel_symmetric} if per_channel else INT8
    saved, loaded = (LearnableFakeQuantize(observer, **arguments) for _ in range(2))
    x = data()
    saved(x)
    saved.enable_range_learning()
    with torch.no_grad():
        saved.scale.mul_(1.5)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for module in (loaded, copy.deepcopy(saved)):
        assert torch.equal(module.calculate_qparams()[0], saved.calculate_qparams()[0])
        assert torch.equal(module(x), saved(x))
        assert module.scale.requires_grad


def test_a_state_of_torchao():
    theirs = Theirs(torchao_observers.MinMaxObserver, **INT8)
    ours = LearnableFakeQuantize(MinMaxObserver, **INT8)
    x = data()
    expected = theirs(x)
    theirs.disable_observer()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), expected)


def test_a_state_in_which_nothing_was_seen():
    fresh, used = LearnableFakeQuantize(MinMaxObserver, **INT8), learning()
    used.load_state_dict(fresh.state_dict())
    with pytest.raises(CalibrationError):
        used.calculate_qparams()
    used.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        used.load_state_dict({})


def test_reset():
    module = learning()
    module.reset()
    with pytest.raises(CalibrationError):
        module.calculate_qparams()
    module(data() * 2)
    assert torch.equal(module.scale, learning().scale * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observer": PerChannelMinMaxObserver, "qscheme": torch.per_channel_affine_float_qparams}, "float_qparams"),
        ({"observer": MovingAverageMinMaxObserver, "is_dynamic": True, "averaging_constant": 1}, "is_dynamic=True"),
        ({"observer": MinMaxObserver, "quant_min": -128, "quant_max": 0, "use_grad_scaling": True}, "quant_max=0"),
        ({"observer": MinMaxObserver, "quant_min": -200}, "-200"),
    ],
)
def test_what_cannot_be_learned(arguments, message):
    with pytest.raises(SpecError, match=message):
        LearnableFakeQuantize(**{**INT8, **arguments})


def test_a_network_is_trained_with_it_and_converted():
    def function(model):
        act = LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, use_grad_scaling=True)
        weight = LearnableFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, use_grad_scaling=True)
        qat.qat(model, act=qat.activation(observer_or_fake_quant_ctr=act))
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.conv2d.default:
                wanted = node.meta[qat.KEY].input_qspec_map
                wanted[node.args[1]] = qat.fake_weight(observer_or_fake_quant_ctr=weight)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    models.randomize_norms(module)
    x = torch.randn(4, 3, 6, 6)
    prepared = prepare_qat_pt2e(torch.export.export(module.train(), (x,)).module(), ByHand(function))
    optimizer = torch.optim.Adam(prepared.parameters(), 0.01)
    for step in range(4):
        if step == 1:
            prepared.apply(enable_range_learning)
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    fake = prepared.get_submodule(models.find(prepared, "conv2d").args[1].target)
    assert fake.scale.grad is not None
    scale = fake.scale.detach().clone()
    converted = convert_pt2e(prepared)
    weight = models.find(converted, "conv2d").args[1]
    assert torch.equal(converted.get_buffer(weight.args[1].target), scale)


@pytest.mark.parametrize("learns", [True, False])
def test_one_range_twice_in_a_step(learns):
    """As before and after max pooling: the second call may observe, and must not spoil the way back of the first."""
    module = LearnableFakeQuantize(MovingAverageMinMaxObserver, **INT8)
    module(data())
    if learns:
        module.enable_range_learning()
    x = data(4).requires_grad_()
    module(module(x).relu()).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (module.scale.grad is not None) == learns


@pytest.mark.parametrize("change", ["add_", "relu_"])
def test_what_comes_after_may_write_to_the_result(change):
    """``y += x`` stays ``add_`` in an exported graph, and the way back must not need what it overwrites."""
    module = LearnableFakeQuantize(MovingAverageMinMaxObserver, **INT8)
    module(data())
    module.enable_range_learning()
    found = []
    for name in (change, change.rstrip("_")):
        x = data(4).requires_grad_()
        getattr(module(x), name)(*[x.detach()] * (change == "add_")).square().sum().backward()
        found.append((x.grad, module.scale.grad, module.zero_point.grad))
        module.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][1].abs().sum() > 0


def test_until_it_learns_it_is_a_fake_quantizer():
    observer = MovingAveragePerChannelMinMaxObserver.with_args(ch_axis=1, qscheme=torch.per_channel_affine)
    found = []
    for kind in (FakeQuantize, LearnableFakeQuantize):
        fake, x = kind(observer=observer, quant_min=0, quant_max=255), data().requires_grad_()
        first = fake(x)
        first.sum().backward()
        found.append((first.detach(), x.grad, fake(x * 3).detach()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_of_gradients(axis):
    x = torch.tensor([[0.33, 5.0, -0.2], [0.1, -3.0, 0.7]], requires_grad=True)
    count = 1 if axis is None else 2
    scale, zero_point = torch.full((count,), 0.1, requires_grad=True), torch.full((count,), 2.0, requires_grad=True)
    y = learned_fake_quantize(x, scale, zero_point, -8, 7, axis)
    gradients = torch.autograd.grad(y.square().sum(), (x, scale, zero_point), create_graph=True)
    again = learned_fake_quantize(x, scale, zero_point, -8, 7, axis)
    plain = torch.autograd.grad(again.square().sum(), (x, scale, zero_point))
    for found, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(found, expected)
    (second,) = torch.autograd.grad(gradients[0].sum(), x)
    assert second.tolist() == [[2.0, 0.0, 2.0], [2.0, 0.0, 0.0]]
