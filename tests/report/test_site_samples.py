"""What is summed up of all sites together is what each alone would give."""

import dataclasses
import math

import pytest
import torch

from zeropoint.report.compared_sites import Sums
from zeropoint.report.site_samples import SiteSample, add_samples


def sample(seed: int, size: int, bits: int = 8, spoiled: float | None = None) -> SiteSample:
    """Returns values, some of them clipped, on a grid of so many bits."""
    draw = torch.Generator().manual_seed(seed)
    reference = torch.randn(size, generator=draw) * 3
    before = reference + 0.01 * torch.randn(size, generator=draw)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = 4.0 / (high - low), -3
    after = ((before / scale).round() + zero_point).clamp(low, high).sub(zero_point).mul(scale)
    if spoiled is not None:
        reference[0] = spoiled
    return SiteSample(Sums(), reference, before, after, 1 + seed, scale, zero_point, (low, high))


SAMPLES = [(0, 7, 8), (1, 3000, 8), (2, 100, 4), (3, 1, 8), (4, 500, 16)]


@pytest.mark.parametrize("spoiled", [None, math.nan, math.inf])
@pytest.mark.parametrize("count", [1, len(SAMPLES)])
def test_together_and_alone(count, spoiled):
    together, alone = ([sample(*each) for each in SAMPLES[:count]] for _ in range(2))
    if spoiled is not None:
        together[0], alone[0] = (sample(*SAMPLES[0], spoiled=spoiled) for _ in range(2))
    for _ in range(2):
        add_samples(together)
        for each in alone:
            each.add()
    for one, other in zip(together, alone, strict=True):
        found, expected = (dataclasses.asdict(each.sums) for each in (one, other))
        assert torch.equal(found.pop("codes"), expected.pop("codes"))
        assert found.pop("ranges") == expected.pop("ranges") == []
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert any(each.sums.clipped for each in together)


def test_nothing_to_add():
    add_samples([])
