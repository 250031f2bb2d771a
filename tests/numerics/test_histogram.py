"""The histogram observer: bit for bit torchao's where the integers fill their dtype, near the best range elsewhere."""

import itertools
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.core.errors import CalibrationError, NonFiniteError
from zeropoint.numerics.observers import (
    HistogramObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
)
from zeropoint.numerics.observers.greedy_search import Densities, cell_errors, quantile_path
from zeropoint.numerics.observers.histogram import count, histograms_in, moved, search_together
from zeropoint.numerics.observers.range_search import quantizing_error, square_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e.observer import HistogramObserver as TorchaoHistogramObserver

SIZE = 20000


def draw(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(SIZE, generator=generator)
    even = torch.rand(SIZE, generator=generator).clamp(1e-6, 1 - 1e-6)
    match name:
        case "uniform":
            return even * 2 - 1
        case "laplace":
            return -(even - 0.5).sign() * torch.log1p(-2 * (even - 0.5).abs())
        case "cauchy":
            return torch.tan(torch.pi * (even - 0.5))
        case "exponential":
            return -torch.log(even)
        case "relu":
            return normal.relu()
        case "bimodal":
            return normal + torch.where(even > 0.5, 4.0, -4.0)
        case "constant":
            return torch.full((100,), 3.25)
        case "tiny":
            return normal * 1e-6
        case "huge":
            return normal * 1e6
        case "outlier":
            return torch.cat([normal, torch.tensor([1000.0])])
        case "integers":
            return torch.randint(-3, 4, (SIZE,), generator=generator).float()
        case "few":
            return normal[:8]
        case _:
            return normal


NAMES = (
    "uniform", "normal", "laplace", "cauchy", "exponential", "relu", "bimodal", "constant", "tiny", "huge", "outlier",
    "integers", "few",
)  # fmt: skip


def pair(data, **arguments):
    ours, theirs = HistogramObserver(**arguments), TorchaoHistogramObserver(**arguments)
    for x in data:
        ours(x)
        theirs(x)
    return ours, theirs


def assert_equal(ours, theirs):
    assert torch.equal(ours.histogram, theirs.histogram)
    assert torch.equal(ours.min_val, theirs.min_val)
    assert torch.equal(ours.max_val, theirs.max_val)
    (scale, zero_point), (their_scale, their_zero_point) = ours.calculate_qparams(), theirs.calculate_qparams()
    assert torch.equal(scale, their_scale)
    assert zero_point.item() == their_zero_point.item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("batches", "growth"), [(1, 1.0), (2, 1.4), (2, 0.6), (5, 1.3), (5, 0.8)], ids=lambda value: str(value)
)
def test_one_and_several_batches_as_torchao(name, batches, growth):
    data = [draw(name, seed) * growth**seed for seed in range(batches)]
    assert_equal(*pair(data, dtype=torch.int8, eps=2**-12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"bins": 4},
        {"bins": 37, "dtype": torch.int8},
        {"bins": 256, "qscheme": torch.per_tensor_symmetric},
        {"dtype": torch.int8, "qscheme": torch.per_tensor_symmetric},
        {"dtype": torch.int16},
        {"dtype": torch.uint16, "bins": 512},
    ],
    ids=str,
)
def test_other_bins_dtypes_and_schemes_as_torchao(name, arguments):
    assert_equal(*pair([draw(name), draw(name, 1) * 1.5], **arguments))


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), min_size=1, max_size=4),
    st.sampled_from([4, 16, 128]),
)
@settings(max_examples=12, deadline=None)
def test_any_values_as_torchao(data, bins):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(*pair([torch.tensor(x) for x in data], bins=bins, dtype=torch.int8))


def test_the_path_of_the_search_by_hand():
    histogram = torch.tensor([1.0, 0.0, 98.0, 1.0])
    path = list(quantile_path(histogram))
    assert path[0] in ((0, 2), (1, 3), (2, 3))
    assert all(b[0] >= a[0] and b[1] <= a[1] and a != b for a, b in itertools.pairwise(path))


