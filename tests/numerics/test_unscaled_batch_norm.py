"""Batch norm of the quotient in one step: the values, gradients and statistics of the steps in float64."""

import pytest
import torch
from torch import nn

from zeropoint.numerics.unscaled_batch_norm import unscaled_batch_norm

SHAPES = [(8, 3), (6, 3, 5), (4, 3, 5, 4), (3, 3, 2, 3, 2)]


def tensors(shape, dtype=torch.float32, *, bias=True, affine=True, seed=0):
    """Returns ``y``, scale, bias, weight, shift; scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def vector(low, high):
        return torch.rand(shape[1], generator=generator) * (high - low) + low

    y = torch.randn(shape, generator=generator) * 3 + 2
    scale = vector(0.2, 2) * torch.tensor([1.0, -1.0, 1.0])
    found = [y, scale, vector(-1, 1) if bias else None, *((vector(0.5, 2), vector(-1, 1)) if affine else (None, None))]
    return [None if each is None else each.to(dtype).requires_grad_() for each in found]


def by_steps(y, scale, bias, weight, shift, mean, variance, momentum, eps):
    view = [1, -1, *[1] * (y.dim() - 2)]
    quotient = y / scale.reshape(view) + (0 if bias is None else bias.reshape(view))
    return nn.functional.batch_norm(quotient, mean, variance, weight, shift, True, momentum, eps)


def run(function, inputs, statistics, momentum=0.3, eps=0.05):
    """Returns the value and the gradients of all inputs; eps is large, so that its part of a gradient is seen."""
    result = function(*inputs, *statistics, momentum, eps)
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).reshape(result.shape).sin()
    some = [each for each in inputs if each is not None]
    gradients = torch.autograd.grad((result * weights.to(result)).sum(), some, allow_unused=True)
    return result.detach(), gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False)])
def test_values_gradients_and_statistics_are_those_of_the_steps(shape, bias, affine):
    ours, exact = (
        (torch.full((3,), 0.5, dtype=d), torch.full((3,), 2.0, dtype=d)) for d in (torch.float32, torch.float64)
    )
    result, gradients = run(unscaled_batch_norm, tensors(shape, bias=bias, affine=affine), ours)
    expected, oracle = run(by_steps, tensors(shape, torch.float64, bias=bias, affine=affine), exact)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, atol=1e-5)
    for found, wanted in zip(gradients, oracle, strict=True):
        assert torch.allclose(found.double(), wanted, atol=2e-5 * max(1, wanted.abs().max()))
    for found, wanted in zip(ours, exact, strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-6)


def test_the_gradient_of_the_scale_is_not_left_out():
    statistics = torch.zeros(3), torch.ones(3)
    _, gradients = run(unscaled_batch_norm, tensors((4, 3, 5, 4)), statistics)
    assert (gradients[1].abs() > 1e-3).all()


def test_a_channel_of_one_value_is_its_shift():
    y, scale, bias, weight, shift = tensors((4, 3, 2, 2))
    with torch.no_grad():
        y[:, 1] = 0.25
    result = unscaled_batch_norm(y, scale, bias, weight, shift, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
    expected = by_steps(y, scale, bias, weight, shift, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.0])
def test_scales_whose_squares_leave_float32(scale):
    y, _, bias, weight, shift = tensors((4, 3, 2, 2))
    scales = torch.full((3,), scale)
    y = (y * (scale if scale else 1)).detach().requires_grad_()
    ours, steps = ((torch.zeros(3), torch.ones(3)) for _ in range(2))
    result = unscaled_batch_norm(y, scales, bias, weight, shift, *ours, 0.1, 1e-5)
    expected = by_steps(y, scales, bias, weight, shift, *steps, 0.1, 1e-5)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.allclose(result, expected, atol=1e-5, equal_nan=True)
    assert torch.equal(ours[0], steps[0]) or bool(steps[0].isnan().any())


def test_other_dtypes_and_layouts():
    exact = tensors((4, 3, 5, 4), torch.float64)
    statistics = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    result = unscaled_batch_norm(*exact, *statistics, 0.1, 1e-5)
    assert result.dtype == torch.float64
    y, *others = tensors((4, 3, 5, 4))
    y = y.detach().to(memory_format=torch.channels_last).requires_grad_()
    found = unscaled_batch_norm(y, *others, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), result, atol=1e-5)


def test_one_value_for_each_channel_is_its_shift():
    inputs = tensors((1, 3))
    found = unscaled_batch_norm(*inputs, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
    assert torch.allclose(found, inputs[4].expand(1, 3), atol=1e-3)


def test_gradients_of_gradients():
    def second(function, dtype):
        y, scale, bias, weight, shift = tensors((4, 3, 5), dtype)
        statistics = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        result = function(y, scale, bias, weight, shift, *statistics, 0.1, 0.05)
        first = torch.autograd.grad(result.pow(3).sum(), (y, scale, weight), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), (y, scale, weight))

    for found, wanted in zip(second(unscaled_batch_norm, torch.float32), second(by_steps, torch.float64), strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-4 * wanted.abs().max())


def test_it_keeps_one_large_tensor_where_the_steps_keep_two():
    def kept(function):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        inputs = tensors((64, 3, 8, 8))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function(*inputs, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
        del result
        return sum(size == inputs[0].numel() for size in sizes.values())

    assert kept(unscaled_batch_norm) == 1
    assert kept(by_steps) == 2
