"""The same quantizer, its annotations made of torchao's classes: torchao and we give the same graph and numbers."""

import copy
from types import SimpleNamespace

import models
import pytest
import quantizers
import torch
from quantizers import KEY, annotate
from torch import nn

from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.workflow import convert_pt2e, prepare_pt2e

pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
from torchao.quantization.pt2e import quantizer as ao_quantizer  # noqa: E402

THEIRS = SimpleNamespace(**vars(pt2e), **{k: v for k, v in vars(ao_quantizer).items() if k not in vars(pt2e)})
aten = torch.ops.aten


def both(model, inputs, function):
    """Returns the model as torchao and as we prepare, calibrate and convert it."""
    quantizer = quantizers.ByHand(function)
    results = []
    for prepare, convert in (
        (quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e),
        (prepare_pt2e, convert_pt2e),
    ):
        prepared = prepare(copy.deepcopy(model), quantizer)
        with torch.no_grad():
            for factor in (1.0, 1.7, 0.3):
                prepared(*(x * factor for x in inputs))
        results.append(convert(prepared))
    return results


def quantization(model):
    """Returns what is quantized and how: for each operator and argument the numbers of its dequantize."""
    found = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target not in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS):
            for place, read in enumerate(node.all_input_nodes):
                found[node.name, place] = numbers(model, read) if read.target in ops.DEQUANTIZE_OPS else None
    for place, read in enumerate(models.find(model, "output").all_input_nodes):
        found["output", place] = numbers(model, read) if read.target in ops.DEQUANTIZE_OPS else None
    return found


def numbers(model, dequantize):
    def value(argument):
        if not isinstance(argument, torch.fx.Node):
            return argument
        tensor = model
        for part in argument.target.split("."):
            tensor = getattr(tensor, part)
        return tuple(tensor.tolist())

    constant = dequantize.args[0].op == "get_attr"
    integers = value(dequantize.args[0]) if constant and dequantize.args[0].op == "get_attr" else None
    return (dequantize.target, str(integers), *(value(a) for a in dequantize.args[1:]))


def compare(model, inputs, function):
    theirs, ours = both(model, inputs, function)
    assert quantization(ours) == quantization(theirs)
    assert any(v is not None for v in quantization(ours).values())
    for operators in (ops.QUANTIZE_OPS, ops.DEQUANTIZE_OPS):
        assert sum(n.target in operators for n in ours.graph.nodes) == sum(
            n.target in operators for n in theirs.graph.nodes
        )
    assert torch.allclose(ours(*inputs), theirs(*inputs), atol=1e-6)
    return theirs, ours


@pytest.mark.parametrize(
    "build", [models.linear, models.mlp, models.conv_relu, models.branches, models.adds, models.called_twice]
)
def test_static(build):
    _, inputs = build()
    compare(models.exported(build), inputs, lambda model: quantizers.static(model, THEIRS))


def test_per_tensor_weights():
    _, inputs = models.mlp()
    spec = quantizers.activation(THEIRS, qscheme=torch.per_tensor_symmetric, quant_min=-127)
    compare(models.exported(models.mlp), inputs, lambda m: quantizers.static(m, THEIRS, spec))


def test_fake_quantizers_of_torchao():
    _, inputs = models.mlp()
    fake = THEIRS.FakeQuantize.with_args(observer=THEIRS.MovingAverageMinMaxObserver, eps=2**-12)
    spec = quantizers.activation(THEIRS, observer_or_fake_quant_ctr=fake)
    compare(models.exported(models.mlp), inputs, lambda m: quantizers.static(m, THEIRS, act=spec))


def test_histogram_observers_of_torchao():
    _, inputs = models.mlp()
    spec = quantizers.activation(THEIRS, observer_or_fake_quant_ctr=THEIRS.HistogramObserver.with_args(eps=2**-12))
    compare(models.exported(models.mlp), inputs, lambda m: quantizers.static(m, THEIRS, act=spec))


@models.seeded
def upsampling():
    layers = nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers), (torch.randn(1, 3, 4, 4),)


