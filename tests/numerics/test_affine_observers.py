"""Affine observers: scales and zero points as torchao's, statistics that are saved, and refusals."""

import copy
import itertools
import warnings

import pytest
import torch

from zeropoint.core.errors import CalibrationError, NonFiniteError, SpecError
from zeropoint.numerics.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from zeropoint.numerics.mapping import (
    MappingType,
    TorchAODType,
    ZeroPointDomain,
    choose_qparams_affine_with_min_max,
)
from zeropoint.numerics.observers import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedObserverBase,
    AffineQuantizedPlaceholderObserver,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import granularity as ao_granularity
    from torchao.quantization.pt2e import _affine_quantization as ao
    from torchao.quantization.quant_primitives import MappingType as AOMapping
    from torchao.quantization.quant_primitives import ZeroPointDomain as AODomain

ASYMMETRIC = MappingType.ASYMMETRIC
SYMMETRIC = MappingType.SYMMETRIC
RANGES = [
    (torch.int8, None, None),
    (torch.int8, -127, 127),
    (torch.int8, -8, 7),
    (torch.uint8, None, None),
    (torch.uint8, 0, 15),
    (torch.uint4, None, None),
    (torch.int16, None, None),
    (torch.int32, -(2**20), 2**20),
]
GRANULARITIES = [
    PerTensor(), PerAxis(0), PerAxis(1), PerAxis(-1), PerGroup(4), PerGroup(8), PerToken(), PerRow(0), PerRow(-1),
    PerBlock((3, 2)), PerBlock((1, 4)), PerBlock((6, 8)),
]  # fmt: skip
MEASURING = [AffineQuantizedMinMaxObserver, AffineQuantizedMovingAverageMinMaxObserver]


def batches(shape=(5, 6, 8), count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shift = torch.tensor([0.5, -4.0, 0.0])
    found = [torch.randn(shape, generator=generator) * (1 + i) + shift[i] for i in range(count)]
    found[0].view(-1)[:8] = 0
    return [x.to(dtype) for x in found]


def theirs_of(granularity):
    kind = getattr(ao_granularity, type(granularity).__name__)
    return kind(*(getattr(granularity, name) for name in granularity.__dataclass_fields__))


def qparams(ours, mapping, target, granularity, data, **settings):
    """Returns the scale and zero point of our observer and of torchao's of the same name."""
    theirs = getattr(ao, ours.__name__)(AOMapping[mapping.name], target, theirs_of(granularity), **settings)
    observer = ours(mapping, target, granularity, **settings)
    for x in data:
        assert observer(x) is x
        theirs(x)
    assert observer.block_size == theirs.block_size
    assert observer.original_dtype == theirs.original_dtype
    return observer.calculate_qparams(), theirs.calculate_qparams()


# -- as torchao's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", MEASURING, ids=["min-max", "moving-average"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda m: m.name)
def test_scales_and_zero_points_are_torchaos(ours, mapping, granularity):
    for target, low, high in RANGES:
        if mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR and target in (torch.uint8, torch.uint4):
            continue
        for eps, scale_dtype, zero_point_dtype in [(None, None, None), (2**-3, torch.float64, torch.int32)]:
            settings = {"quant_min": low, "quant_max": high, "eps": eps}
            settings |= {"scale_dtype": scale_dtype, "zero_point_dtype": zero_point_dtype}
            found, expected = qparams(ours, mapping, target, granularity, batches(), **settings)
            for value, wanted in zip(found, expected, strict=True):
                assert value.dtype == wanted.dtype
                assert torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mapping", MappingType, ids=lambda m: m.name)
def test_short_floats_are_computed_as_torchao_does(mapping, dtype):
    for granularity in GRANULARITIES:
        for scale_dtype in (None, torch.float32):
            found, expected = qparams(
                AffineQuantizedMinMaxObserver, mapping, torch.int8, granularity, batches(dtype=dtype),
                scale_dtype=scale_dtype,
            )  # fmt: skip
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mapping", MappingType, ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 4), (12,)])
def test_tensors_of_any_number_of_axes(mapping, shape):
    for granularity in (PerTensor(), PerToken(), PerRow(), PerGroup(2)):
        found, expected = qparams(AffineQuantizedMinMaxObserver, mapping, torch.int8, granularity, batches(shape))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_qparams_of_ranges_in_each_domain():
    low, high = torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([2.0, 0.75, -1.0])
    for mapping, zero, domain in itertools.product(MappingType, (True, False), (*ZeroPointDomain, None)):
        theirs = domain and AODomain[domain.name]
        try:
            expected = ao.choose_qparams_affine_with_min_max(
                low, high, AOMapping[mapping.name], [], torch.int8, preserve_zero=zero, zero_point_domain=theirs
            )
        except (AssertionError, ValueError):
            expected = None
        arguments = (low, high, mapping, (), torch.int8)
        if expected is None:
            with pytest.raises(SpecError, match=r"^choose_qparams: preserve_zero="):
                choose_qparams_affine_with_min_max(*arguments, preserve_zero=zero, zero_point_domain=domain)
            continue
        found = choose_qparams_affine_with_min_max(*arguments, preserve_zero=zero, zero_point_domain=domain)
        assert torch.equal(found[0], expected[0])
        assert (found[1] is None) if expected[1] is None else torch.equal(found[1], expected[1])


@pytest.mark.parametrize("target", [torch.int4, TorchAODType.INT4])
def test_types_of_less_than_8_bits_are_held_in_8(target):
    observer = AffineQuantizedMinMaxObserver(SYMMETRIC, target, PerAxis(0))
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.int8, -8, 7)
    same = AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, PerAxis(0), -8, 7)
    for x in batches():
        observer(x)
        same(x)
    assert torch.equal(observer.calculate_qparams()[0], same.calculate_qparams()[0])
    assert AffineQuantizedMinMaxObserver(SYMMETRIC, torch.uint4, PerTensor()).dtype == torch.uint8


