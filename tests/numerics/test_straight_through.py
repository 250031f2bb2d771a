"""Rounding with straight-through gradients: the bits of torch's kernels, in any layout, for any range."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zeropoint.numerics import straight_through
from zeropoint.numerics.straight_through import fake_quantize, learned_fake_quantize

RANGES = [(-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 1), (-32768, 32767), (-(2**31), 2**31 - 1)]


@pytest.fixture(autouse=True)
def _vectorized(monkeypatch):
    """Small tensors too are rounded by the operators that large ones are rounded by."""
    monkeypatch.setattr(straight_through, "FEW", 0)


def both(x, scale, zero_point, low, high, axis):
    """Returns result and gradient as torch's kernel and as we give them."""
    weight = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    found = []
    for ours in (False, True):
        leaf = x.detach().clone().requires_grad_()
        if ours:
            result = fake_quantize(leaf, scale, zero_point, low, high, axis)
        elif axis is None:
            result = torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, low, high)
        else:
            result = torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, axis, low, high)
        (result * weight).sum().backward()
        found.append((result.detach(), leaf.grad))
    return found


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limits=st.sampled_from(RANGES),
    scale=st.floats(2**-20, 4, width=32),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    axis=st.sampled_from([None, 0, 1, 2]),
)
def test_values_and_gradients_are_those_of_torch(limits, scale, share, seed, axis):
    low, high = limits
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(4, 3, 5, generator=generator) * min(300, high - low)
    x = torch.where(steps > 1, steps, steps.round() + 0.5) * scale  # Ties, exact ones where the scale is a power of 2.
    count = 1 if axis is None else x.shape[axis]
    scales = torch.full((count,), scale) * torch.linspace(1, 2, count)
    zero = round(low + share * (high - low))
    zero_points = torch.full((count,), min(zero, 2**31 - 65), dtype=torch.int32)
    if axis is not None and high - low > 1 and zero + 1 <= high:
        zero_points[-1] += 1
    (expected, gradient), (result, ours) = both(x, scales, zero_points, low, high, axis)
    assert torch.equal(result, expected)
    assert torch.equal(ours, gradient)


@pytest.mark.parametrize("arrange", [
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, ::2], lambda x: x.transpose(1, 3),
])  # fmt: skip
@pytest.mark.parametrize("axis", [None, 1])
def test_any_layout(arrange, axis):
    x = arrange(torch.randn(2, 4, 6, 5))
    count = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.full((count,), 0.01), torch.zeros(count, dtype=torch.int32)
    (expected, gradient), (result, ours) = both(x, scale, zero_point, -128, 127, axis)
    assert torch.equal(result, expected)
    assert torch.equal(ours, gradient)
    assert result.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(dtype):
    x = torch.randn(3, 4).to(dtype)
    scale, zero_point = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    (expected, gradient), (result, ours) = both(x, scale, zero_point, -8, 7, None)
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    assert torch.equal(ours, gradient)
    learned = learned_fake_quantize(x.requires_grad_(), scale.requires_grad_(), zero_point.float(), -8, 7)
    learned.sum().backward()
    assert learned.dtype == x.grad.dtype == dtype
    assert torch.allclose(learned, result, atol=0.002 if dtype == torch.float16 else 0.01)


def test_infinity_is_clamped():
    x = torch.tensor([float("inf"), float("-inf")])
    result = fake_quantize(x, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -128, 127)
    assert result.tolist() == [63.5, -64.0]


def test_the_input_is_not_changed():
    x = torch.randn(5)
    before = x.clone()
    with torch.no_grad():
        fake_quantize(x, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -8, 7)
    assert torch.equal(x, before)


def test_gradients_of_gradients_and_transforms():
    scale, zero_point = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)

    def loss(x):
        return fake_quantize(x, scale, zero_point, -8, 7).square().sum()

    x = torch.tensor([0.33, 5.0, -0.2], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert second.tolist() == [2.0, 0.0, 2.0]
    assert torch.equal(torch.func.grad(loss)(x.detach()), gradient.detach())


@pytest.mark.parametrize("few", [0, 100])
def test_few_elements_are_left_to_the_kernel(few, monkeypatch):
    monkeypatch.setattr(straight_through, "FEW", few)
    x = torch.randn(50, requires_grad=True)
    result = fake_quantize(x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), -8, 7)
    assert ("FakeQuantize" in type(result.grad_fn).__name__) == (few > 50)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scale=st.floats(2**-30, 2**20, width=32), limits=st.sampled_from(RANGES[:5]), share=st.floats(0, 1))
def test_the_gradient_ends_at_the_float_at_which_torch_ends_it(scale, limits, share):
    low, high = limits
    zero = round(low + share * (high - low))
    ends = torch.tensor([(low - zero - 0.5) * scale, (high - zero + 0.5) * scale])
    x = [ends]
    for direction in (-torch.inf, torch.inf):
        near = ends
        for _ in range(4):
            near = torch.nextafter(near, torch.tensor(direction))
            x.append(near)
    scales, zero_points = torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32)
    (expected, gradient), (result, ours) = both(torch.cat(x), scales, zero_points, low, high, None)
    assert torch.equal(result, expected)
    assert torch.equal(ours, gradient)


@pytest.mark.parametrize(("last", "keeps"), [(1.26, True), (1.27, True), (1.2751, False), (9.0, False)])
def test_where_the_range_is_known_to_fit_nothing_is_kept(last, keeps):
    x = torch.linspace(-1.28, last, 50).requires_grad_()
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    result = fake_quantize(x, scale, zero_point, -128, 127, known=(x.min().item(), x.max().item()))
    (expected, gradient), _ = both(x, scale, zero_point, -128, 127, None)
    assert torch.equal(result, expected)
    assert ("Unclamped" in type(result.grad_fn).__name__) == keeps
    (result * torch.linspace(-1, 1, 50)).sum().backward()
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-35, 1e35, float("inf")])
def test_scales_whose_reciprocals_leave_float32_are_left_to_the_kernel(scale):
    x = torch.tensor([0.0, 1.0, -1e30])
    scales, zero_points = torch.tensor([scale]), torch.tensor([1], dtype=torch.int32)
    result = fake_quantize(x, scales, zero_points, -128, 127, known=(-1e30, 1.0))
    expected = torch.fake_quantize_per_tensor_affine(x, scales, zero_points, -128, 127)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