@pytest.mark.parametrize(
    "arguments", [{"dtype": torch.int8, "eps": 2**-12}, {"bins": 37}, {"dtype": torch.int16}], ids=str
)
def test_observers_searched_together_as_torchao(arguments, monkeypatch):
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.MOST_BINS", 5 * arguments.get("bins", 2048))
    pairs = [pair([draw(name), draw(name, 1) * growth], **arguments) for name in NAMES for growth in (0.7, 1.6)]
    ours = [observer for observer, _ in pairs]
    search_together(ours)
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.greedy_bins", None)  # All was found.
    for mine, theirs in pairs:
        assert_equal(mine, theirs)


def test_observers_searched_together_are_those_that_can_be():
    empty, few, wide, seen = (HistogramObserver(dtype=torch.int8, **more) for more in ({}, {"quant_max": 7}, {}, {}))
    few(draw("laplace"))
    wide(torch.tensor([-3e38, 3e38]))
    seen(draw("normal"))
    search_together([empty, few, wide, seen])
    alone = HistogramObserver(dtype=torch.int8)
    alone(draw("normal"))
    assert alone.calculate_qparams() == seen.calculate_qparams()
    before = seen.calculate_qparams()
    seen(draw("normal") * 9)
    assert seen.calculate_qparams()[0] > 3 * before[0]
    with pytest.raises(CalibrationError, match="no data"):
        empty.calculate_qparams()
    with pytest.raises(NonFiniteError, match="too wide"):
        wide.calculate_qparams()


def test_only_those_are_searched_together_whose_range_nobody_replaced():
    class Mine(HistogramObserver):
        pass

    replaced, plain = HistogramObserver(dtype=torch.int8), HistogramObserver(dtype=torch.int8)
    replaced.chosen_range = lambda: (torch.tensor(-1.0), torch.tensor(1.0))
    assert histograms_in([replaced, plain, Mine(dtype=torch.int8), plain, None]) == [plain]


def test_the_search_takes_no_notice_of_the_default_device():
    observer = HistogramObserver(dtype=torch.int8)
    observer(draw("normal"))
    with torch.device("meta"):
        found = observer.chosen_range()
    assert found == observer.chosen_range()


def test_a_cell_error_by_hand():
    # Two bins of width 1 with one value each, two cells on them: twice the integral of x**2 from -1/2 to 1/2.
    assert cell_errors(Densities.of(torch.ones(1, 2), [1.0]), [(0, 1)], 2).tolist() == [pytest.approx(2 / 12)]


# -- values whose errors overflow float32 ------------------------------------------------------------------------------


def rounding_error(x, observer):
    scale, zero_point = (value.double() for value in observer.calculate_qparams())
    x = x.double()
    rounded = ((x / scale).round() + zero_point).clamp(observer.quant_min, observer.quant_max) - zero_point
    return (rounded * scale - x).norm().item()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tiny", "constant")])
@pytest.mark.parametrize("largest", [1e17, 1e20, 1e30, 1e36, 1.6e38])
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_large_values_are_no_worse_than_by_their_smallest_and_largest(name, largest, qscheme):
    x = draw(name)
    x = x / x.abs().max() * largest
    ours, whole = (kind(dtype=torch.int8, qscheme=qscheme) for kind in (HistogramObserver, MinMaxObserver))
    ours(x)
    whole(x)
    assert rounding_error(x, ours) <= 1.000001 * rounding_error(x, whole)


def test_large_values_as_torchao_until_its_errors_overflow():
    assert_equal(*pair([draw("normal") * 1e13], dtype=torch.int8))
    assert_equal(*pair([draw("outlier") * 1e9], dtype=torch.int8))
    ours, theirs = pair([draw("outlier") * 1e10], dtype=torch.int8)
    assert rounding_error(draw("outlier") * 1e10, ours) < 0.2 * rounding_error(draw("outlier") * 1e10, theirs)


