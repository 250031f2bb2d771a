"""Which operators quantize by a granularity, and refusals where there are none, before anything is changed."""

import subprocess
import sys

import models
import pytest
import quantizers
import torch
from quantizers import annotate
from torch import nn

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics.affine_fake_quantize import AffineFakeQuantize
from zeropoint.numerics.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedPlaceholderObserver,
)
from zeropoint.passes.affine_blocks import Layout, layout_of
from zeropoint.workflow import convert_pt2e, prepare_pt2e

SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
BATCH = torch.export.Dim("batch", min=2, max=64)


def spec(granularity, observer=AffineQuantizedMinMaxObserver, mapping=ASYMMETRIC, is_dynamic=False, **settings):
    constructor = observer.with_args(mapping_type=mapping, target_dtype=torch.int8, granularity=granularity, **settings)
    return QuantizationSpec(torch.int8, constructor, is_dynamic=is_dynamic)


def by(**specs):
    return quantizers.ByHand(lambda model: annotate(models.find(model, "linear"), specs, None))


@pytest.fixture(scope="module")
def free_batch():
    module, inputs = models.linear()
    return torch.export.export(module, inputs, dynamic_shapes=({0: BATCH},)).module()


@pytest.mark.parametrize(
    ("granularity", "layout"),
    [
        (PerTensor(), Layout()),
        (PerAxis(0), Layout(ch_axis=0)),
        (PerAxis(-1), Layout(ch_axis=1)),
        (PerRow(0), Layout(ch_axis=1)),
        (PerToken(), Layout(ch_axis=0)),
        (PerGroup(4), Layout(ch_axis=0)),
        (PerGroup(2), Layout(group_size=2)),
        (PerGroup(1), Layout(block_size=(1, 1))),
        (PerBlock((3, 4)), Layout()),
        (PerBlock((1, 2)), Layout(group_size=2)),
        (PerBlock((3, 2)), Layout(block_size=(3, 2))),
    ],
    ids=str,
)
def test_layouts_of_a_matrix(granularity, layout):
    weight = models.find(models.exported(models.linear), "linear").args[1]
    affine = AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, granularity)
    assert layout_of(affine, weight, is_constant=True) == layout
    if layout == Layout(group_size=2):
        assert layout_of(affine, weight, is_constant=False) == Layout(block_size=(1, 2))
        symmetric = AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, granularity)
        assert layout_of(symmetric, weight, is_constant=False) == layout


@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(2), PerAxis(0)], ids=str)
def test_fixed_scales_along_a_free_size_are_refused_in_prepare(granularity, free_batch):
    words = (
        r"x?input.*, read as linear\.input: .* has fixed scales along axis 0, whose size is free: s\d+\. Use PerTensor"
    )
    with pytest.raises(SpecError, match=words):
        prepare_pt2e(free_batch, by(input=spec(granularity)))


@pytest.mark.parametrize("granularity", [PerGroup(3), PerAxis(2)], ids=str)
def test_a_granularity_that_does_not_fit_is_refused_in_prepare(granularity):
    with pytest.raises(SpecError, match=r"weight.*, read as linear\.weight: "):
        prepare_pt2e(models.exported(models.linear), by(weight=spec(granularity)))


def test_a_static_placeholder_is_refused_in_convert():
    model = prepare_pt2e(
        models.exported(models.linear), by(input=spec(PerTensor(), AffineQuantizedPlaceholderObserver))
    )
    before = model.code
    with pytest.raises(
        CalibrationError, match=r"input_1: a AffineQuantizedPlaceholderObserver has no scale.*Use is_dyn"
    ):
        convert_pt2e(model)
    assert model.code == before


def test_no_data():
    model = prepare_pt2e(models.exported(models.linear), by(input=spec(PerTensor())))
    with pytest.raises(CalibrationError, match=r"input_1: no data reached this AffineQuantizedMinMaxObserver"):
        convert_pt2e(model)


