"""Weight scales for which rounding in the graph and on the runtime cannot differ."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from tests.models import export, find
from zeropoint import convert_pt2e, prepare_pt2e, workflow
from zeropoint.backends.xnnpack import (
    XNNPACKQuantizer,
    get_default_quantization_config,
    get_symmetric_quantization_config,
    lower,
)
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import LAYERS
from zeropoint.graph.observers import observer_of
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.qparams_of import QParams
from zeropoint.passes.weight_scales import holding_bias, steady_scale, steady_weight_scales
from zeropoint.report.record import record_of
from zeropoint.runtime.child import run_in_child

scales = st.floats(2.0**-12, 100.0, width=32)
ULP = 2.0**-23
LARGEST_RAISE = 2 / 255
"""``q`` is odd and 255 at least, and the next odd number above it is too large."""


def steady(x: float, w: float, y: float) -> float:
    return float(steady_scale(torch.tensor([x]), torch.tensor([w]), torch.tensor([y])))


def rescaling(x: float, w: float, y: float) -> Fraction:
    return Fraction(x) * Fraction(w) / Fraction(y)


def steady_fraction(x: float, w: float, y: float) -> tuple[Fraction, int, int]:
    """Returns ``x w / y`` of the steady scale, and ``p`` and ``q`` of the fraction that it is to be."""
    numerator = math.ceil(256 * rescaling(x, w, y))
    found = rescaling(x, steady(x, w, y), y)
    return found, numerator, round(numerator / found)


@given(scales, scales, scales)
def test_scale_is_raised_by_two_255ths_at_most(x: float, w: float, y: float):
    raised = steady(x, w, y)
    assert w * (1 - ULP) <= raised <= w * (1 + LARGEST_RAISE) * (1 + ULP)


@given(scales, scales, scales)
def test_rescaling_is_a_fraction_with_odd_denominator(x: float, w: float, y: float):
    found, p, q = steady_fraction(x, w, y)
    assume(found > 1e-5)  # Beyond, float32 does not tell odd denominators from even ones.
    assert q % 2 == 1
    assert abs(found * q / p - 1) <= ULP
    assert q >= 255
    assert q <= 513 or p == 1


@given(scales, scales, scales, st.integers(-(2**24), 2**24))
def test_no_accumulator_is_rescaled_to_near_a_half(x: float, w: float, y: float, accumulator: int):
    found, p, q = steady_fraction(x, w, y)
    assume(found > 1e-5)
    result = Fraction(p, q) * accumulator
    assert abs(result - math.floor(result) - Fraction(1, 2)) >= Fraction(1, 2 * q)


@given(scales, st.lists(scales, min_size=1, max_size=5), scales)
def test_each_channel_for_itself(x: float, channels: list[float], y: float):
    together = steady_scale(torch.tensor([x]), torch.tensor(channels), torch.tensor([y]))
    assert together.dtype == torch.float32
    assert together.tolist() == [steady(x, w, y) for w in channels]


@pytest.mark.parametrize(
    ("w", "expected"), [(1.0, Fraction(256, 255)), (1 / 256, Fraction(1, 255)), (0.5, Fraction(128, 255))]
)
def test_half_is_avoided(w: float, expected: Fraction):
    assert steady(1.0, w, 1.0) == pytest.approx(float(expected), rel=ULP)


def test_smallest_ratio():
    assert 0 < steady(2.0**-12, 2.0**-40, 1.0) < 2.0**-19


class Blocks(nn.Module):
    """A first layer, then depthwise and pointwise convolutions with relu6, as in mobile networks.

    The weights of the first layer are multiples of 1/64 up to 127/64, and it reads and returns 0 to 6: its
    ``s_x s_w / s_y`` would be 1/64, and one accumulator in 64 be rescaled to a half.
    """

    def __init__(self, count: int, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU6())
        integers = torch.randint(-60, 61, self.first[0].weight.shape)
        integers[:, 0] = 127
        self.first[0].weight.data = integers / 64
        blocks: list[nn.Module] = []
        for _ in range(count):
            blocks += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU6()]
            blocks += [nn.Conv2d(channels, channels, 1), nn.ReLU6()]
        self.blocks = nn.Sequential(*blocks)
        for layer in self.blocks[::2]:
            nn.init.normal_(layer.weight, std=1.2 / math.sqrt(layer.weight[0].numel()))
            nn.init.uniform_(layer.bias, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.first(x))


def deep() -> tuple[GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Blocks(4).eval(), torch.rand(1, 8, 64, 64) * 6
    x[..., 0] = 6.0
    prepared = prepare_pt2e(export(model, x), XNNPACKQuantizer().set_global(get_default_quantization_config()))
    prepared(x)
    return convert_pt2e(prepared), x


def off(model: GraphModule, x: torch.Tensor) -> int:
    """Returns how many outputs of the file differ from those of the converted model."""
    ((actual,),) = run_in_child(lower(model, (x,)), [(x,)])
    expected = model(x)
    assert len(expected.unique()) > 50
    return int((actual != expected).sum())


@torch.no_grad()
def test_deep_network_is_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    assert off(*deep()) == 0
    monkeypatch.setattr(workflow, "steady_weight_scales", lambda model: {})
    assert off(*deep()) > 0


def prepared(module: nn.Module, *inputs: torch.Tensor, **settings: bool) -> GraphModule:
    config = get_symmetric_quantization_config(**settings)
    model = prepare_pt2e(export(module.eval(), *inputs), XNNPACKQuantizer().set_global(config))
    model(*inputs)
    return model


def of_weights(model: GraphModule) -> list[QParams]:
    """Returns what is chosen for the weights of layers."""
    found = steady_weight_scales(model)
    layers = (node for node in model.graph.nodes if node.target in LAYERS)
    observers = {id(observer_of(model, argument(layer, "weight"))) for layer in layers}
    return [found[key] for key in observers & found.keys()]


def test_layers_that_get_steady_scales():
    x = torch.rand(1, 4, 6, 6)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    for per_channel in (True, False):
        assert len(of_weights(prepared(net, x, is_per_channel=per_channel))) == 3


def test_layers_that_do_not():
    x = torch.rand(2, 4)
    assert steady_weight_scales(prepared(nn.Linear(4, 3), x, is_per_channel=True, is_dynamic=True)) == {}
    tied = nn.Linear(4, 4)
    assert steady_weight_scales(prepared(nn.Sequential(tied, nn.ReLU(), tied), x)) == {}


def test_observers_keep_their_range():
    """The scale is chosen beside the observer, which still says what it saw."""
    x = torch.rand(2, 4)
    model = prepared(nn.Linear(4, 3), x)
    weight = argument(find(model, "linear"), "weight")
    observer = model.get_submodule(str(weight.target))
    assert isinstance(observer, MinMaxObserver)
    before = observer.calculate_qparams()[0].clone()
    (chosen,) = of_weights(model)
    assert torch.equal(observer.calculate_qparams()[0], before)
    assert before <= chosen.scale <= before * (1 + LARGEST_RAISE)


def test_small_scales_hold_the_bias():
    w, x = torch.tensor([2.0**-20, 2.0**-20, 0.5]), torch.tensor([0.01])
    raised = holding_bias(w, x, torch.tensor([0.1, -1000.0, 1e20]), groups=1)
    assert raised.tolist() == [2.0**-20, pytest.approx(1000 / 0.01 / 2**30), 0.5]
    assert holding_bias(w[:1], x, torch.tensor([0.0, 1e20]), groups=1).item() == 2.0**-12
    shared = holding_bias(w[:2], x, torch.tensor([0.1, 0.1, 0.1, 1000.0]), groups=2)
    assert shared.tolist() == [2.0**-20, pytest.approx(1000 / 0.01 / 2**30)]


def quantized(module: nn.Module, *batches: torch.Tensor) -> GraphModule:
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config())
    model = prepare_pt2e(export(module.eval(), batches[0]), quantizer)
    for x in batches:
        model(x)
    return convert_pt2e(model)


@torch.no_grad()
def test_channel_of_no_weights_and_a_large_bias():
    """Its scale would be 2^-20, and its bias overflow."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    module.weight[0], module.bias[0] = 0.0, 1000.0
    model = quantized(module, x)
    assert record_of(model).biases[0].overflowed == ()
    assert torch.equal(model(x), run_in_child(lower(model, (x,)), [(x,)])[0][0])


@torch.no_grad()
def test_small_outputs_are_not_zero():
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 8, 8)
    module.weight.mul_(1e-3)
    model = quantized(module, x)
    assert sqnr_db(module(x), model(x)) > 35
    assert torch.equal(model(x), run_in_child(lower(model, (x,)), [(x,)])[0][0])
