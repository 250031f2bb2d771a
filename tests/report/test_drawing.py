"""The drawing of a graph: boxes that do not touch, edges from above to below, and two colours."""

from __future__ import annotations

import itertools
import re
import time

import torch
from torch import nn

import zeropoint as zp
from tests import models
from tests.models import Applied, export
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.report.page.drawing import HEIGHT, WIDTH, drawing_of

INT8 = get_symmetric_quantization_config(is_per_channel=True)


@torch.no_grad()
def converted(module: nn.Module, *inputs: torch.Tensor):
    prepared = zp.prepare_pt2e(export(module.eval(), *inputs), XNNPACKQuantizer().set_global(INT8))
    prepared(*inputs)
    return zp.convert_pt2e(prepared)


def check(drawing) -> None:
    for a, b in itertools.combinations(drawing.boxes, 2):
        assert abs(a.x - b.x) >= WIDTH or abs(a.y - b.y) >= HEIGHT, f"{a.name} lies on {b.name}"
    for box in drawing.boxes:
        assert 0 <= box.x <= drawing.width - WIDTH
        assert 0 <= box.y <= drawing.height - HEIGHT
    for path in drawing.edges:
        numbers = [float(number) for number in re.findall(r"-?\d+", path)]
        assert numbers[1] < numbers[-1], "an edge leads upwards"
        assert all(0 <= x <= drawing.width for x in numbers[::2])


def test_kinds_and_edges():
    module, inputs = models.net()
    drawing = drawing_of(converted(nn.Sequential(module, nn.GELU()), *inputs))
    check(drawing)
    kinds = {box.label: box.kind for box in drawing.boxes}
    assert kinds == {
        "input_1": "end", "conv2d": "integer", "relu": "integer", "add": "integer", "mean": "integer",
        "view": "integer", "linear": "integer", "gelu": "float", "output": "end",
    }  # fmt: skip
    assert len(drawing.boxes) == 11
    assert len(drawing.edges) == 11  # One to each box but the input, and a second one to the addition.
    assert next(box.place for box in drawing.boxes if box.name == "conv2d") == "0.blocks.0.conv"


def test_branches_lie_side_by_side():
    def forward(m, x):
        parts = [layer(x) for layer in m.layers]
        return torch.cat(parts, 1), x.sum()

    module = Applied(forward, layers=nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(7)))
    drawing = drawing_of(converted(module, torch.randn(1, 3, 4, 4)))
    check(drawing)
    assert len({box.y for box in drawing.boxes if box.label == "conv2d"}) == 1


def test_a_graph_of_hundreds_of_operators():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(150))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).relu()
            return x

    model = converted(Deep(), torch.randn(2, 4))
    start = time.perf_counter()
    drawing = drawing_of(model)
    assert time.perf_counter() - start < 5
    check(drawing)
    assert len(drawing.boxes) == 452
