"""Layers inside of control flow are quantized as those outside, weights included."""

import copy

import pytest
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.graph.attributes import tensors_of
from zeropoint.graph.graph_pass import bodies
from zeropoint.numerics import ops
from zeropoint.passes.body_parameters import bring_in_parameters, lift_parameters
from zeropoint.workflow import convert_pt2e, prepare_pt2e


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Cond(Base):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.a(y).relu() + self.b(y), lambda y: self.b(y), (x,))


class Nested(Base):
    def forward(self, x):
        def inner(y):
            return torch.cond(y[0, 0] > 0, lambda z: self.a(z), lambda z: self.b(z).relu(), (y,))

        return torch.cond(x.sum() > 0, inner, lambda y: self.a(y), (x,))


class Scan(Base):
    def forward(self, x):
        def step(carried, each):
            following = self.a(each).relu() + carried
            return following, following * 0.5

        return scan(step, torch.zeros(2, 8), x)[1]


class Map(Base):
    def forward(self, x):
        return map_over(lambda each: self.a(each).relu(), x)


class While(Base):
    def forward(self, x):
        def body(count, each):
            return count + 1, self.b(self.a(each).relu())

        return while_loop(lambda count, each: count < 3, body, (torch.tensor(0), x))[1]


class Convolution(nn.Module):
    """Batch norm in a branch; the other branch has none."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.norm(self.conv(y)).relu(), lambda y: self.conv(y), (x,))


MODELS = {
    Cond: (4, 8), Nested: (4, 8), Scan: (5, 2, 8), Map: (5, 2, 8), While: (4, 8), Convolution: (1, 3, 6, 6),
}  # fmt: skip


def exported(kind):
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(MODELS[kind])
    with torch.no_grad():
        return module, torch.export.export(module, (x,)).module(), x


def every_body(model):
    for _, body in bodies(model):
        yield body
        yield from every_body(body)


def quantizer(**settings):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **settings))


@pytest.mark.parametrize("kind", MODELS)
def test_moving_parameters_in_and_out_changes_nothing(kind):
    module, model, x = exported(kind)
    bring_in_parameters(model)
    model.recompile()
    for body in every_body(model):
        body.recompile()
    layers = [n for body in every_body(model) for n in body.graph.nodes if "linear" in n.name or "conv2d" in n.name]
    assert layers
    assert all(n.args[1].op == "get_attr" for n in layers)
    with torch.no_grad():
        assert torch.equal(model(x), module(x))
        assert torch.equal(model(-x), module(-x))
    lift_parameters(model)
    for body in [model, *every_body(model)]:
        body.graph.lint()
        body.recompile()
    assert not any(
        n.op == "get_attr" and "graph" not in str(n.target) for b in every_body(model) for n in b.graph.nodes
    )
    with torch.no_grad():
        assert torch.equal(model(x), module(x))
        again = torch.export.export(model, (x,)).module()
        assert torch.equal(again(-x), module(-x))


@pytest.mark.parametrize("settings", [{}, {"is_dynamic": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_in_bodies_become_integers(kind, settings):
    module, model, x = exported(kind)
    prepared = prepare_pt2e(model, quantizer(**settings))
    for _ in range(12):
        prepared(torch.randn_like(x))
    prepared(x)
    prepared(-x)
    converted = convert_pt2e(prepared)
    tensors = tensors_of(converted)
    assert {t.dtype for t in tensors.values() if t.dim() > 1} == {torch.int8}
    weights = [n for b in every_body(converted) for n in b.graph.nodes if n.target is ops.DEQUANTIZE_PER_CHANNEL]
    assert weights
    assert all(n.args[0].op == "placeholder" for n in weights)
    with torch.no_grad():
        again = torch.export.export(converted, (x,)).module()
        for each in (x, -x):
            wanted = module(each)
            assert (converted(each) - wanted).abs().max() < 0.04 * wanted.abs().max()
            assert torch.equal(again(each), converted(each))


def test_a_copy_of_a_prepared_model_converts_on_its_own():
    _, model, x = exported(Cond)
    prepared = prepare_pt2e(model, quantizer())
    prepared(x)
    prepared(-x)
    other = copy.deepcopy(prepared)
    first, second = convert_pt2e(prepared), convert_pt2e(other)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