def test_small_values_whose_errors_are_zero_in_float32():
    x = draw("relu") * 1e-20
    ours, whole = (kind(dtype=torch.int8, eps=1e-30) for kind in (HistogramObserver, MinMaxObserver))
    ours(x)
    whole(x)
    assert rounding_error(x, ours) <= rounding_error(x, whole)


def test_several_batches_of_large_values():
    x = draw("normal") * 1e36
    parts, whole = HistogramObserver(dtype=torch.int8), HistogramObserver(dtype=torch.int8)
    for part in (torch.full((3,), 2e36), x[:5000], x[5000:]):
        parts(part)
    whole(torch.cat([x, torch.full((3,), 2e36)]))
    assert parts.histogram.sum() == whole.histogram.sum()
    torch.testing.assert_close(parts.calculate_qparams()[0], whole.calculate_qparams()[0], rtol=0.05, atol=0)


# -- fewer integers than the dtype has ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_below_8_bits_no_range_of_bins_is_better(name, bits, qscheme):
    observer = HistogramObserver(64, torch.int8, qscheme, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)
    observer(draw(name))
    histogram, edges = observer.histogram.double()[None], observer.edges()[None]
    error = quantizing_error(observer, histogram, edges)
    low, high = (end.double().reshape(1, 1) for end in observer.chosen_range())
    pairs = torch.combinations(edges[0])
    if qscheme == torch.per_tensor_symmetric:
        widest = edges.abs().max()
        pairs = torch.stack([-widest * torch.arange(1, 129) / 128, widest * torch.arange(1, 129) / 128], 1).double()
    best = error(pairs[None, :, 0], pairs[None, :, 1]).min().item()
    assert error(low, high).item() <= 1.05 * best


def test_below_8_bits_better_than_torchao():
    x = draw("laplace")
    ours, theirs = pair([x], dtype=torch.int8, quant_min=-8, quant_max=7)
    errors = [
        (torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -8, 7) - x).square().mean()
        for scale, zero_point in (ours.calculate_qparams(), theirs.calculate_qparams())
    ]
    assert errors[0] < 0.5 * errors[1]


@given(
    st.lists(st.integers(0, 100), min_size=2, max_size=12).filter(any),
    st.floats(-3, 3),
    st.floats(0.05, 2),
    st.integers(2, 9),
)
@settings(max_examples=60, deadline=None)
def test_square_error_is_the_integral(counts, first, step, levels):
    histogram = torch.tensor([counts], dtype=torch.float64)
    edges = torch.linspace(-2, 3, len(counts) + 1, dtype=torch.float64)[None]
    found = square_error(histogram, edges, torch.tensor([[first]]).double(), torch.tensor([[step]]).double(), levels)
    parts = 4000
    middles = (torch.arange(parts * len(counts)).double() + 0.5) / (parts * len(counts)) * 5 - 2
    rounded = first + ((middles - first) / step).round().clamp(0, levels - 1) * step
    weights = histogram[0].repeat_interleave(parts) / parts
    assert found.item() == pytest.approx((weights * (middles - rounded).square()).sum().item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_mse_is_not_above_minmax_histogram_and_percentile(name):
    x = draw(name)

    def error(kind):
        observer = kind(dtype=torch.int8)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -128, 127)
        return (rounded - x).square().mean().item()

    others = min(error(kind) for kind in (HistogramObserver, PercentileObserver))
    assert error(MSEObserver) <= 1.1 * others + 1e-30


# -- percentile and mean squared error ---------------------------------------------------------------------------------


def observed(constructor, data, **arguments):
    observer = constructor(**arguments)
    for x in data:
        observer(x)
    return observer


