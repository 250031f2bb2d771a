"""The reference representation: the form of its graphs, what has none, and what stays as it was."""

from __future__ import annotations

import copy

import models
import pytest
import quantizers
import torch
import torch.nn.functional as F
from quantizers import annotate
from torch import nn

from tests.backends.q_dq import Graph, Layer, dequantize, exported, fake, qd, quantize
from zeropoint.algorithms.watch import watch
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import GraphError
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.invariants import check_invariants
from zeropoint.graph.show import show
from zeropoint.passes.reference.rewrite import REFERENCE, in_integers
from zeropoint.report.record import record_of
from zeropoint.workflow import convert_pt2e, prepare_pt2e

aten = torch.ops.aten
OUT_DTYPE = torch.ops.higher_order.out_dtype
PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


@torch.no_grad()
def both(module, inputs, config=PER_CHANNEL, quantizer=None, **named):
    """Returns the q/dq form and the reference representation of a model that is calibrated on its inputs."""
    quantizer = XNNPACKQuantizer().set_global(config) if quantizer is None else quantizer
    prepared = prepare_pt2e(models.export(module.eval(), *inputs), quantizer)
    prepared(*inputs)
    return convert_pt2e(copy.deepcopy(prepared), **named), convert_pt2e(prepared, True, **named)


def rewritten(module, *inputs):
    """Returns a graph written by hand, and its reference representation."""
    model = exported(module, *inputs)
    reference = in_integers(copy.deepcopy(model))
    check_invariants(reference, REFERENCE, "the test")
    return model, reference


def steps(first, second, inputs, scale):
    """Returns by how many steps of a scale two models' results differ at most."""
    with torch.no_grad():
        return float((first(*inputs) - second(*inputs)).abs().max() / scale)


def targets(model):
    return [node.target for node in model.graph.nodes if node.op == "call_function"]


def computed_by(model, operator, dtype=torch.int32):
    """Returns how many times an operator is computed with a result of an integer type."""
    return sum(n.target is OUT_DTYPE and tuple(n.args[:2]) == (operator, dtype) for n in model.graph.nodes)


# The form.


LINEAR = """\
mul_tensor_3 = mul(input_1, 71.05)
round_default_2 = round(mul_tensor_3)
add_tensor_2 = add(round_default_2, -77)
clamp_default_1 = clamp(add_tensor_2, -128, 127)
to_dtype_6 = to(clamp_default_1, int8)
to_dtype = to(to_dtype_6, int16)
sub_tensor = sub(to_dtype, -77)
view_default = view(_zero_point_0, [-1, 1])
to_dtype_1 = to(view_default, int16)
to_dtype_2 = to(_frozen_param0, int16)
sub_tensor_1 = sub(to_dtype_2, to_dtype_1)
out_dtype = out_dtype(aten.linear.default, int32, sub_tensor, sub_tensor_1, None)
mul_tensor = mul(_scale_0, 0.01408)
out_dtype_1 = out_dtype(aten.div.Tensor, float32, bias, mul_tensor)
round_default = round(out_dtype_1)
to_dtype_3 = to(round_default, int32)
add_tensor = add(out_dtype, to_dtype_3)
div_tensor = div(mul_tensor, 0.007276)
out_dtype_2 = out_dtype(aten.mul.Tensor, float32, add_tensor, div_tensor)
round_default_1 = round(out_dtype_2)
add_tensor_1 = add(round_default_1, 44)
clamp_default = clamp(add_tensor_1, -128, 127)
to_dtype_4 = to(clamp_default, int8)
to_dtype_9 = to(to_dtype_4, float32)
sub_tensor_4 = sub(to_dtype_9, 44)
mul_tensor_6 = mul(sub_tensor_4, 0.007276)
return [mul_tensor_6]"""


def test_linear():
    module, inputs = models.linear()
    quantized, reference = both(module, inputs, quantizer=quantizers.STATIC)
    assert show(reference) == LINEAR
    assert torch.equal(reference(*inputs), quantized(*inputs))
    assert reference.state_dict().keys() == quantized.state_dict().keys()
    assert reference._frozen_param0.dtype == torch.int8


def test_sum_and_relu_are_two_products_and_one_rounding():
    module, inputs = models.Applied(lambda m, x, y: F.relu(x + y)), (torch.randn(3, 4), torch.randn(4))
    quantized, reference = both(module, inputs)
    assert computed_by(reference, aten.mul.Tensor, torch.float32) == models.count(reference, "out_dtype") + 2 == 2
    assert steps(quantized, reference, inputs, 1.0) < 1e-6
    clamp = models.find(reference, "clamp", 2)
    assert clamp.args[1:] == (-128, 127)