@pytest.mark.parametrize("build", [upsampling, models.net])
def test_batch_norm(build):
    _, (x,) = build()
    theirs, ours = both(models.exported(build), (x,), lambda m: quantizers.static(m, THEIRS))
    ours_values, theirs_values = quantization(ours), quantization(theirs)
    assert ours_values.keys() == theirs_values.keys()
    for place, value in ours_values.items():
        assert (value and value[0]) == (theirs_values[place] and theirs_values[place][0])
    assert torch.allclose(ours(x), theirs(x), atol=0.05)  # they fold batch norm in float32


def bias_of(observers):
    x, w = observers
    scale = x.calculate_qparams()[0] * w.calculate_qparams()[0]
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def derived(model):
    act = quantizers.activation(THEIRS)
    for node in model.graph.nodes:
        if node.target is aten.linear.default:
            x, w, _ = node.args
            bias = THEIRS.DerivedQuantizationSpec(
                [(x, node), (w, node)], bias_of, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
            )
            annotate(node, {"input": act, "weight": quantizers.weight(THEIRS), "bias": bias}, act, THEIRS)


def test_derived_biases():
    _, inputs = models.mlp()
    compare(models.exported(models.mlp), inputs, derived)


def fixed_and_shared(model):
    sigmoid = models.find(model, "sigmoid")
    act = quantizers.activation(THEIRS)
    fixed = THEIRS.FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
    annotate(sigmoid, {"self": act}, fixed, THEIRS)
    flat = models.find(model, "flatten")
    annotate(
        flat, {"self": THEIRS.SharedQuantizationSpec(sigmoid)}, THEIRS.SharedQuantizationSpec((sigmoid, flat)), THEIRS
    )


def test_fixed_and_shared_specs():
    module = nn.Sequential(nn.Sigmoid(), nn.Flatten())
    x = torch.randn(2, 3, 2)
    compare(models.export(module, x), (x,), fixed_and_shared)


@pytest.mark.parametrize("allowed", [(True, True, True), (True, False, False), (False, False, False)])
def test_implicit_sharing(allowed):
    def function(model):
        act = quantizers.activation(THEIRS)
        annotate(models.find(model, "linear"), {}, act, THEIRS)
        for index in (1, 2):
            node = models.find(model, "linear", index)
            annotate(node, {"input": act}, None, THEIRS, allow_implicit_sharing=allowed[index])

    model = models.exported(models.branches)
    quantizer = quantizers.ByHand(function)
    groups = []
    for prepare in (quantize_pt2e.prepare_pt2e, prepare_pt2e):
        prepared = prepare(copy.deepcopy(model), quantizer)
        reads = [argument(models.find(prepared, "linear", i), "input") for i in (1, 2)]
        groups.append(len({id(prepared.get_submodule(read.target)) for read in reads}))
    assert groups[0] == groups[1]


def test_dynamic():
    def function(model):
        spec = THEIRS.QuantizationSpec(
            torch.int8,
            THEIRS.PlaceholderObserver.with_args(eps=2**-12),
            -128,
            127,
            torch.per_tensor_affine,
            is_dynamic=True,
        )
        for node in model.graph.nodes:
            if node.target is aten.linear.default:
                annotate(node, {"input": spec, "weight": quantizers.weight(THEIRS)}, None, THEIRS)

    _, inputs = models.mlp()
    theirs, ours = both(models.exported(models.mlp), inputs, function)
    for name in ("choose_qparams", "quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"):
        assert models.count(ours, name) == models.count(theirs, name) > 0
    assert models.find(ours, "choose_qparams").args[1:] == models.find(theirs, "choose_qparams").args[1:]
    assert torch.allclose(ours(*inputs), theirs(*inputs), atol=1e-6)


def test_embedding_quantizer():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, x):
            return self.table(x)

    torch.manual_seed(0)
    x = torch.tensor([[1, 2, 9]])
    model = models.export(Embedded(), x)
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    quantizer = EmbeddingQuantizer()
    theirs = quantize_pt2e.prepare_pt2e(copy.deepcopy(model), quantizer)
    theirs(x)
    theirs = quantize_pt2e.convert_pt2e(theirs)
    ours = convert_pt2e(prepare_pt2e(model, quantizer))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    dq = models.find(ours, "dequantize_per_channel")
    assert ours.get_buffer(dq.args[2].target).dtype == torch.float32
    assert KEY in models.find(ours, "embedding").meta