def test_percentile_of_even_values():
    x = torch.linspace(-1, 3, 100001)
    low, high = observed(PercentileObserver, [x], percentile=90.0).chosen_range()
    assert low.item() == pytest.approx(-0.8, abs=2e-3)
    assert high.item() == pytest.approx(2.8, abs=2e-3)
    symmetric = torch.per_tensor_symmetric
    low, high = observed(PercentileObserver, [x], percentile=90.0, dtype=torch.int8, qscheme=symmetric).chosen_range()
    assert high.item() == -low.item() == pytest.approx(2.6, abs=2e-3)


def test_percentile_100_is_the_whole_range():
    x = draw("normal")
    low, high = observed(PercentileObserver, [x], percentile=100).chosen_range()
    assert (low, high) == tuple(torch.aminmax(x))
    assert observed(PercentileObserver, [torch.full((5,), -2.0)]).chosen_range() == (torch.tensor(-2.0),) * 2


def test_percentile_leaves_an_outlier_out():
    x = torch.cat([torch.randn(100000, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])])
    assert observed(PercentileObserver, [x]).chosen_range()[1] < 6


def mean_squared_error(x, observer):
    scale, zero_point = observer.calculate_qparams()
    limits = observer.quant_min, observer.quant_max
    if scale.numel() == 1:
        q = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), *limits)
    else:
        q = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), observer.ch_axis, *limits)
    return (q - x).square().mean().item()


@pytest.mark.parametrize("qscheme", [torch.per_channel_symmetric, torch.per_channel_affine])
@pytest.mark.parametrize("ch_axis", [0, 1])
def test_per_channel_mse_is_near_the_best_of_each_channel(qscheme, ch_axis):
    weight = torch.randn(6, 5, 300, generator=torch.Generator().manual_seed(1)).pow(3)
    arguments = {"dtype": torch.int8, "quant_min": -8, "quant_max": 7, "qscheme": qscheme, "ch_axis": ch_axis}
    found = observed(PerChannelMSEObserver, [weight], **arguments)
    plain = observed(PerChannelMinMaxObserver, [weight], **arguments)
    best = float("inf")
    for share in torch.linspace(0.1, 1, 40):
        shrunk = observed(PerChannelMinMaxObserver, [weight * share], **arguments)
        best = min(best, mean_squared_error(weight, shrunk))
    assert mean_squared_error(weight, found) < 0.9 * mean_squared_error(weight, plain)
    assert mean_squared_error(weight, found) < 1.02 * best


def test_per_channel_mse_of_parts_is_that_of_the_whole():
    weight = torch.randn(8, 4000, generator=torch.Generator().manual_seed(2))
    weight[3] = 0.5
    weight[4] = 0
    arguments = {"dtype": torch.int8, "quant_min": -8, "quant_max": 7, "qscheme": torch.per_channel_symmetric}
    whole = observed(PerChannelMSEObserver, [weight], **arguments)
    parts = observed(PerChannelMSEObserver, weight.split(1000, dim=1), **arguments)
    assert torch.equal(parts.min_val, whole.min_val)
    assert parts.histogram.sum(1).tolist() == pytest.approx([4000.0] * 8)
    torch.testing.assert_close(parts.calculate_qparams()[0], whole.calculate_qparams()[0], rtol=0.05, atol=0)


# -- the histogram itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 2, 5, 300, 2048, 8190, 8191])
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_histc(name, bins, monkeypatch):
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.PIECE", 1001)
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.LARGE", 1)
    x = draw(name)
    low, high = x.min().item(), x.max().item()
    for wider in (0.0, 0.3):
        ends = (low - wider, high + wider)
        assert torch.equal(count(x, bins, *ends), torch.histc(x, bins, *ends))


@pytest.mark.parametrize("bins", [7, 256, 2048])
@pytest.mark.parametrize("exponent", [-149, -146, -140, -130, -127, -126, -120, -115, 100, 115])
def test_counts_of_the_smallest_and_largest_numbers_are_those_of_histc(exponent, bins, monkeypatch):
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.LARGE", 1)
    for x in (draw("uniform").abs() * 2.0**exponent, draw("uniform") * 2.0**exponent):
        ends = x.min().item(), x.max().item()
        if ends[0] < ends[1]:
            assert torch.equal(count(x, bins, *ends), torch.histc(x, bins, *ends))