def test_enums_and_granularities_of_torchao():
    observer = AffineQuantizedMinMaxObserver(
        AOMapping.ASYMMETRIC, torch.int8, ao_granularity.PerGroup(4), zero_point_domain=AODomain.INT
    )
    assert observer.mapping_type is ASYMMETRIC
    assert observer.granularity == PerGroup(4)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerAxis(-1)], ids=str)
@pytest.mark.parametrize("ours", MEASURING, ids=["min-max", "moving-average"])
def test_sizes_that_are_reduced_may_change(ours, granularity):
    parts = [batches()[0], batches()[0][:1], batches()[0][:2] * 3]
    observer = ours(ASYMMETRIC, torch.int8, granularity)
    for x in parts:
        observer(x)
    scale, _ = observer.calculate_qparams()
    assert scale.shape == (() if granularity == PerTensor() else (parts[0].shape[granularity.axis],))
    if ours is AffineQuantizedMinMaxObserver:
        whole = ours(ASYMMETRIC, torch.int8, granularity)
        whole(torch.cat(parts))
        assert torch.equal(whole.calculate_qparams()[0], scale)


@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(4), PerRow(), PerAxis(0)], ids=str)
def test_static_scales_of_other_sizes_have_nothing_to_join(granularity):
    observer = AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, granularity)
    observer.site = "linear"
    x = batches()[0]
    observer(x)
    with pytest.raises(CalibrationError, match=r"^linear: the statistics are of shape .*: Per\w+\(.*Calibrate with"):
        observer(x[:2])


@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(4), PerTensor()], ids=str)
def test_dynamic_ranges_are_those_of_the_last_tensor(granularity):
    observer = AffineQuantizedMovingAverageMinMaxObserver(
        ASYMMETRIC, torch.int8, granularity, averaging_constant=1, is_dynamic=True
    )
    last = batches()[1][:2]
    for x in (*batches(), last):
        observer(x)
    alone = AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, granularity)
    alone(last)
    assert torch.equal(observer.calculate_qparams()[0], alone.calculate_qparams()[0])


