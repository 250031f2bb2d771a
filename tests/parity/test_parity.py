"""The same quantizer and data in torchao and in zeropoint: the same sites, scales and outputs.

Annotations are made of torchao's classes. What differs on purpose is listed in ``DIFFERENCES``, with its reason.
"""

import copy
from types import SimpleNamespace

import models
import pytest
import quantizers
import small_models
import torch
from quantizers import KEY, annotate
from same_numbers import assert_equal_numbers, numbers, sites, step_of
from torch.utils._pytree import tree_leaves

from zeropoint.graph.bind import argument
from zeropoint.workflow import convert_pt2e, prepare_pt2e

pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
from torchao.quantization.pt2e import quantizer as ao_quantizer  # noqa: E402

THEIRS = SimpleNamespace(**vars(pt2e), **{k: v for k, v in vars(ao_quantizer).items() if k not in vars(pt2e)})
aten = torch.ops.aten
EPS = 2**-12
FOLLOWING = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.max_pool2d.default, aten.view.default,
    aten.reshape.default, aten.permute.default, aten.flatten.using_ints, aten.adaptive_avg_pool2d.default,
    aten.mean.dim, aten.slice.Tensor, aten.clamp.default,
)  # fmt: skip
"""Operators that share the scale of what they read."""

ONE_BIAS = (
    "torchao gives a bias that two calls read the scale of the first call for both; each has its own in zeropoint"
)
ATTENTION = "torchao quantizes nothing within scaled_dot_product_attention; zeropoint takes it apart first"
DIFFERENCES = {
    ("called_twice", "integer_bias"): (
        ONE_BIAS,
        lambda ours, theirs: bias_is_right(ours) and not bias_is_right(theirs),
    ),
} | {
    ("fused_attention", name): (ATTENTION, lambda ours, theirs: products(ours) == 2 and products(theirs) == 0)
    for name in (
        "per_tensor",
        "per_channel",
        "histogram",
        "unsigned",
        "sixteen_bits",
        "integer_bias",
        "fake_quantizers",
    )
}
"""What differs on purpose, by model and configuration: why, and what then holds of our model and torchao's."""


def follow(model, quantized):
    """Annotates the operators that share the scale of an annotated input."""
    for node in model.graph.nodes:
        if node.target in FOLLOWING and KEY not in node.meta and node.args[0] in quantized:
            shared = THEIRS.SharedQuantizationSpec(node.args[0])
            node.meta[KEY] = THEIRS.QuantizationAnnotation({node.args[0]: shared}, shared, _annotated=True)
            quantized.add(node)


def statically(model, **specs):
    quantizers.static(model, THEIRS, specs.get("weight"), specs.get("act"))
    follow(model, {node for node in model.graph.nodes if KEY in node.meta})


def per_tensor(model):
    symmetric = quantizers.activation(THEIRS, qscheme=torch.per_tensor_symmetric, quant_min=-127)
    statically(model, weight=symmetric)


def per_channel(model):
    statically(model)


def histogram(model):
    observer = THEIRS.HistogramObserver.with_args(eps=EPS, bins=256)
    statically(model, act=quantizers.activation(THEIRS, observer_or_fake_quant_ctr=observer))


def unsigned(model):
    moving = THEIRS.MovingAverageMinMaxObserver.with_args(averaging_constant=0.1, eps=EPS)
    fields = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "observer_or_fake_quant_ctr": moving}
    affine = quantizers.activation(THEIRS, dtype=torch.uint8, quant_min=0, quant_max=255)
    statically(model, act=quantizers.activation(THEIRS, **fields), weight=affine)


def sixteen_bits(model):
    fields = {"dtype": torch.int16, "quant_min": -(2**15), "quant_max": 2**15 - 1}
    statically(model, act=quantizers.activation(THEIRS, **fields, qscheme=torch.per_tensor_symmetric))


