"""Equalization: the function stays the same, the channels of activations fill their range."""

import pytest
import torch
from torch import nn

from zeropoint.algorithms.equalize import FEW_VALUES, SMALLEST_FACTOR, STRENGTH, equalize, factors, find_pairs
from zeropoint.algorithms.watch import watch
from zeropoint.graph.attributes import tensors_of
from zeropoint.graph.bind import argument


def uneven(layer: nn.Module, axis: int = 0) -> nn.Module:
    """Gives the output channels of a layer very different sizes."""
    sizes = torch.logspace(-2, 0, layer.weight.shape[axis])
    with torch.no_grad():
        layer.weight.mul_(sizes.reshape([-1 if i == axis else 1 for i in range(layer.weight.dim())]))
        if layer.bias is not None:
            layer.bias.mul_(sizes)
    return layer


def conv(*args, **kwargs):
    return uneven(nn.Conv2d(*args, **kwargs))


PAIRS = {
    "conv leaky conv": lambda: (nn.Sequential(conv(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 3)), (2, 3, 9, 9)),
    "no bias": lambda: (nn.Sequential(conv(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)), (2, 3, 9, 9)),
    "depthwise": lambda: (nn.Sequential(conv(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), (2, 3, 9, 9)),
    "grouped": lambda: (nn.Sequential(conv(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)), (2, 4, 9, 9)),
    "pool and pad": lambda: (
        nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)),
        (2, 3, 10, 10),
    ),
    "transposed second": lambda: (nn.Sequential(conv(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, 2)), (2, 3, 9, 9)),
    "transposed first, grouped": lambda: (
        nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (2, 4, 6, 6),
    ),
    "transposed second, grouped": lambda: (
        nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)),
        (2, 3, 9, 9),
    ),
    "linear": lambda: (nn.Sequential(uneven(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)), (4, 5)),
    "linear on sequences": lambda: (nn.Sequential(uneven(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)), (2, 7, 5)),
    "one sample, no batch": lambda: (nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 9, 9)),
    "one sample, pool and pad": lambda: (
        nn.Sequential(conv(3, 8, 3), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.ConvTranspose2d(8, 4, 2, 2)),
        (3, 10, 10),
    ),
    "conv1d": lambda: (nn.Sequential(uneven(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 3)), (2, 3, 20)),
}


def exported(name):
    torch.manual_seed(0)
    module, shape = PAIRS[name]()
    x = torch.randn(shape)
    return torch.export.export(module.eval(), (x,)).module(), module, (x,)


def used(graph, inputs, node):
    """Returns the share of the tensor's largest value that each channel reaches."""
    found = []
    watch(graph, [inputs], [node], lambda _, value: found.append(value))
    value = found[0]
    axis = -1 if "linear" in node.name else value.dim() - 3 if "2d" in node.name else 1
    largest = value.abs().movedim(axis, 0).flatten(1).amax(1)
    return largest / largest.max()


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_stays_the_same(name):
    graph, module, inputs = exported(name)
    expected = graph(*inputs)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    first = find_pairs(graph)[0].first
    share_before = used(graph, inputs, first)
    assert len(equalize(graph, [inputs])) == 1
    torch.testing.assert_close(graph(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert used(graph, inputs, first).min() > share_before.min()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_factors():
    low, high = torch.tensor([-1.0, -0.01, 0.0]), torch.tensor([4.0, 0.5, 1e-9])
    expected = [1.0, (0.5 / 4) ** STRENGTH, SMALLEST_FACTOR]
    torch.testing.assert_close(factors(low, high, 10**9), torch.tensor(expected))
    few = factors(low, high, FEW_VALUES)
    torch.testing.assert_close(few[1], torch.tensor((0.5 / 4) ** (STRENGTH / 2)))
    assert factors(low, high, 1).min() > 0.9


class Residual(nn.Module):
    """The first layer is read twice: it has no only neighbour."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.second(torch.relu(y)) + y


class Reused(nn.Module):
    """One layer called twice: its weight serves two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Between(nn.Module):
    """Two linear layers and what comes between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.second = nn.Linear(8, 8), between, nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class PadsChannels(nn.Module):
    """Channels of zeros come in between: the second layer reads more than the first returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.second(nn.functional.pad(self.first(x), (0, 0, 0, 0, 0, 2)))


NOT_HOMOGENEOUS = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
OTHER_AXIS = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Residual(), (1, 4, 6, 6)),
        (Reused(), (2, 4)),
        (NOT_HOMOGENEOUS, (1, 4, 6, 6)),
        (OTHER_AXIS, (1, 4, 6, 6)),
        (PadsChannels(), (1, 4, 6, 6)),
        (Between(nn.MaxPool1d(3, 1, 1)), (2, 5, 8)),
        (Between(nn.AvgPool2d(3, 1, 1)), (2, 5, 8)),
        (Between(nn.ConstantPad1d((1, -1), 0.0)), (2, 5, 8)),
    ],
)
def test_what_is_no_pair(module, shape):
    graph = torch.export.export(module.eval(), (torch.randn(shape),)).module()
    assert find_pairs(graph) == []


def test_tied_weights_stay_tied():
    inputs = (torch.randn(2, 4),)
    graph = torch.export.export(Tied().eval(), inputs).module()
    expected, before = graph(*inputs), tensors_of(graph)["first.weight"].detach().clone()
    equalize(graph, [inputs])
    tensors = tensors_of(graph)
    assert tensors["first.weight"] is tensors["second.weight"]
    assert torch.equal(tensors["first.weight"], before)
    weights = [argument(node, "weight") for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [tensors[weight.target] is tensors["first.weight"] for weight in weights] == [True, True]
    torch.testing.assert_close(graph(*inputs), expected)