WITHOUT_TORCHAO = """
import sys
sys.modules["torchao"] = None
sys.path.insert(0, "tests")
import torch
from torch import nn
from quantizers import ByHand, annotate
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics.granularity import PerAxis, PerBlock, PerGroup, PerToken
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers import AffineQuantizedMinMaxObserver, AffineQuantizedPlaceholderObserver
from zeropoint.workflow import convert_pt2e, prepare_pt2e

x = torch.randn(2, 4)
layer = nn.Linear(4, 4)

def run(mapping, act, weight):
    constructors = {
        "input": AffineQuantizedPlaceholderObserver.with_args(granularity=act),
        "weight": AffineQuantizedMinMaxObserver.with_args(granularity=weight),
    }
    specs = {
        name: QuantizationSpec(torch.int8, c.with_args(mapping_type=mapping, target_dtype=torch.int8),
                               is_dynamic=name == "input")
        for name, c in constructors.items()
    }
    model = torch.export.export(layer, (x,)).module()
    linear = [n for n in model.graph.nodes if n.target is torch.ops.aten.linear.default][0]
    code = model.code
    try:
        model = prepare_pt2e(model, ByHand(lambda model: annotate(linear, specs)))
    except SpecError as error:
        assert model.code == code
        return str(error)
    return convert_pt2e(model)(x)

assert (run(MappingType.ASYMMETRIC, PerToken(), PerGroup(2)) - layer(x)).abs().max() < 0.1
print(run(MappingType.SYMMETRIC, PerToken(), PerAxis(0)))
print(run(MappingType.ASYMMETRIC, PerToken(), PerBlock((2, 2))))
"""


def test_without_torchao_what_takes_its_operators_is_refused():
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCHAO], capture_output=True, text=True, check=True)
    run_time, fixed = found.stdout.strip().splitlines()
    remedy = "Install torchao, whose operators do, or use PerTensor, PerAxis, or PerGroup on a matrix."
    assert run_time == (
        "input_1, read as linear.input: no operator of quantized_decomposed quantizes at run time by PerToken(), "
        f"SYMMETRIC torch.int8 -128..127. {remedy}"
    )
    assert fixed == (
        "weight, read as linear.weight: no operator of quantized_decomposed quantizes by PerBlock(block_size=(2, 2)), "
        f"ASYMMETRIC torch.int8 -128..127. {remedy}"
    )


# -- observers of users ------------------------------------------------------------------------------------------------


class Blocks(AffineQuantizedMinMaxObserver):
    """Finds its blocks and ranges itself, and gives the class of a granularity in place of one."""

    def __init__(self, dtype, block_size, **settings):
        super().__init__(SYMMETRIC, dtype, PerBlock, **settings)
        self.block_size = block_size

    def forward(self, x):
        assert self.batches == 0  # it is the class above that counts
        assert hasattr(self, "min_val") is hasattr(self, "seen")
        self.seen = True
        rows = x.reshape(x.shape[0], -1, self.block_size[1])
        self.min_val, self.max_val = rows.amin(-1), rows.amax(-1)
        return x

    def calculate_qparams(self):
        scale = torch.maximum(-self.min_val, self.max_val) / 127
        return scale, torch.zeros_like(scale)


class Around(nn.Module):
    """Delegates to an observer, its ``convert`` too."""

    with_args = classmethod(AffineQuantizedMinMaxObserver.with_args.__func__)

    def __init__(self, observer, dtype, **settings):
        super().__init__()
        self.activation_post_process = observer(dtype=dtype)
        self.dtype = dtype

    def forward(self, x):
        return self.activation_post_process(x)

    def calculate_qparams(self):
        return self.activation_post_process.calculate_qparams()

    def convert(self, model, observer_node):
        self.activation_post_process.convert(model, observer_node)


@pytest.mark.parametrize("around", [False, True])
def test_subclasses(around):
    module, (x,) = models.linear()
    constructor = Blocks.with_args(block_size=(1, 2))
    constructor = Around.with_args(observer=constructor) if around else constructor
    model = prepare_pt2e(models.exported(models.linear), by(weight=QuantizationSpec(torch.int8, constructor)))
    model(x)
    converted = convert_pt2e(model)
    assert models.count(converted, "dequantize_per_channel_group") == 1
    assert (converted(x) - module(x)).abs().max() < 0.02


def test_a_fake_quantizer_at_run_time():
    fake = AffineFakeQuantize.with_args(
        observer=AffineQuantizedMovingAverageMinMaxObserver, averaging_constant=1, mapping_type=ASYMMETRIC,
        target_dtype=torch.int8, granularity=PerToken(),
    )  # fmt: skip
    model = prepare_pt2e(models.exported(models.linear), by(input=QuantizationSpec(torch.int8, fake, is_dynamic=True)))
    _, (x,) = models.linear()
    trained = model(x)
    converted = convert_pt2e(model)
    assert models.count(converted, "choose_qparams_per_token_asymmetric") == 1
    assert torch.allclose(converted(x), trained, atol=1e-6)