@pytest.mark.parametrize("bins", [7, 256, 2048])
@pytest.mark.parametrize("exponent", [116, 117, 120, 126])
@pytest.mark.parametrize("large", [1, 10**9])
def test_counts_where_histc_overflows_are_those_of_the_same_numbers_made_smaller(exponent, bins, large, monkeypatch):
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.LARGE", large)
    for x in (draw("uniform").abs(), draw("uniform")):
        ends = x.min().item(), x.max().item()
        share = 2.0**exponent
        counts = count(x * share, bins, ends[0] * share, ends[1] * share)
        assert torch.equal(counts, torch.histc(x, bins, *ends))


@pytest.mark.parametrize("size", [100, 40_000])
def test_a_mask_of_the_smallest_float_is_counted_alike_at_every_size(size):
    x = torch.randn(size)
    x[::2] = torch.finfo(torch.float32).min
    counts = count(x, 2048, x.min().item(), x.max().item())
    assert (counts[0].item(), counts[-1].item()) == (size / 2, size / 2)


def test_counts_of_neighbouring_numbers_are_those_of_histc(monkeypatch):
    """The bin of a value is found by division, and rounding decides at the edges of bins."""
    monkeypatch.setattr("zeropoint.numerics.observers.histogram.LARGE", 1)
    edges = torch.linspace(-1.7, 2.9, 2049)
    x = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0))]).clamp(-1.7, 2.9)
    ends = x.min().item(), x.max().item()
    for bins in (7, 255, 2048):
        assert torch.equal(count(x, bins, *ends), torch.histc(x, bins, *ends))


def test_moving_keeps_the_counts():
    histogram = torch.rand(64, generator=torch.Generator().manual_seed(0))
    wider = moved(histogram, (-1.0, 1.0), (-1.5, 4.0))
    assert wider.sum().item() == pytest.approx(histogram.sum().item(), rel=1e-5)
    assert moved(torch.ones(4), (1.0, 1.0), (0.0, 2.0)).tolist() == [0, 0, 4, 0]


def test_qparams_are_kept_until_statistics_change():
    observer = HistogramObserver()
    observer(draw("normal"))
    scale, _ = observer.calculate_qparams()
    scale.zero_()
    kept = observer._qparams
    assert observer.calculate_qparams()[0].item() > 0
    assert observer._qparams is kept
    observer(draw("normal") * 3)
    assert observer.calculate_qparams()[0].item() > 0.05
    with torch.no_grad():
        observer.max_val.mul_(2)
    observer.calculate_qparams()
    assert observer._qparams is not kept


def test_a_saved_histogram_of_other_bins_loads():
    saved, observer = HistogramObserver(bins=64), HistogramObserver()
    saved(draw("normal"))
    observer.load_state_dict(saved.state_dict())
    assert observer.bins == 64
    assert torch.equal(observer.calculate_qparams()[0], saved.calculate_qparams()[0])


def test_the_search_is_fast():
    """Bounds far above the measured 0.5 to 5 ms: this fails when a loop over steps or bins comes back."""
    for name, largest in (("few", 1), ("integers", 1), ("constant", 1), ("normal", 1), ("normal", 1e15)):
        for quant_min in (-128, -8):
            observer = HistogramObserver(dtype=torch.int8, quant_min=quant_min, quant_max=-quant_min - 1)
            observer(draw(name) * largest)
            observer.calculate_qparams()
            times = []
            for _ in range(5):
                observer._qparams = None
                start = time.perf_counter()
                observer.calculate_qparams()
                times.append(time.perf_counter() - start)
            assert min(times) < 0.03
