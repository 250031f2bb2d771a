"""Multiply-accumulates node by node, against torch's counter on the eager model; and the borders between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zeropoint as zp
from tests.models import Applied, export
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.report.speed.borders import Borders, FloatGroup, borders_of
from zeropoint.report.speed.work import node_work

INT8 = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


@torch.no_grad()
def converted(module: nn.Module, *inputs: torch.Tensor, config=INT8, floats: tuple[str, ...] = ()):
    quantizer = XNNPACKQuantizer().set_global(config)
    for name in floats:
        quantizer.set_module_name(name, None)
    prepared = zp.prepare_pt2e(export(module.eval(), *inputs), quantizer)
    prepared(*inputs)
    return zp.convert_pt2e(prepared)


def torch_counts(module: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2


def attention(_, q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


Q = torch.randn(2, 3, 5, 8)
MODELS = {
    "grouped": (nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), (torch.randn(2, 8, 9, 9),)),
    "same padding": (nn.Conv2d(3, 4, 4, padding="same", dilation=2), (torch.randn(1, 3, 8, 8),)),
    "one dimension": (nn.Conv1d(3, 4, 5, padding=2), (torch.randn(2, 3, 11),)),
    "three dimensions": (nn.Conv3d(2, 3, 2), (torch.randn(1, 2, 4, 5, 6),)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (torch.randn(2, 6, 5, 5),)),
    "linear": (nn.Linear(7, 5), (torch.randn(2, 3, 7),)),
    "matmul": (Applied(lambda m, x, y: x @ y), (torch.randn(4, 1, 5, 3), torch.randn(2, 3, 6))),
    "bmm": (Applied(lambda m, x, y: torch.bmm(x, y)), (torch.randn(4, 5, 3), torch.randn(4, 3, 6))),
    "baddbmm": (Applied(lambda m, b, x, y: torch.baddbmm(b, x, y)), (
        torch.randn(5, 6), torch.randn(4, 5, 3), torch.randn(4, 3, 6))),
    "addmm": (Applied(lambda m, b, x, y: torch.addmm(b, x, y)), (
        torch.randn(6), torch.randn(5, 3), torch.randn(3, 6))),
    "einsum": (Applied(lambda m, x, y: torch.einsum("bij,bkj->bik", x, y)), (
        torch.randn(2, 3, 4), torch.randn(2, 5, 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_as_torch_counts(name: str):
    module, inputs = MODELS[name]
    work = node_work(export(module, *inputs))
    assert sum(node.multiply_accumulates for node in work) == torch_counts(module, *inputs) > 0


def test_attention_whole_and_taken_apart():
    """torch's counter leaves it out on the CPU."""
    inputs = (Q, Q + 1, Q + 2)
    products = 2 * (2 * 3 * 5 * 5 * 8)
    assert [node.multiply_accumulates for node in node_work(export(Applied(attention), *inputs))] == [products]
    work = node_work(converted(Applied(lambda m, q, k, v: m.end(attention(m, q, k, v)), end=nn.Linear(8, 2)), *inputs))
    assert [node.operator for node in work] == ["matmul", "matmul", "linear"]
    assert sum(node.multiply_accumulates for node in work[:2]) == products


def test_products_of_vectors():
    """torch's counter leaves them out."""
    both = Applied(lambda m, x, y: (x @ y, m.layer(y)), layer=nn.Linear(3, 4))
    work = node_work(converted(both, torch.randn(5, 3), torch.randn(3)))
    assert {node.operator: node.multiply_accumulates for node in work} == {"matmul": 15, "linear": 12}


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # Of torch.nn.LSTM, in export.
def test_recurrent_layers_step_by_step():
    steps, batch, size, hidden = 4, 2, 3, 5
    work = node_work(converted(nn.LSTM(size, hidden), torch.randn(steps, batch, size)))
    expected = 4 * hidden * batch * (steps * size + (steps - 1) * hidden)  # The first state is 0.
    assert sum(node.multiply_accumulates for node in work) == expected


def test_free_sizes_are_those_of_the_export():
    exported = torch.export.export(nn.Linear(3, 4), (torch.randn(6, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
    prepared = zp.prepare_pt2e(exported.module(), XNNPACKQuantizer().set_global(INT8))
    prepared(torch.randn(9, 3))
    assert [node.multiply_accumulates for node in node_work(zp.convert_pt2e(prepared))] == [72]


def test_what_is_integer_and_what_is_depthwise():
    module = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1, groups=2))
    work = node_work(converted(module, torch.randn(1, 4, 2, 2), floats=("1",)))
    assert [(node.module, node.is_integer, node.is_depthwise) for node in work] == [
        ("0", True, True), ("1", False, False), ("2", True, True),
    ]  # fmt: skip


# -- borders ---------------------------------------------------------------------------------------------------------


def test_an_integer_model_has_its_inputs_and_outputs_for_borders():
    found = borders_of(converted(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4)))
    assert found == Borders(3, 1, 0, 1, ())


def test_a_float_layer_between_integer_ones_is_an_island():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 2, 1))
    model = converted(module, torch.randn(1, 3, 4, 4), floats=("1", "2"))
    assert borders_of(model) == Borders(4, 2, 0, 2, (FloatGroup(("conv2d_1", "gelu"), ("conv2d", "gelu"), 1, 1),))


def test_float_ends_are_no_islands():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    assert borders_of(converted(module, torch.randn(1, 3, 4, 4), floats=("0", "2"))).islands == ()


def test_two_islands_and_a_split_between():
    def forward(m, x):
        first, second = m.conv(x).chunk(2, 1)
        return m.end(torch.cat([torch.erf(first), torch.erf(second)], 1))

    model = converted(Applied(forward, conv=nn.Conv2d(3, 4, 1), end=nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4))
    names = [island.operators for island in borders_of(model).islands]
    assert names == [("erf",), ("erf",)]


def test_weights_alone_make_no_border():
    weights = zp.QuantizationConfig(None, None, INT8.weight, None)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert borders_of(converted(module, torch.randn(2, 3), config=weights)) == Borders(0, 0, 0, 0, ())


def test_inputs_that_are_quantized_at_run_time():
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    found = borders_of(converted(module, torch.randn(2, 3), config=DYNAMIC))
    assert (found.entries, found.requantizations, found.islands) == (3, 0, (FloatGroup(("gelu",), ("gelu",), 1, 1),))


def test_a_tensor_that_two_scales_are_wanted_of_is_requantized():
    """The sum is read as it is, and by a concatenation whose parts share a scale."""

    def forward(m, x):
        y = m.conv(x)
        return torch.cat([y, m.wide(y) * 9.0], 1), m.end(y)

    module = Applied(forward, conv=nn.Conv2d(3, 4, 1), wide=nn.Conv2d(4, 4, 1), end=nn.Conv2d(4, 2, 1))
    model = converted(module, torch.randn(1, 3, 4, 4))
    by_hand = sum(
        "quantize_per_tensor" in str(node.target) and "dequantize" in str(node.all_input_nodes[0].target)
        for node in model.graph.nodes
        if node.op == "call_function" and not str(node.target).startswith("quantized_decomposed.dequantize")
    )
    assert borders_of(model).requantizations == by_hand
