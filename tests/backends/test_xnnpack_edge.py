"""What is repaired where composite operators are decomposed already; each is wrong, or does not load, without."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.infra.partitioner import Partition

from tests.backends.q_dq import Graph, Layer, exported, fake
from tests.models import export
from zeropoint import convert_pt2e, prepare_pt2e
from zeropoint.backends.xnnpack import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
    lower,
    lower_float,
    lower_program,
)
from zeropoint.core.errors import LoweringError, RuntimeFailure
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.child import run_in_child

lower_module = importlib.import_module("zeropoint.backends.xnnpack.lower")
PARTITION = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
OUT, PICTURE = 0.06, (2, 4, 6, 7)


def conv() -> Layer:
    torch.manual_seed(0)
    return Layer((6, 4, 3, 3), F.conv2d)


def after_conv(function: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    return Graph(lambda layer, x: function(fake(layer(fake(x)), OUT)), conv())


def padded_twice(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = fake(first(F.pad(fake(x), (1, 2, 1, 2))), OUT)
    return fake(second(F.pad(y, (1, 2, 1, 2))), 0.2)


def same() -> Layer:
    return Layer((4, 4, 4, 4), lambda x, weight, bias: F.conv2d(x, weight, bias, padding="same"))


norm = nn.RMSNorm(5)
REPAIRED = {
    "softplus": lambda: after_conv(F.softplus),
    "mish": lambda: after_conv(F.mish),
    "rms_norm": lambda: after_conv(norm),
    "rms_norm over channels": lambda: after_conv(lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (6,))),
    "unfold": lambda: after_conv(lambda x: F.unfold(x, 2)),
    "unfold with padding": lambda: after_conv(lambda x: F.unfold(x, 2, padding=1)),
    "padding of its own and before": lambda: Graph(padded_twice, same(), same()),
    "clamp beyond 0": lambda: Graph(lambda m, x: fake(m(fake(x)).clamp(min=0.1), OUT), conv()),
    "clamp below 0": lambda: Graph(lambda m, x: torch.clamp_max(m(x), -0.1), nn.Conv2d(4, 6, 3)),
    "padding that cuts": lambda: after_conv(lambda x: F.relu(F.pad(x, (0, -2, 1, -1), value=0.5))),
    "average that counts padding": lambda: after_conv(lambda x: F.avg_pool2d(x, 2, 1, 1)),
    "average without a stride": lambda: after_conv(lambda x: F.avg_pool2d(x, 2, count_include_pad=False)),
    "softmax": lambda: after_conv(lambda x: torch.softmax(x, -1)),
    "softmax after arithmetic": lambda: Graph(lambda m, x: torch.softmax(F.relu(m(x)) * 2 + 1, 3), nn.Conv2d(4, 6, 3)),
}


def agreement(module: nn.Module, x: torch.Tensor) -> float:
    model = exported(module, x)
    with torch.no_grad():
        expected = model(x)
    ((actual,),) = run_in_child(lower(model, (x,)), [(x,)])
    return sqnr_db(expected, actual)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", REPAIRED)
def test_repaired(name: str):
    torch.manual_seed(0)
    assert agreement(REPAIRED[name](), torch.randn(PICTURE)) > 40


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", ["softplus", "rms_norm", "unfold", "softmax"])
def test_goes_wrong_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch):
    """Remove a repair when its case fails here."""
    monkeypatch.setattr(lower_module.edge, "repair_program", lambda model: None)
    try:
        found = agreement(REPAIRED[name](), torch.randn(PICTURE))
    except RuntimeFailure:
        return
    assert found < 30


def test_softmax_of_free_sizes():
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Softmax(-1)).eval()
    x, larger = torch.randn(PICTURE), torch.randn(3, 4, 9, 8)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    for free, other in ((sizes, larger), ({0: sizes[0]}, torch.randn(5, *PICTURE[1:]))):
        pte = lower_float(
            module, (x,), dynamic_shapes=({i: torch.export.Dim(f"d{i}", min=1, max=16) for i in free},)
        ).pte
        for inputs in (x, other):
            ((actual,),) = run_in_child(pte, [(inputs,)])
            assert sqnr_db(module(inputs).detach(), actual) > 100


def test_a_softmax_that_reads_no_picture_stays_as_it_is():
    x = torch.randn(2, 3, 4, 5)
    program = lower_float(Graph(lambda x: torch.softmax(torch.matmul(x, x.transpose(2, 3)), -1)).eval(), (x,))
    assert (program.delegates, program.outside) == (1, ())


def test_linear_quantized_at_run_time_after_a_convolution():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Sigmoid(), nn.Linear(5, 8)).eval()
    inputs = (torch.randn(PICTURE),)
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(export(module, *inputs), XNNPACKQuantizer().set_global(config))
    prepared(*inputs)
    model = convert_pt2e(prepared)
    ((actual,),) = run_in_child(lower(model, inputs), [inputs])
    assert sqnr_db(model(*inputs), actual) > 35


# -- pieces that depend on each other --------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer, what the delegate does not take, and the layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.cumsum(self.first(x), 1))


@pytest.fixture
def one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partitioner that puts all into one piece, which then depends on itself; not where each operator is one."""
    partitioner = importlib.import_module(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    ).XnnpackPartitioner
    original = partitioner.generate_partitions

    def generate(self: Any, program: torch.export.ExportedProgram) -> list[Partition]:
        if self.per_op_mode:
            return original(self, program)
        nodes = [node for match in self.get_matched_nodes_from_configs(program) for node in match]
        return [Partition(id=0, nodes=dict.fromkeys(nodes))]

    monkeypatch.setattr(partitioner, "generate_partitions", generate)


def test_pieces_that_depend_on_each_other_are_made_of_single_operators(one_piece: None):
    module, x = Twice().eval(), torch.randn(3, 8)
    program = lower_program(export(module, x), (x,))
    assert program.delegates == 2
    ((actual,),) = run_in_child(program.pte, [(x,)])
    assert sqnr_db(module(x).detach(), actual) > 100


def test_where_single_operators_do_not_help(one_piece: None, monkeypatch: pytest.MonkeyPatch):
    def overlap(self: Any, program: torch.export.ExportedProgram) -> list[Partition]:
        raise RuntimeError("per_op mode expects no overlaps")

    partitioner = importlib.import_module(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    ).XnnpackPartitioner
    monkeypatch.setattr(partitioner, "generate_per_op_partitions", overlap)
    x = torch.randn(3, 8)
    words = r"expects no overlaps\n  because of AssertionError: .* dependency cycles\. Where the message names an"
    with pytest.raises(LoweringError, match=words):
        lower_program(export(Twice().eval(), x), (x,))