def test_one_value_per_block():
    x = torch.tensor([[1.0, -2.0]])
    for granularity in (PerGroup(1), PerBlock((1, 1)), PerRow(0)):
        observer = AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, granularity, -127, 127)
        observer(x)
        assert torch.equal(observer.calculate_qparams()[0].flatten(), torch.tensor([1.0, 2.0]) / 127)


def test_memory_order_and_gradients_do_not_count():
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    for granularity in (PerTensor(), PerAxis(1), PerGroup(3)):
        first, second = (AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, granularity) for _ in range(2))
        first(x)
        second(x.detach().contiguous())
        assert torch.equal(first.calculate_qparams()[0], second.calculate_qparams()[0])
        assert not first.min_val.requires_grad


# -- what all observers keep to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", MEASURING, ids=["min-max", "moving-average"])
def test_statistics_are_saved(ours):
    observer = ours(ASYMMETRIC, torch.int8, PerGroup(4))
    for x in batches(dtype=torch.bfloat16):
        observer(x)
    loaded = ours(ASYMMETRIC, torch.int8, PerGroup(4))
    loaded.load_state_dict(observer.state_dict())
    for again in (loaded, copy.deepcopy(observer)):
        for value, wanted in zip(again.calculate_qparams(), observer.calculate_qparams(), strict=True):
            assert torch.equal(value, wanted)
            assert value.dtype == torch.bfloat16
    observer.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("ours", MEASURING, ids=["min-max", "moving-average"])
def test_no_data_reset_and_empty_tensors(ours):
    observer = ours(ASYMMETRIC, torch.int8, PerToken())
    observer.site = "linear"
    for forget in (lambda: observer(torch.empty(0, 3)), observer.reset):
        forget()
        with pytest.raises(CalibrationError, match=r"^linear: no data reached this Affine\w+\. Run the prepared"):
            observer.calculate_qparams()
        observer(batches()[0])
        observer.calculate_qparams()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value):
    observer = AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, PerToken())
    observer(torch.ones(2, 3))
    before = observer.min_val.clone()
    x = torch.ones(2, 3)
    x[1, 1] = value
    with pytest.raises(NonFiniteError, match="in batch 1"):
        observer(x)
    assert torch.equal(observer.min_val, before)


def test_a_placeholder_measures_nothing():
    observer = AffineQuantizedPlaceholderObserver(ASYMMETRIC, torch.int8, PerToken(), is_dynamic=True)
    assert observer(batches()[0]) is not None
    assert (observer.block_size, observer.original_dtype) == ((1, 1, 8), torch.float32)
    with pytest.raises(CalibrationError, match="a AffineQuantizedPlaceholderObserver has no scale"):
        observer.calculate_qparams()


def test_with_args():
    constructor = AffineQuantizedMinMaxObserver.with_args(mapping_type=SYMMETRIC, granularity=PerAxis(0), eps=2**-10)
    observer = constructor.with_args(target_dtype=torch.int8).with_args(quant_min=-127, quant_max=127)(
        dtype=torch.int8, qscheme=torch.per_channel_symmetric, is_dynamic=False
    )
    assert (observer.quant_min, observer.eps, observer.granularity) == (-127, 2**-10, PerAxis(0))
    assert isinstance(observer, AffineQuantizedObserverBase)
    assert "SYMMETRIC, torch.int8, -127..127, PerAxis(axis=0), batches=0" in repr(observer)


# -- refusals ----------------------------------------------------------------------------------------------------------