def test_relu_clamps_at_the_zero_point():
    x = torch.randint(-128, 128, (4, 5), dtype=torch.int8)
    model, reference = rewritten(Graph(lambda x: quantize(F.relu(dequantize(x)))), x)
    (clamp,) = [node for node in reference.graph.nodes if node.op == "call_function"]
    assert (clamp.target, clamp.args[1:], clamp.meta["val"].dtype) == (aten.clamp.default, (3, 127), torch.int8)
    assert torch.equal(reference(x), model(x))


def test_moves_and_pools_take_integers_as_they_are():
    def function(x):
        pooled = F.max_pool2d(dequantize(x), 2, 2, 1)
        return quantize(pooled.permute(0, 2, 3, 1).reshape(1, -1)[:, 3:].unsqueeze(2))

    x = torch.randint(-128, 128, (1, 3, 6, 6), dtype=torch.int8)
    model, reference = rewritten(Graph(function), x)
    assert {node.meta["val"].dtype for node in reference.graph.nodes if node.op == "call_function"} == {torch.int8}
    assert torch.equal(reference(x), model(x))


def test_quantize_and_dequantize_alone():
    def function(x):
        scales, zero_points = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([3, -128, 127])
        q = qd.quantize_per_channel(x, scales, zero_points, 1, -128, 127, torch.int8)
        return qd.dequantize_per_channel(q, scales, zero_points, 1, -128, 127, torch.int8), fake(x)

    x = torch.randn(2, 3, 4) * 5
    model, reference = rewritten(Graph(function), x)
    assert all(torch.equal(a, b) for a, b in zip(model(x), reference(x), strict=True))


def test_other_spellings_of_quantize_and_dequantize():
    """Per token and per group, of 4, 16 and 32 bits, with float zero points, from bfloat16 and to it."""

    def function(x):
        scale, zero_point = qd.choose_qparams_per_token_asymmetric(x, torch.int8)
        limits = (-128, 127, torch.int8)
        tokens = qd.quantize_per_token(x, scale, zero_point, *limits)
        scales, zero_points = torch.rand(4, 2) + 0.1, torch.zeros(4, 2, dtype=torch.int64) + 3
        groups = qd.quantize_per_channel_group(x, scales, zero_points, -8, 7, torch.int8, 3)
        wide = quantize(x, 1e-7, 5, -(2**31), 2**31 - 1, torch.int32)
        channels = qd.dequantize_per_channel(tokens, torch.rand(4), torch.rand(4), 0, *limits)
        return (
            qd.dequantize_per_token(tokens, scale, zero_point, *limits, torch.float32),
            qd.dequantize_per_channel_group(groups, scales, zero_points, -8, 7, torch.int8, 3, torch.float32),
            dequantize(wide, 1e-7, 5, -(2**31), 2**31 - 1, torch.int32),
            fake(x, 1e-4, 30000, 0, 65535, torch.uint16),
            qd.dequantize_per_tensor(quantize(x.bfloat16()), 0.03, 3, *limits, out_dtype=torch.bfloat16),
            channels,
        )

    x = torch.randn(4, 6)
    torch.manual_seed(0)
    model, reference = rewritten(Graph(function), x)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        actual = reference(x)
    for a, b in zip(expected, actual, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# Layers.

CHOOSE = "choose_qparams_per_token_asymmetric"


def test_dynamic_linear_layers_one_after_the_other():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Linear(4, 3))
    inputs = (torch.randn(5, 4),)
    quantized, reference = both(module, inputs, DYNAMIC)
    assert computed_by(reference, aten.linear.default) == models.count(reference, CHOOSE) == 3
    again = torch.export.export(reference, inputs).module()
    for x in (*inputs, torch.zeros(5, 4), inputs[0] * 100):
        expected = quantized(x)
        assert reference(x).dtype == torch.float32
        torch.testing.assert_close(reference(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(again(x), reference(x))


def test_dynamic_linear_layer_with_one_scale_for_its_weight():
    spec = quantizers.activation(qscheme=torch.per_tensor_symmetric, quant_min=-127)
    dynamic = get_symmetric_quantization_config(is_dynamic=True).input_activation

    def function(model):
        for node in model.graph.nodes:
            if node.target is aten.linear.default:
                annotate(node, {"input": dynamic, "weight": spec})

    module, inputs = models.mlp()
    quantized, reference = both(module, inputs, quantizer=quantizers.ByHand(function))
    assert computed_by(reference, aten.linear.default) == 2
    torch.testing.assert_close(reference(*inputs), quantized(*inputs), rtol=1e-5, atol=1e-6)


def test_dynamic_convolution():
    inputs = (torch.randn(2, 4, 7, 7),)
    quantized, reference = both(nn.Conv2d(4, 6, 3, padding=1, dilation=2), inputs, DYNAMIC)
    assert computed_by(reference, aten.convolution.default, torch.int64) == 1
    torch.testing.assert_close(reference(*inputs), quantized(*inputs), rtol=1e-5, atol=1e-6)


def test_layer_whose_output_stays_float():
    def function(model):
        linear = models.find(model, "linear")
        annotate(linear, {"input": quantizers.activation(), "weight": quantizers.weight()})

    module, inputs = models.linear()
    quantized, reference = both(module, inputs, quantizer=quantizers.ByHand(function))
    assert computed_by(reference, aten.linear.default) == 1
    scale = models.find(quantized, "dequantize_per_tensor").args[1] * quantized._scale_0.max()
    assert steps(quantized, reference, inputs, scale) <= 0.51


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, 4, padding="same", bias=False),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 8, 3, 2, 1, groups=4),
    nn.Conv3d(4, 6, 3, padding=1),
    nn.ConvTranspose1d(4, 6, 3, 2, 1, 1),
    nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
    nn.ConvTranspose3d(4, 6, 2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "no batch"])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolution(layer, batch):
    def function(model):
        node = next(n for n in model.graph.nodes if n.target in (*CONVOLVING,))
        axis = int("transpose" in str(node.target))
        inputs = {"input": quantizers.activation(), "weight": quantizers.weight(ch_axis=axis)}
        annotate(node, inputs, quantizers.activation())

    space = int(type(layer).__name__[-2])
    inputs = (torch.randn(*batch, 4, *[6] * space),)
    quantized, reference = both(layer, inputs, quantizer=quantizers.ByHand(function))
    assert models.count(reference, "round") == 2 + (layer.bias is not None)
    scale = models.find(quantized, "quantize_per_tensor", 1).args[1]
    assert steps(quantized, reference, inputs, scale) < 1.01


