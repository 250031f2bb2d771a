"""Partitions one after the other: those that torchao finds, in its order, without trying all combinations."""

import functools
import operator
import random
import time

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zeropoint.core.errors import SpecError
from zeropoint.graph.partitions import (
    find_sequential_partitions,
    get_equivalent_types,
    update_equivalent_types_dict,
)

theirs = pytest.importorskip("torchao.quantization.pt2e.graph_utils")
SEQUENCES = (
    [nn.Conv2d],
    [nn.Conv2d, nn.BatchNorm2d],
    [nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
    [nn.Conv2d, torch.add],
    [nn.Conv2d, nn.BatchNorm2d, operator.add, nn.ReLU],
    [torch.add, nn.ReLU],
    [nn.ReLU, nn.Conv2d],
    [F.conv2d, F.relu],
    [nn.Linear, nn.ReLU],
    [nn.ReLU, "add"],
    [nn.Conv2d, nn.ReLU, torch.mul],
    [nn.Softmax, nn.ReLU],
    [],
)


class Random(nn.Module):
    """Layers, activations and sums that read any earlier value; modules may be called twice."""

    def __init__(self, seed):
        super().__init__()
        chosen = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps = []
        for _ in range(18):
            kind = chosen.choice((nn.Conv2d, nn.BatchNorm2d, nn.ReLU, "add", "iadd", "mul", "relu", "again"))
            reads = chosen.randrange(1000), chosen.randrange(1000)
            if kind == "again" and len(self.layers):
                self.steps.append((chosen.randrange(len(self.layers)), *reads))
            elif isinstance(kind, type):
                self.layers.append(
                    nn.Conv2d(2, 2, 1)
                    if kind is nn.Conv2d
                    else nn.BatchNorm2d(2)
                    if kind is nn.BatchNorm2d
                    else nn.ReLU()
                )
                self.steps.append((len(self.layers) - 1, *reads))
            else:
                self.steps.append((kind, *reads))

    def forward(self, x):
        values = [x]
        for step, first, second in self.steps:
            a, b = values[-1 - first % min(3, len(values))], values[second % len(values)]
            if isinstance(step, int):
                values.append(self.layers[step](a))
            elif step == "iadd":
                a = a.clone()
                a += b
                values.append(a)
            else:
                values.append({"add": torch.add, "mul": operator.mul}.get(step, lambda a, b: F.relu(a))(a, b))
        return values[-1]


@functools.cache
def graph(seed, strict):
    if seed is None:
        return models.exported(models.net, strict=strict)
    with torch.no_grad():
        return torch.export.export(Random(seed).eval(), (torch.randn(1, 2, 3, 3),), strict=strict).module()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", [None, *range(5)])
def test_torchao_finds_the_same(seed, strict):
    model = graph(seed, strict)
    for sequence in SEQUENCES:
        assert find_sequential_partitions(model, sequence) == theirs.find_sequential_partitions(model, sequence)


def test_something_is_found():
    counts = [
        len(find_sequential_partitions(graph(seed, True), [nn.Conv2d, nn.BatchNorm2d])) for seed in (None, 0, 1, 2)
    ]
    assert counts[0] == 2
    assert sum(counts[1:]) > 0


def test_nodes_are_filtered():
    model = graph(None, True)

    def in_first_block(node):
        return "blocks_0" in str(node.name) or "blocks.0" in str(node.meta.get("nn_module_stack", ""))

    sequence = [nn.Conv2d, nn.BatchNorm2d]
    found = find_sequential_partitions(model, sequence, filter_fn=in_first_block)
    assert found == theirs.find_sequential_partitions(model, sequence, filter_fn=in_first_block)


def test_functions_are_left_out_where_that_is_asked():
    x = torch.randn(1, 2, 3, 3)
    module = models.Applied(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(2, 2, 1))
    model = torch.export.export(module, (x,), strict=True).module()
    assert len(find_sequential_partitions(model, [nn.Conv2d, nn.ReLU])) == 1
    assert find_sequential_partitions(model, [nn.Conv2d, nn.ReLU], include_functional_equivalent=False) == []


@pytest.mark.parametrize("sequence", [[nn.ReLU, F.relu], [nn.Conv2d, nn.Conv2d], [torch.add, nn.ReLU, "add_"]])
def test_equivalent_types_are_refused(sequence):
    model = graph(None, True)
    with pytest.raises(ValueError, match="must be unique"):
        theirs.find_sequential_partitions(model, sequence)
    words = r"^find_sequential_partitions: .* and .* are equivalent, .*Look for a shorter sequence"
    with pytest.raises(SpecError, match=words):
        find_sequential_partitions(model, sequence)


@pytest.fixture
def table():
    before = get_equivalent_types()
    yield before
    update_equivalent_types_dict(before)


def test_the_table_is_torchaos(table):
    assert table == theirs.get_equivalent_types()
    with pytest.raises(SpecError, match="customized_equivalent_types is None"):
        update_equivalent_types_dict()


def test_types_are_added_to_the_table(table):
    model = graph(None, True)
    assert find_sequential_partitions(model, [nn.Identity, nn.ReLU]) == []
    update_equivalent_types_dict([*table, {nn.Identity, nn.BatchNorm2d}])
    assert get_equivalent_types()[-1] == {nn.Identity, nn.BatchNorm2d}
    assert len(find_sequential_partitions(model, [nn.Identity, nn.ReLU])) == 2


def test_long_sequences_in_large_graphs():
    block = [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()]
    model = models.export(nn.Sequential(*block * 60).eval(), torch.randn(1, 1, 2, 2))
    start = time.perf_counter()
    found = find_sequential_partitions(model, [nn.Conv2d, nn.BatchNorm2d, nn.ReLU])
    assert time.perf_counter() - start < 2
    assert len(found) == len(theirs.find_sequential_partitions(model, [nn.Conv2d, nn.BatchNorm2d])) > 0