def bias_of(observers):
    x, w = observers
    scale = x.calculate_qparams()[0] * w.calculate_qparams()[0]
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def integer_bias(model):
    statically(model)
    for node in model.graph.nodes:
        if node.target in quantizers.GEMMS and argument(node, "bias") is not None:
            sources = [(argument(node, name), node) for name in ("input", "weight")]
            node.meta[KEY].input_qspec_map[argument(node, "bias")] = THEIRS.DerivedQuantizationSpec(
                sources, bias_of, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
            )


def only_layers(model, act):
    for node in model.graph.nodes:
        if node.target in (*quantizers.GEMMS, *quantizers.TRANSPOSED):
            inputs = {"input": act} if act is not None else {}
            weight = quantizers.weight(THEIRS, int(node.target in quantizers.TRANSPOSED))
            annotate(node, {**inputs, "weight": weight}, None, THEIRS)


def dynamic(model):
    placeholder = THEIRS.PlaceholderObserver.with_args(eps=EPS)
    only_layers(model, quantizers.activation(THEIRS, observer_or_fake_quant_ctr=placeholder, is_dynamic=True))


def weight_only(model):
    only_layers(model, None)


def fake_quantizers(model):
    fake = THEIRS.FakeQuantize.with_args(observer=THEIRS.MovingAverageMinMaxObserver, eps=EPS)
    statically(model, act=quantizers.activation(THEIRS, observer_or_fake_quant_ctr=fake))


CONFIGURATIONS = [
    per_tensor, per_channel, histogram, unsigned, sixteen_bits, integer_bias, dynamic, weight_only, fake_quantizers,
]  # fmt: skip


@pytest.fixture(scope="module")
def exports():
    made = {}

    def export(name):
        if name not in made:
            module, inputs = small_models.build(name)
            made[name] = (models.export(module, *inputs), inputs)
        return copy.deepcopy(made[name][0]), made[name][1]

    return export


def converted(prepare, convert, model, inputs, configuration):
    prepared = prepare(model, quantizers.ByHand(configuration))
    with torch.no_grad():
        for factor in (1.0, 1.7, 0.3):
            prepared(*(x * factor for x in inputs))
    return convert(prepared)


def products(model):
    """Returns how many matrix products read two quantized tensors."""
    found = sites(model)
    names = [node.name for node in model.graph.nodes if node.target is aten.matmul.default]
    return sum((name, 0) in found and (name, 1) in found for name in names)


def bias_is_right(model):
    """True when the scale of each bias is the product of those of input and weight."""
    for node in model.graph.nodes:
        if node.target is aten.linear.default:
            x, w, bias = (numbers(model, argument(node, name)) for name in ("input", "weight", "bias"))
            if not torch.allclose(torch.as_tensor(bias[0]), x[0] * w[0], rtol=1e-6, atol=0):
                return False
    return True


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", small_models.MODELS)
def test_same_sites_scales_and_outputs(name, configuration, exports):
    model, inputs = exports(name)
    ours = converted(prepare_pt2e, convert_pt2e, copy.deepcopy(model), inputs, configuration)
    theirs = converted(quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e, model, inputs, configuration)
    if (name, configuration.__name__) in DIFFERENCES:
        _, holds = DIFFERENCES[name, configuration.__name__]
        assert holds(ours, theirs)
        return
    found, other = sites(ours), sites(theirs)
    assert {place: read.target for place, read in found.items()} == {p: read.target for p, read in other.items()}
    assert found
    for place, read in found.items():
        assert_equal_numbers(numbers(ours, read), numbers(theirs, other[place]), place)
    step = step_of(ours, found)
    with torch.no_grad():
        outputs, expected = (tree_leaves(each(*inputs)) for each in (ours, theirs))
    for output, wanted in zip(outputs, expected, strict=True):
        assert (output - wanted).abs().max() <= step * 1.001 + 1e-5 * wanted.abs().max()
