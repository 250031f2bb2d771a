"""Affine observers through prepare and convert: the numbers of torchao's, from operators that more runtimes know."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import quantizers
import torch
from quantizers import annotate
from torch import nn

from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics import affine_fake_quantize, granularity, mapping, observers
from zeropoint.workflow import convert_pt2e, prepare_pt2e

pt2e = pytest.importorskip("torchao.quantization.pt2e")
from torchao.quantization.pt2e import _affine_quantization as ao_affine  # noqa: E402
from torchao.quantization.pt2e import fake_quantize as ao_fake_quantize  # noqa: E402
from torchao.quantization.pt2e import quantize_pt2e  # noqa: E402
from torchao.quantization.pt2e import quantizer as ao_quantizer  # noqa: E402

KINDS = ("PerTensor", "PerAxis", "PerGroup", "PerToken", "PerRow", "PerBlock")
OURS = SimpleNamespace(
    **{**vars(quantizers.OURS), **vars(observers), **vars(mapping), "QuantizationSpec": QuantizationSpec},
    **{kind: getattr(granularity, kind) for kind in KINDS},
    AffineFakeQuantize=affine_fake_quantize.AffineFakeQuantize,
)
THEIRS = SimpleNamespace(
    **{**vars(ao_quantizer), **vars(pt2e), **vars(ao_affine)},
    AffineFakeQuantize=ao_fake_quantize.AffineFakeQuantize,
)
GEMMS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


def spec(kind, observer, mapping_type, per, *sizes, dtype=torch.int8, limits=(None, None), dynamic=False, **settings):
    constructor = getattr(kind, observer).with_args(
        mapping_type=getattr(kind.MappingType, mapping_type),
        target_dtype=dtype,
        granularity=getattr(kind, per)(*sizes),
        **settings,
    )
    return kind.QuantizationSpec(
        dtype=dtype,
        quant_min=limits[0],
        quant_max=limits[1],
        qscheme=None,
        is_dynamic=dynamic,
        observer_or_fake_quant_ctr=constructor,
    )


def annotating(kind, act=None, weight=None):
    """Returns a quantizer of activations and weights of layers, each given as the arguments of ``spec``."""

    def function(model):
        for node in model.graph.nodes:
            if node.target in GEMMS:
                wanted = {"input": act, "weight": weight}
                named = {name: spec(kind, *a, **k) for name, (a, k) in wanted.items() if (a, k) != ((), {})}
                annotate(node, named, None, kind)

    act, weight = act or ((), {}), weight or ((), {})
    return quantizers.ByHand(function)


def of(*arguments, **settings):
    return arguments, settings


def run(prepare, convert, model, quantizer, inputs):
    prepared = prepare(copy.deepcopy(model), quantizer)
    for batch in inputs:
        prepared(*batch)
    return convert(prepared)


def both(build, act=None, weight=None, factors=(1.0, 1.7, 0.3), ours=OURS):
    """Returns the model as torchao quantizes it with its observers, as we do with ours, and the inputs."""
    _, inputs = build()
    model = models.exported(build)
    batches = [tuple(x * factor for x in inputs) for factor in factors]
    theirs = run(
        quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e, model, annotating(THEIRS, act, weight), batches
    )
    return theirs, run(prepare_pt2e, convert_pt2e, model, annotating(ours, act, weight), batches), inputs


def operators(model) -> set[str]:
    return {
        str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
        for node in model.graph.nodes
        if node.op == "call_function" and ("quant" in str(node.target) or "choose_qparams" in str(node.target))
    }


@models.seeded
def wide_mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 6)), (torch.randn(5, 16),)


@models.seeded
def tokens():
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(2, 5, 16),)


MAPPINGS = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")
WEIGHTS = [
    (of("PerTensor"), "dequantize_per_tensor"),
    (of("PerAxis", 0), "dequantize_per_channel"),
    (of("PerAxis", -1), "dequantize_per_channel"),
    (of("PerRow", -1), "dequantize_per_channel"),
    (of("PerToken"), "dequantize_per_channel"),
    (of("PerGroup", 8), "dequantize_per_channel_group"),
    (of("PerBlock", (1, 4)), "dequantize_per_channel_group"),
    (of("PerBlock", (2, 8)), "dequantize_affine"),
]


@pytest.mark.parametrize(("granularity", "operator"), WEIGHTS, ids=lambda value: str(value))
@pytest.mark.parametrize("mapping_type", MAPPINGS)
@pytest.mark.parametrize("limits", [(None, None), (-8, 7), (-127, 127)])
def test_weights(mapping_type, granularity, operator, limits):
    (per, *sizes), _ = granularity
    weight = of("AffineQuantizedMinMaxObserver", mapping_type, per, *sizes, limits=limits)
    theirs, ours, inputs = both(wide_mlp, weight=weight)
    assert torch.equal(ours(*inputs), theirs(*inputs))
    assert operators(ours) == {operator}
    assert operators(theirs) == {"dequantize_affine"}
    assert not [
        name for name, tensor in ours.state_dict().items() if tensor.dtype == torch.float32 and "weight" in name
    ]


@pytest.mark.parametrize("mapping_type", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("limits", [(None, None), (0, 15)])
def test_unsigned_weights_and_convolutions(mapping_type, limits):
    for per, *sizes in [("PerTensor",), ("PerAxis", 0), ("PerAxis", 1), ("PerGroup", 3), ("PerRow", 1)]:
        weight = of("AffineQuantizedMinMaxObserver", mapping_type, per, *sizes, dtype=torch.uint8, limits=limits)
        theirs, ours, inputs = both(models.conv_relu, weight=weight)
        assert torch.equal(ours(*inputs), theirs(*inputs))
        known = per in ("PerTensor", "PerAxis")
        assert ("dequantize_affine" in operators(ours)) is not known


ACTIVATIONS = [
    (of("PerTensor"), "quantize_per_tensor"),
    (of("PerAxis", 1), "quantize_per_channel"),
    (of("PerToken"), "quantize_per_channel"),
    (of("PerGroup", 8), "quantize_per_channel_group"),
    (of("PerBlock", (5, 2)), "quantize_affine"),
]


@pytest.mark.parametrize(("granularity", "operator"), ACTIVATIONS, ids=lambda value: str(value))
@pytest.mark.parametrize("mapping_type", MAPPINGS)
@pytest.mark.parametrize("observer", ["AffineQuantizedMinMaxObserver", "AffineQuantizedMovingAverageMinMaxObserver"])
def test_activations_with_fixed_scales(mapping_type, granularity, operator, observer):
    (per, *sizes), _ = granularity
    theirs, ours, inputs = both(wide_mlp, act=of(observer, mapping_type, per, *sizes))
    assert torch.equal(ours(*inputs), theirs(*inputs))
    if (per, mapping_type) == ("PerGroup", "ASYMMETRIC"):  # that operator adds the zero point before it rounds
        operator = "quantize_affine"
    assert operators(ours) == {operator, f"de{operator}"}


@pytest.mark.parametrize("per", ["PerToken", "PerGroup"])
def test_fixed_scales_of_three_axes_take_torchaos_operators(per):
    sizes = (4,) if per == "PerGroup" else ()
    theirs, ours, inputs = both(tokens, act=of("AffineQuantizedMinMaxObserver", "ASYMMETRIC", per, *sizes))
    assert torch.equal(ours(*inputs), theirs(*inputs))
    assert operators(ours) == {"quantize_affine", "dequantize_affine"}


def placeholder(mapping_type, per, *sizes, **settings):
    return of("AffineQuantizedPlaceholderObserver", mapping_type, per, *sizes, dynamic=True, **settings)


RUN_TIME = [
    (placeholder("ASYMMETRIC", "PerTensor"), "choose_qparams"),
    (placeholder("SYMMETRIC", "PerTensor"), "choose_qparams_symmetric"),
    (placeholder("SYMMETRIC_NO_CLIPPING_ERR", "PerTensor", limits=(-127, 127)), "choose_qparams_symmetric"),
    (placeholder("SYMMETRIC_NO_CLIPPING_ERR", "PerTensor"), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerTensor", dtype=torch.uint8), "choose_qparams"),
    (placeholder("SYMMETRIC", "PerTensor", dtype=torch.uint8, limits=(0, 127)), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerTensor", limits=(-8, 7), eps=2**-12), "choose_qparams"),
    (placeholder("ASYMMETRIC", "PerTensor", dtype=torch.int16), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerTensor", scale_dtype=torch.bfloat16), "choose_qparams_affine"),
    (placeholder("SYMMETRIC", "PerToken"), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerToken", eps=2**-12), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerToken", limits=(-127, 127)), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerGroup", 4), "choose_qparams_affine"),
    (placeholder("ASYMMETRIC", "PerBlock", (5, 4)), "choose_qparams_affine"),
]


@pytest.mark.parametrize(("act", "operator"), RUN_TIME, ids=lambda value: str(value))
@pytest.mark.parametrize("build", [wide_mlp, tokens])
def test_scales_chosen_at_run_time(build, act, operator):
    theirs, ours, inputs = both(build, act=act)
    for x in (inputs[0], inputs[0] * 5 + 1, inputs[0].abs() / 7):
        assert torch.equal(ours(x), theirs(x))
    assert operator in operators(ours)
    assert all("val" in node.meta for node in ours.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("build", [wide_mlp, tokens])
def test_tokens_at_run_time_take_xnnpacks_operators(build):
    """They round what lies half-way between two integers their own way: values are the same but for those."""
    theirs, ours, inputs = both(build, act=placeholder("ASYMMETRIC", "PerToken"))
    assert operators(ours) == {
        "choose_qparams_per_token_asymmetric", "quantize_per_token", "dequantize_per_token"
    }  # fmt: skip
    for x in (inputs[0], inputs[0] * 5 + 1, inputs[0].abs() / 7):
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)


SIZES = {"batch": torch.export.Dim("batch", min=2, max=64), "time": torch.export.Dim("time", min=2, max=64)}


@pytest.mark.parametrize(
    "act",
    [
        placeholder("ASYMMETRIC", "PerToken"),
        placeholder("SYMMETRIC", "PerToken"),
        placeholder("ASYMMETRIC", "PerTensor"),
        placeholder("SYMMETRIC_NO_CLIPPING_ERR", "PerTensor"),
        placeholder("ASYMMETRIC", "PerGroup", 4),
        of("AffineQuantizedMinMaxObserver", "ASYMMETRIC", "PerTensor"),
        of("AffineQuantizedMinMaxObserver", "SYMMETRIC", "PerAxis", -1),
    ],
    ids=str,
)
def test_sizes_that_are_free_stay_free(act):
    module, inputs = tokens()
    dims = ({0: SIZES["batch"], 1: SIZES["time"]},)
    model = torch.export.export(module, inputs, dynamic_shapes=dims).module()
    quantizer = annotating(OURS, act, of("AffineQuantizedMinMaxObserver", "SYMMETRIC", "PerAxis", 0))
    prepared = prepare_pt2e(model, quantizer)
    for shape in ((2, 5, 16), (4, 7, 16), (3, 2, 16)):
        x = torch.rand(shape) * 2 - 1
        x[0, 0], x[0, 1] = 1, -1
        prepared(x)
    converted = convert_pt2e(prepared)
    for shape in ((6, 3, 16), (2, 50, 16)):
        x = torch.rand(shape) - 0.5
        assert (converted(x) - module(x)).abs().max() < 0.1


def test_no_calibration_is_needed_for_weights_and_scales_of_run_time():
    weight = of("AffineQuantizedMinMaxObserver", "SYMMETRIC", "PerGroup", 4, limits=(-8, 7))
    for act in (placeholder("ASYMMETRIC", "PerToken"), placeholder("SYMMETRIC", "PerToken")):
        calibrated = both(tokens, act, weight)[1]
        model = prepare_pt2e(models.exported(tokens), annotating(OURS, act, weight))
        without = convert_pt2e(model)
        _, inputs = tokens()
        assert torch.equal(without(*inputs), calibrated(*inputs))


@pytest.mark.parametrize(
    ("act", "weight"),
    [
        (of("AffineQuantizedMinMaxObserver", "ASYMMETRIC", "PerTensor"), ("SYMMETRIC", "PerAxis", 0)),
        (placeholder("ASYMMETRIC", "PerToken"), ("SYMMETRIC", "PerGroup", 4)),
        (of("AffineQuantizedMovingAverageMinMaxObserver", "SYMMETRIC", "PerTensor"), ("ASYMMETRIC", "PerTensor")),
    ],
    ids=str,
)
def test_observers_of_torchao_convert_themselves(act, weight):
    weight = of("AffineQuantizedMinMaxObserver", *weight)
    theirs, ours, inputs = both(tokens, act, weight, ours=THEIRS)
    assert torch.equal(ours(*inputs), theirs(*inputs))
    assert operators(ours) == operators(theirs)
    assert {str(n.target) for n in ours.graph.nodes if "affine" in str(n.target)} == {
        str(n.target) for n in theirs.graph.nodes if "affine" in str(n.target)
    }
    model = prepare_pt2e(models.exported(tokens), annotating(THEIRS, None, weight))
    assert torch.equal(convert_pt2e(model)(*inputs), both(tokens, None, weight)[0](*inputs))


@pytest.mark.parametrize("kind", [OURS, THEIRS], ids=["ours", "torchaos"])
@pytest.mark.parametrize("mapping_type", ["SYMMETRIC", "ASYMMETRIC"])
def test_fake_quantizers(kind, mapping_type):
    weight = of("AffineFakeQuantize", mapping_type, "PerGroup", 8, limits=(-8, 7))
    act = of("AffineFakeQuantize", "ASYMMETRIC", "PerTensor", dtype=torch.uint8)
    theirs, ours, inputs = both(wide_mlp, act, weight, ours=kind)
    assert torch.equal(ours(*inputs), theirs(*inputs))
    group = {"dequantize_per_channel_group", "quantize_per_tensor", "dequantize_per_tensor"}
    assert operators(ours) == (group if kind is OURS else {"quantize_affine", "dequantize_affine"})


def test_integers_of_asymmetric_groups_are_torchaos():
    weight = of("AffineQuantizedMinMaxObserver", "ASYMMETRIC", "PerGroup", 32)

    @models.seeded
    def large():
        return nn.Linear(512, 256), (torch.randn(1, 512),)

    theirs, ours, _ = both(large, weight=weight)
    integers = [next(t for t in m.buffers() if t.dtype == torch.int8) for m in (theirs, ours)]
    assert torch.equal(*integers)


def test_short_floats_are_computed_in_float32():
    """torchao rounds each step to bfloat16."""
    module, inputs = wide_mlp()
    module, inputs = module.bfloat16(), (inputs[0].bfloat16(),)
    model = models.export(module, *inputs)
    act = of("AffineQuantizedMinMaxObserver", "ASYMMETRIC", "PerTensor")
    weight = of("AffineQuantizedMinMaxObserver", "SYMMETRIC", "PerGroup", 8)
    errors = []
    for kind, prepare, convert in (
        (THEIRS, quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e),
        (OURS, prepare_pt2e, convert_pt2e),
    ):
        converted = run(prepare, convert, model, annotating(kind, act, weight), [inputs])
        assert converted(*inputs).dtype == torch.bfloat16
        errors.append((converted(*inputs) - module(*inputs)).float().pow(2).mean())
    assert errors[1] <= errors[0] * 1.5


def qualcomms(package: str):
    """Returns the class of fake quantizers that ExecuTorch's Qualcomm backend has, its imports changed to a package.

    The module is read as text: its package does not import without the vendor's kit.
    """
    executorch = importlib.util.find_spec("executorch")
    if executorch is None:
        pytest.skip("executorch is not installed")
    folder = Path(next(iter(executorch.submodule_search_locations)))
    text = (folder / "backends/qualcomm/quantizer/observers/per_block_param_observer.py").read_text()
    constants = "from executorch.backends.qualcomm.utils.constants import DEFAULT_EPS_FP32"
    text = text.replace(constants, "DEFAULT_EPS_FP32 = 2**-12").replace("torchao.quantization.pt2e", package)
    names: dict[str, object] = {"__name__": f"per_block_of_{package}"}
    exec(text, names)
    return names["PerBlockParamFakeQuantize"]


def test_a_program_of_a_backend_after_changing_its_imports():
    outputs = []
    for package, kind in (("torchao.quantization.pt2e", THEIRS), ("zeropoint.pt2e", OURS)):
        constructor = qualcomms(package).with_args(block_size=torch.Size((1, 8)), quant_min=-7, quant_max=7)
        wanted = kind.QuantizationSpec(torch.int8, constructor, -7, 7)
        model, (x,) = models.exported(wide_mlp), wide_mlp()[1]
        quantizer = quantizers.ByHand(lambda model, s=wanted, k=kind: [
            annotate(node, {"weight": s}, None, k) for node in model.graph.nodes if node.target in GEMMS
        ])  # fmt: skip
        prepare, convert = (
            (prepare_pt2e, convert_pt2e) if kind is OURS else (quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e)
        )
        converted = run(prepare, convert, model, quantizer, [(x,)])
        outputs.append(converted(x))
    assert torch.equal(*outputs)
    assert operators(converted) == {"dequantize_per_channel_group"}
