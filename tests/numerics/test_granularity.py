"""Block sizes and scale shapes of every granularity, and the words of every refusal."""

import pytest

from zeropoint.core.errors import SpecError
from zeropoint.numerics.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    block_counts,
    block_size,
    get_block_size,
    granularity_of,
    qparams_shape,
    reduction,
)

SHAPE = (2, 6, 8)


@pytest.mark.parametrize(
    ("granularity", "blocks", "counts", "scale"),
    [
        (PerTensor(), (2, 6, 8), (1, 1, 1), ()),
        (PerAxis(0), (1, 6, 8), (2, 1, 1), (2,)),
        (PerAxis(-2), (2, 1, 8), (1, 6, 1), (6,)),
        (PerRow(), (1, 1, 8), (2, 6, 1), (2, 6, 1)),
        (PerRow(1), (1, 6, 1), (2, 1, 8), (2, 1, 8)),
        (PerToken(), (1, 1, 8), (2, 6, 1), (2, 6, 1)),
        (PerGroup(4), (1, 1, 4), (2, 6, 2), (2, 6, 2)),
        (PerBlock((3, 8)), (1, 3, 8), (2, 2, 1), (2, 2, 1)),
    ],
)
def test_shapes(granularity, blocks, counts, scale):
    assert block_size(granularity, SHAPE) == blocks
    assert block_counts(granularity, SHAPE) == counts
    assert qparams_shape(granularity, SHAPE) == scale


def test_a_scalar_has_one_scale():
    assert qparams_shape(PerTensor(), ()) == ()
    with pytest.raises(SpecError, match=r"axis=0 does not exist in shape \(\)\. Use PerTensor for a scalar"):
        block_size(PerAxis(0), ())


def test_an_empty_axis_is_one_block():
    assert block_counts(PerToken(), (3, 0)) == (3, 1)
    assert qparams_shape(PerAxis(0), (0, 4)) == (0,)


@pytest.mark.parametrize(
    ("granularity", "words"),
    [
        (PerAxis(3), r"axis=3 does not exist in shape \(2, 6, 8\)\. Choose -3 <= axis < 3"),
        (PerRow(-4), r"axis=-4 does not exist"),
        (PerGroup(3), r"PerGroup\(group_size=3\) does not divide axis 2 .*: 8 is no multiple of 3\. Choose a size"),
        (PerGroup(16), "8 is no multiple of 16"),
        (PerBlock((4, 8)), r"does not divide axis 1 of shape \(2, 6, 8\): 6 is no multiple of 4"),
        (PerBlock((1, 1, 1, 1)), r"has more axes than shape \(2, 6, 8\)\. Give at most 3"),
        (Granularity(), r"Granularity\(\) is no granularity\. Use PerTensor"),
    ],
)
def test_refusals(granularity, words):
    with pytest.raises(SpecError, match=words):
        block_size(granularity, SHAPE)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PerGroup(0), r"PerGroup: group_size=0 is no number of elements\. Choose group_size >= 1"),
        (lambda: PerGroup("a"), r"PerGroup: group_size='a' is no integer"),
        (lambda: PerAxis(1.5), r"PerAxis: axis=1\.5 is no integer"),
        (lambda: PerRow(None), r"PerRow: dim=None is no integer"),
        (lambda: PerBlock(4), r"PerBlock: block_size=4 is no tuple"),
        (lambda: PerBlock((1, -4)), r"PerBlock: block_size=-4 is no number"),
    ],
)
def test_what_is_no_granularity(build, words):
    with pytest.raises(SpecError, match=words):
        build()


def test_granularities_are_values():
    assert PerGroup(4) == PerGroup(4) != PerGroup(8)
    assert len({PerToken(), PerToken(), PerTensor(), PerRow()}) == 3
    assert repr(PerAxis(1)) == "PerAxis(axis=1)"


def test_names_and_fields_are_those_of_torchao():
    theirs = pytest.importorskip("torchao.quantization.granularity")
    for kind, arguments in ((PerTensor, ()), (PerAxis, (1,)), (PerGroup, (4,)), (PerRow, (1,)), (PerToken, ())):
        mine, other = kind(*arguments), getattr(theirs, kind.__name__)(*arguments)
        assert all(getattr(mine, name) == getattr(other, name) for name in kind.__dataclass_fields__)
    assert PerBlock((1, 4)).block_size == theirs.PerBlock((1, 4)).block_size


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerGroup(4), PerRow(0), PerToken(), PerBlock((3, 2))])
def test_granularities_of_torchao(granularity):
    theirs = pytest.importorskip("torchao.quantization.granularity")
    fields = [getattr(granularity, name) for name in granularity.__dataclass_fields__]
    foreign = getattr(theirs, type(granularity).__name__)(*fields)
    assert granularity_of(foreign) == granularity
    assert get_block_size(SHAPE, foreign) == get_block_size(SHAPE, granularity) == block_size(granularity, SHAPE)


@pytest.mark.parametrize("value", [None, 3, "PerTensor", PerAxis])
def test_a_value_that_is_no_granularity(value):
    with pytest.raises(SpecError, match=r"^weight: granularity=.* is no granularity\. Give e\.g\. PerTensor\(\)"):
        granularity_of(value, "weight")


@pytest.mark.parametrize(
    ("blocks", "view", "inside"),
    [
        ((2, 6, 8), [2, 6, 8], [0, 1, 2]),
        ((1, 6, 8), [2, 6, 8], [1, 2]),
        ((1, 1, 4), [2, 6, 2, 4], [3]),
        ((1, 3, 2), [2, 2, 3, 4, 2], [2, 4]),
        ((1, 1, 1), [2, 6, 8], []),
    ],
)
def test_reduction(blocks, view, inside):
    assert reduction(blocks, SHAPE) == (view, inside)


@pytest.mark.parametrize("blocks", [(1, 6), (1, 4, 8), (1, 12, 8)])
def test_blocks_that_do_not_cut_a_tensor(blocks):
    with pytest.raises(SpecError, match=r"^blocks of .* do not cut a tensor of shape \(2, 6, 8\)\. Give one size"):
        reduction(blocks, SHAPE)