VALID = {"mapping_type": ASYMMETRIC, "target_dtype": torch.int8, "granularity": PerTensor()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_point_domain": ZeroPointDomain.FLOAT}, r"no operator quantizes by zero_point_domain=FLOAT\. Use"),
        ({"zero_point_domain": ZeroPointDomain.NONE}, r"no operator quantizes by zero_point_domain=NONE\. Use"),
        ({"zero_point_domain": None}, r"zero_point_domain=None is no ZeroPointDomain\. Use one of ZeroPointDomain\.I"),
        ({"preserve_zero": False}, r"preserve_zero=False with an integer zero point\. .*set preserve_zero=True"),
        ({"preserve_zero": False, "zero_point_domain": ZeroPointDomain.FLOAT}, "no operator quantizes by"),
        (
            {"mapping_type": SYMMETRIC, "zero_point_domain": ZeroPointDomain.FLOAT},
            r"preserve_zero=True, zero_point_domain=FLOAT with SYMMETRIC\. A symmetric mapping has",
        ),
        (
            {"mapping_type": MappingType.SYMMETRIC_NO_CLIPPING_ERR, "target_dtype": torch.uint8},
            r"SYMMETRIC_NO_CLIPPING_ERR divides by quant_min=0 and quant_max=255\. Choose quant_min < 0",
        ),
        ({"mapping_type": "SYMMETRIC"}, r"mapping_type='SYMMETRIC' is no MappingType\. Use one of MappingType\.SYM"),
        ({"granularity": None}, r"granularity=None is no granularity\. Give e\.g\. PerTensor\(\)"),
        ({"target_dtype": torch.float8_e4m3fn}, r"cannot quantize to torch\.float8_e4m3fn\. Use one of"),
        ({"target_dtype": "int8"}, r"target_dtype='int8' is no torch\.dtype\. Use e\.g\. torch\.int8"),
        ({"target_dtype": torch.uint4, "quant_max": 16}, r"quant_min=0, quant_max=16 is no range within torch\.uint4"),
        ({"quant_min": 5, "quant_max": 5}, r"quant_min=5, quant_max=5 is no range within torch\.int8"),
        ({"eps": 0.0}, r"eps=0\.0 is not a positive finite number"),
        ({"scale_dtype": torch.int8}, r"scale_dtype=torch\.int8 holds no fractions\. Use torch\.float32"),
        (
            {"zero_point_dtype": torch.uint8},
            r"zero_point_dtype=torch\.uint8 does not hold -128\.\.127\. Use torch\.int",
        ),
        ({"dtype": torch.uint8}, r"the spec says dtype=torch\.uint8, the observer target_dtype=torch\.int8\. Give"),
        (
            {"is_dynamic": True},
            r"is_dynamic=True is not for this observer\. Use AffineQuantizedPlaceholderObserver, or",
        ),
        ({"reduce_range": True}, r"no argument is called reduce_range\. Leave it out"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(SpecError, match=rf"^AffineQuantizedMinMaxObserver: {words}"):
        AffineQuantizedMinMaxObserver(**{**VALID, **changes})


def test_a_block_size_has_to_be_that_of_the_granularity():
    grouped = {**VALID, "granularity": PerGroup(4)}
    observer = AffineQuantizedMinMaxObserver(**grouped, block_size=(1, 4))
    observer(torch.randn(3, 8))
    assert observer.block_size == (1, 4)
    other = AffineQuantizedMinMaxObserver(**grouped, block_size=[1, 8])
    with pytest.raises(
        SpecError, match=r"block_size=\(1, 8\), and PerGroup\(group_size=4\) has blocks of \(1, 4\)\. Leave"
    ):
        other(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"averaging_constant": 0}, r"averaging_constant=0 is no share\. Choose 0 <"),
        ({"is_dynamic": True}, r"is_dynamic=True with averaging_constant=0\.01\. A dynamic range is"),
    ],
)
def test_refusals_of_averages(changes, words):
    with pytest.raises(SpecError, match=rf"^AffineQuantizedMovingAverageMinMaxObserver: {words}"):
        AffineQuantizedMovingAverageMinMaxObserver(**VALID, **changes)


@pytest.mark.parametrize("granularity", [PerGroup(3), PerAxis(3), PerBlock((1, 1, 1, 1)), PerBlock])
def test_a_granularity_that_does_not_fit_names_the_site(granularity):
    observer = AffineQuantizedMinMaxObserver(**{**VALID, "granularity": granularity})
    observer.site = "linear, weight"
    with pytest.raises(SpecError, match=r"^linear, weight: "):
        observer(batches()[0])
