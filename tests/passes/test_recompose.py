"""Programs after ``run_decompositions`` are spelled as export writes them, and quantize as those do."""

import models
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.report.record import record_of
from zeropoint.workflow import prepare_pt2e

aten = torch.ops.aten
INT8 = get_symmetric_quantization_config(is_per_channel=True)


def decomposed(module, *inputs, **settings):
    """Returns the decomposed export of a module, and what the module gives."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, **settings)
        return program.run_decompositions().module(), module(*inputs)


def recomposed(module, *inputs):
    """Returns the names of the operators of a decomposed export in canonical form, which computes what it did."""
    model, expected = decomposed(module, *inputs)
    canonicalize(model)
    model.recompile()
    assert torch.equal(model(*inputs), expected)
    return [models.name_of(node) for node in model.graph.nodes if node.op == "call_function"]


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims, bias):
    layer = CONV[dims](4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=bias)
    assert recomposed(layer, torch.randn(2, 4, *[7] * dims)) == [f"conv{dims}d"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims, bias):
    layer = TRANSPOSED[dims](4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2, bias=bias)
    assert recomposed(layer, torch.randn(2, 4, *[5] * dims)) == [f"conv_transpose{dims}d"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4)])
def test_linear_layers(shape, bias):
    assert recomposed(nn.Linear(4, 5, bias=bias), torch.randn(shape)) == ["linear"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_layer_of_an_input_whose_memory_is_not_in_order(bias):
    module = models.Applied(lambda m, x: m.layer(x.transpose(0, 1)), layer=nn.Linear(4, 5, bias=bias))
    model, _ = decomposed(module, torch.randn(2, 3, 4))
    assert models.count(model, "bmm") == 1
    names = recomposed(module, torch.randn(2, 3, 4))
    assert [name for name in names if name not in ("permute", "expand", "view")] == ["linear"]


def test_weights_that_are_parts_of_a_parameter():
    module = models.Applied(lambda m, x: m.layer(x, x + 1, x)[0], layer=nn.MultiheadAttention(4, 2))
    assert recomposed(module, torch.randn(3, 4)).count("linear") == 4


def test_a_product_with_an_input_stays():
    module = models.Applied(lambda m, x, y, z: (x @ y.permute(1, 0)).sum() + torch.bmm(z, z))
    inputs = (torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 3, 3))
    names = recomposed(module, *inputs)
    assert [name for name in names if name in ("mm", "bmm", "linear")] == ["mm", "bmm"]


def test_a_linear_layer_of_a_free_batch():
    model, _ = decomposed(nn.Linear(4, 5), torch.randn(2, 3, 4), dynamic_shapes=({0: Dim.DYNAMIC},))
    canonicalize(model)
    model.recompile()
    x = torch.randn(7, 3, 4)
    assert model(x).shape == (7, 3, 5)
    assert models.count(model, "linear") == 1
    assert models.count(model, "view") == 0


def test_views_to_other_axes_stay():
    names = recomposed(models.Applied(lambda m, x: m.layer(x).view(3, 2, 5), layer=nn.Linear(4, 5)), torch.randn(6, 4))
    assert names == ["linear", "view"]
    names = recomposed(models.Applied(lambda m, x: m.layer(x.view(6, 4)), layer=nn.Linear(4, 5)), torch.randn(2, 12))
    assert names == ["view", "linear"]


def product(function, **tensors):
    module = models.Applied(function)
    for name, value in tensors.items():
        module.register_buffer(name, value)
    return module


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.addmm(m.bias, x, m.weight.permute(1, 0), alpha=2),
        lambda m, x: torch.addmm(m.bias, x, m.weight.permute(1, 0), beta=2),
        lambda m, x: torch.addmm(m.rows, x, m.weight.permute(1, 0)),
        lambda m, x: torch.addmm(m.bias[:1], x, m.weight.permute(1, 0)),
        lambda m, x: torch.addmm(m.bias, x, m.weight.permute(0, 1)),
        lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
    ],
    ids=["alpha", "beta", "bias of each row", "bias of all", "not transposed", "as the user wrote it"],
)
def test_products_that_are_no_linear_layer(function):
    module = product(function, weight=torch.randn(4, 4), bias=torch.randn(4), rows=torch.randn(3, 4))
    model = models.export(module, torch.randn(3, 4))
    canonicalize(model)
    assert models.count(model, "linear") == 0
    assert models.count(model, "addmm") == 1


@pytest.mark.parametrize(
    ("module", "shape", "name"),
    [
        (nn.MaxPool2d(3, stride=2, padding=1, dilation=1, ceil_mode=True), (1, 3, 8, 8), "max_pool2d"),
        (nn.BatchNorm2d(3, eps=0.1, momentum=0.3), (1, 3, 8, 8), "batch_norm"),
        (nn.BatchNorm1d(3, affine=False), (2, 3), "batch_norm"),
        (nn.LayerNorm(8), (2, 3, 8), "layer_norm"),
        (nn.LayerNorm((3, 8), elementwise_affine=False, eps=0.1), (2, 3, 8), "layer_norm"),
        (nn.Softmax(dim=1), (2, 3, 8), "softmax"),
        (nn.LogSoftmax(dim=1), (2, 3, 8), "log_softmax"),
        (nn.AdaptiveAvgPool2d(2), (1, 3, 8, 8), "adaptive_avg_pool2d"),
    ],
)
def test_other_operators(module, shape, name):
    models.randomize_norms(module)
    assert recomposed(module, torch.randn(shape)) == [name]


def test_a_pool_whose_indices_are_read_stays():
    model = models.export(nn.MaxPool2d(2, return_indices=True), torch.randn(1, 3, 8, 8))
    canonicalize(model)
    assert models.count(model, "max_pool2d_with_indices") == 1


class Residual(nn.Module):
    """Batch norms, pools and a skip connection; depthwise and transposed convolutions; dropout and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = F.relu(self.up(x + self.depthwise(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1))


@models.seeded
def residual():
    return Residual(), (torch.randn(1, 3, 8, 8),)


@models.seeded
def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=F.gelu)
    return models.Applied(lambda m, x: m.layer(x * 2), layer=layer), (torch.randn(2, 5, 16),)


def patterns(model, quantizer=None):
    """Returns the rows of the table by which operators are quantized, views aside."""
    prepared = prepare_pt2e(model, quantizer or XNNPACKQuantizer().set_global(INT8))
    rows = record_of(prepared).coverage
    found = [row.pattern for row in rows if row.is_quantized and row.pattern not in ("view", "permute", "slice")]
    return ["mean" if pattern == "adaptive_avg_pool2d" else pattern for pattern in found]


@pytest.mark.parametrize("build", [residual, transformer])
def test_decomposed_programs_quantize_as_exported_ones(build):
    module, inputs = build()
    plain = patterns(models.export(module, *inputs))
    model, _ = decomposed(module, *inputs)
    assert patterns(model) == plain
    assert len(plain) >= 6


def test_rules_know_the_operator_that_was_written():
    module, inputs = residual()
    model, _ = decomposed(module, *inputs)
    quantizer = XNNPACKQuantizer().set_global(INT8).set_operator_type(aten.convolution.default, None)
    assert "conv" not in patterns(model, quantizer)