CONVOLVING = (
    aten.conv1d.padding, aten.conv2d.padding, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip


@pytest.mark.parametrize("axis", [None, 0])
def test_zero_points_of_weights(axis):
    layer = Layer((6, 4), axis=axis, zero_point=-7)
    layer.integers[0, 0], layer.integers[1, 1] = 127, -127
    x = torch.randn(5, 4)
    model, reference = rewritten(Graph(lambda layer, x: fake(layer(fake(x)), 0.3), layer), x)
    assert computed_by(reference, aten.linear.default) == 1
    assert steps(model, reference, (x,), 0.3) < 1.01


def test_scales_along_the_inputs_of_a_layer_stay_float():
    layer, x = Layer((4, 4), axis=1), torch.randn(5, 4)
    model, reference = rewritten(Graph(lambda layer, x: fake(layer(fake(x)), 0.3), layer), x)
    assert computed_by(reference, aten.linear.default) == 0
    assert aten.linear.default in targets(reference)
    assert torch.equal(reference(x), model(x))


def test_stored_integers_of_a_bias():
    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer((3, 4), bias=torch.zeros(3))
            self.register_buffer("steps", torch.tensor([5, -100, 2**20], dtype=torch.int32))
            self.register_buffer("scales", self.layer.scales * 0.03)
            self.register_buffer("zeros", torch.zeros(3, dtype=torch.int64))

        def forward(self, x):
            limits = (0, -(2**31), 2**31 - 1, torch.int32)
            bias = qd.dequantize_per_channel(self.steps, self.scales, self.zeros, *limits)
            return fake(F.linear(fake(x), self.layer.weight(), bias), 0.3)

    module, x = Stored(), torch.randn(5, 4)
    model, reference = rewritten(module, x)
    added = [n for n in reference.graph.nodes if n.target is aten.add.Tensor and n.args[1].__class__ is torch.fx.Node]
    assert any(getattr(n.args[1], "target", None) == "steps" for n in added)
    assert computed_by(reference, aten.div.Tensor, torch.float32) == 0
    assert steps(model, reference, (x,), 0.3) < 1.01


@pytest.mark.parametrize("bias", [torch.tensor([3e9, 0.0, -3e9]), torch.tensor([1.0, 2.0, 3.0])])
def test_bias_that_is_no_int32_is_added_in_float(bias):
    layer, x = Layer((3, 4), bias=bias), torch.randn(5, 4)
    whole = bool(bias.abs().max() < 100)
    model, reference = rewritten(Graph(lambda layer, x: fake(layer(fake(x)), 0.1), layer), x)
    assert computed_by(reference, aten.linear.default) == 1
    assert computed_by(reference, aten.div.Tensor, torch.float32) == whole
    assert steps(model, reference, (x,), 0.1) < 1.01


def test_bias_that_is_computed():
    layer, inputs = Layer((3, 4)), (torch.randn(5, 4), torch.randn(3))
    model, reference = rewritten(Graph(lambda m, x, b: fake(F.linear(fake(x), m.weight(), b * 2), 0.1), layer), *inputs)
    assert computed_by(reference, aten.linear.default) == 1
    assert steps(model, reference, inputs, 0.1) < 1.01


def test_products_of_matrices():
    def function(layer, x, y):
        weight = layer.weight().t()
        sums = torch.addmm(layer.bias, fake(x[0]), weight), torch.mm(fake(x[0]), weight)
        return (
            fake(sums[0], 0.1),
            fake(sums[1], 0.1),
            fake(fake(x) @ fake(y).transpose(1, 2), 0.1),
            fake(torch.bmm(fake(y), weight.expand(2, 4, 6)), 0.1),
        )

    layer, inputs = Layer((6, 4), axis=None), (torch.randn(2, 5, 4), torch.randn(2, 3, 4))
    model, reference = rewritten(Graph(function, layer), *inputs)
    assert computed_by(reference, aten.mm.default) == 2
    assert models.count(reference, "matmul") == 2
    with torch.no_grad():
        for expected, actual in zip(model(*inputs), reference(*inputs), strict=True):
            assert float((expected - actual).abs().max()) < 0.101


def test_transposed_weight_with_a_scale_for_each_channel():
    layer, x = Layer((6, 4)), torch.randn(5, 4)
    model, reference = rewritten(
        Graph(lambda layer, x: fake(torch.addmm(layer.bias, fake(x), layer.weight().t()), 0.1), layer), x
    )
    assert computed_by(reference, aten.mm.default) == 1
    assert steps(model, reference, (x,), 0.1) < 1.01


def test_padding_before_a_dynamic_convolution():
    def function(layer, x):
        scale, zero_point = qd.choose_qparams(x, -128, 127, 1e-6, torch.int8)
        q = qd.quantize_per_tensor.tensor(x, scale, zero_point, -128, 127, torch.int8)
        y = qd.dequantize_per_tensor.tensor(q, scale, zero_point, -128, 127, torch.int8)
        return F.conv2d(F.pad(y, (0, 1, 2, 1)), layer.weight(), layer.bias)

    layer, x = Layer((6, 4, 3, 3)), torch.randn(1, 4, 7, 7) + 3
    model, reference = rewritten(Graph(function, layer), x)
    assert computed_by(reference, aten.convolution.default) == 1
    torch.testing.assert_close(reference(x), model(x), rtol=1e-5, atol=1e-5)


# Averages.


AVERAGES = [
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(3, 3, divisor_override=5),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((2, 4)),
    models.Applied(lambda m, x: x.mean()),
    models.Applied(lambda m, x: x.mean(1)),
    models.Applied(lambda m, x: F.avg_pool1d(x[0], 3, 2, 1)),
]


@pytest.mark.parametrize("module", AVERAGES, ids=lambda m: str(m).replace("\n", ""))
def test_average(module):
    x = torch.randn(2, 3, 8, 8)
    model, reference = rewritten(Graph(lambda m, x: fake(m(fake(x)), 0.011), module), x)
    summed = [n for n in reference.graph.nodes if n.target is aten.sum.dim_IntList]
    assert len(summed) + computed_by(reference, aten.convolution.default) == 1
    assert steps(model, reference, (x,), 0.011) < 1.01


# What stays.


def test_operator_without_an_integer_form():
    x = torch.randn(5, 8)
    module = models.Applied(lambda m, x: fake(torch.sigmoid(fake(x)), 1 / 256, -128))
    model, reference = rewritten(module, x)
    assert aten.sigmoid.default in targets(reference)
    assert torch.equal(reference(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
        lambda x: F.pad(x, (1, 1), value=0.7) * 2.0,
        lambda x: torch.cat([x, torch.sin(x)]),
        lambda x: x / x.abs(),
    ],
)
def test_arguments_without_an_integer_form(function):
    x = torch.randn(1, 2, 8, 8)
    model, reference = rewritten(Graph(lambda x: fake(function(fake(x)), 0.1)), x)
    assert torch.equal(reference(x), model(x))


def test_memory_that_others_write_to():
    """The view shows what relu_ writes: its integers are not those of the sum."""

    def function(x, y):
        total = fake(x) + fake(y)
        view = total.view(-1)
        positive = fake(F.relu_(total), 0.05)
        return positive, fake(view, 0.05)

    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    model, reference = rewritten(Graph(function), *inputs)
    for expected, actual in zip(model(*inputs), reference(*inputs), strict=True):
        assert torch.equal(expected, actual)


def test_operators_in_place():
    def function(x, y):
        return fake(F.relu_(fake(x).add_(fake(y))), 0.05)

    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    model, reference = rewritten(Graph(function), *inputs)
    assert not {aten.add_.Tensor, aten.relu_.default} & set(targets(reference))
    assert steps(model, reference, inputs, 0.05) < 1.01


def test_constants_that_stay_float():
    module, inputs = models.net()
    quantized, reference = both(module, inputs, fold_quantize=False)
    assert computed_by(reference, aten.convolution.default) == 2
    assert reference.get_parameter("head.weight").dtype == torch.float32
    assert torch.equal(reference(*inputs), quantized(*inputs))


def test_free_sizes():
    module, (x,) = models.net()
    dynamic = {0: torch.export.Dim("batch", max=64)}
    model = torch.export.export(module, (x,), dynamic_shapes=(dynamic,)).module()
    prepared = prepare_pt2e(model, XNNPACKQuantizer().set_global(PER_CHANNEL))
    prepared(x)
    quantized, reference = convert_pt2e(copy.deepcopy(prepared)), convert_pt2e(prepared, True)
    again = torch.export.export(reference, (x,), dynamic_shapes=(dynamic,)).module()
    for count in (1, 2, 7):
        inputs = torch.randn(count, 3, 6, 6)
        assert torch.equal(reference(inputs), quantized(inputs))
        assert torch.equal(again(inputs), reference(inputs))


def test_sizes_are_asked_of_integers():
    def function(x):
        y = F.relu(fake(x) + fake(x))
        return fake(y, 0.05), x.new_zeros(y.shape[0])

    x = torch.randn(3, 4)
    with torch.no_grad():
        dynamic = ({0: torch.export.Dim("rows", max=64)},)
        model = torch.export.export(models.Applied(lambda m, x: function(x)), (x,), dynamic_shapes=(dynamic,)).module()
    reference = in_integers(copy.deepcopy(model))
    assert aten.relu.default not in targets(reference)
    assert torch.equal(reference(x)[0], model(x)[0])


# Metadata and control flow.


def test_metadata():
    module, inputs = models.net()
    _, reference = both(module, inputs)
    for node in reference.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert node.meta["from_node"]
    convolutions = [n for n in reference.graph.nodes if n.target is OUT_DTYPE and n.args[0] is aten.convolution.default]
    for i, node in enumerate(convolutions):
        paths = [path for path, _ in node.meta["nn_module_stack"].values()]
        assert paths[-1].endswith(f"blocks.{i}.conv")
        assert node.meta["from_node"][-1].name.startswith("conv2d")
        assert node.meta["from_node"][-1].pass_name == "compute_in_integers"
    look = lambda node, value: compared.append((node, value))  # noqa: E731
    compared: list[tuple[torch.fx.Node, torch.Tensor]] = []
    watch(reference, [inputs], [n for n in reference.graph.nodes if n.op == "call_function"], look)
    for node, value in compared:
        assert (value.shape, value.dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
    assert record_of(reference).representation == "reference"
    assert record_of(reference).coverage


@torch.no_grad()
@pytest.mark.parametrize("build", [models.conditional, models.looped, models.scanned])
def test_bodies_of_control_flow(build):
    module, inputs = build()
    prepared = prepare_pt2e(models.export(module, *inputs), quantizers.STATIC)
    for sign in (1, -1):
        prepared(*(sign * x for x in inputs))
    quantized, reference = convert_pt2e(copy.deepcopy(prepared)), convert_pt2e(prepared, True)
    assert sum(computed_by(body, aten.linear.default) for _, body in bodies(reference)) == 1
    assert torch.equal(reference(*inputs), quantized(*inputs))


def test_a_reference_is_converted_already():
    module, inputs = models.linear()
    _, reference = both(module, inputs)
    with pytest.raises(GraphError, match="converted already"):
        prepare_pt2e(reference, XNNPACKQuantizer().set_global(PER_CHANNEL))
    with pytest.raises(GraphError, match="converted already"):
        convert_pt2e(reference)
