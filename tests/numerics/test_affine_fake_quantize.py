"""Affine fake quantizers: values as torchao's, gradients straight through, saved and refused."""

import copy
import warnings

import pytest
import torch

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics.affine_fake_quantize import (
    AffineFakeQuantize,
    default_affine_fake_quant,
    default_affine_per_axis_fake_quant,
    default_groupwise_fake_quant,
)
from zeropoint.numerics.fake_quantize import disable_observer, enable_fake_quant
from zeropoint.numerics.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers import (
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedPlaceholderObserver,
    MinMaxObserver,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import granularity as ao_granularity
    from torchao.quantization.pt2e import fake_quantize as ao
    from torchao.quantization.quant_primitives import MappingType as AOMapping

GRANULARITIES = [
    PerTensor(), PerAxis(0), PerAxis(1), PerAxis(-1), PerGroup(4), PerToken(), PerRow(0), PerRow(1), PerBlock((3, 2)),
    PerBlock((1, 2)), PerBlock((5, 6, 8)),
]  # fmt: skip


def tensor(shape=(5, 6, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda m: m.name)
def test_values_and_gradients_are_torchaos(mapping, granularity):
    fields = {name: getattr(granularity, name) for name in granularity.__dataclass_fields__}
    settings = {"target_dtype": torch.int8, "quant_min": -8, "quant_max": 7}
    ours = AffineFakeQuantize(mapping_type=mapping, granularity=granularity, **settings)
    theirs = ao.AffineFakeQuantize(
        mapping_type=AOMapping[mapping.name],
        granularity=getattr(ao_granularity, type(granularity).__name__)(**fields),
        **settings,
    )
    x, y = tensor().requires_grad_(), tensor().requires_grad_()
    found, expected = ours(x), theirs(y)
    assert torch.equal(found, expected)
    assert torch.equal(ours.scale.flatten(), theirs.scale.flatten())
    assert torch.equal(ours.zero_point.flatten(), theirs.zero_point.flatten())
    assert ours.block_size == theirs.block_size
    ours.disable_observer()
    wide = (tensor() * 2).requires_grad_()
    ours(wide).sum().backward()
    clamped = (wide.grad == 0).float().mean()
    assert 0.05 < clamped < 0.95
    assert torch.equal(wide.grad.unique(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("default", [default_affine_fake_quant, default_affine_per_axis_fake_quant])
def test_defaults_are_torchaos(default):
    name = next(n for n, value in globals().items() if value is default)
    x = tensor((4, 256))
    assert torch.equal(default()(x), getattr(ao, name)()(x))


def test_default_groupwise():
    x = tensor((4, 256))
    found = default_groupwise_fake_quant()
    assert torch.equal(found(x), ao.default_groupwise_fake_quant()(x))
    assert found.scale.shape == (4, 2)


def dynamic(granularity):
    return AffineFakeQuantize(
        observer=AffineQuantizedMovingAverageMinMaxObserver.with_args(averaging_constant=1),
        is_dynamic=True,
        mapping_type=MappingType.ASYMMETRIC,
        target_dtype=torch.int8,
        granularity=granularity,
    )


@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(4), PerTensor()], ids=str)
def test_dynamic_takes_tensors_of_other_sizes(granularity):
    fake = dynamic(granularity)
    for x in (tensor(), tensor((2, 3, 8)), tensor((7, 8))):
        assert (fake(x) - x).abs().max() <= fake.scale.max() / 2 + 1e-6
    assert fake.is_dynamic


def test_scales_of_other_sizes_are_not_taken():
    fake = dynamic(PerToken())
    fake.activation_post_process.site = "linear"
    fake(tensor())
    fake.apply(disable_observer)
    with pytest.raises(
        CalibrationError, match=r"^linear: there are scales for 30 blocks, .*\(2, 3, 8\) has 6\. Enable"
    ):
        fake(tensor((2, 3, 8)))


def test_state_is_saved_and_switches_work():
    fake = AffineFakeQuantize(mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerGroup(4))
    x = tensor()
    expected = fake(x)
    other = AffineFakeQuantize(mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerGroup(4))
    other.load_state_dict(fake.state_dict())
    other.disable_observer()
    assert torch.equal(other(x), expected)
    assert torch.equal(other.calculate_qparams()[0], fake.calculate_qparams()[0])
    copied = copy.deepcopy(fake)
    copied.disable_fake_quant()
    assert copied(x) is x
    copied.apply(enable_fake_quant)
    assert torch.equal(copied(x), expected)
    fake.reset()
    with pytest.raises(CalibrationError, match="no data reached this"):
        fake.calculate_qparams()


@pytest.mark.parametrize("observer", [MinMaxObserver, AffineQuantizedPlaceholderObserver])
def test_an_observer_that_is_no_affine_one_or_measures_nothing(observer):
    settings = {"mapping_type": MappingType.SYMMETRIC, "target_dtype": torch.int8, "granularity": PerTensor()}
    settings = {} if observer is MinMaxObserver else settings
    with pytest.raises(SpecError, match=r"^AffineFakeQuantize: observer=.* is no affine observer that measures\. Use"):
        AffineFakeQuantize(observer=observer, **settings)
