"""``summary``: a line for each integer operator, against what the graph and the weights say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import zeropoint as zp
from tests import models
from tests.models import Applied, export
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CaptureError, GraphError

INT8 = get_symmetric_quantization_config(is_per_channel=True)
X = (torch.rand(2, 3, 8, 8),)  # From 0 on: the zero point is -128, and written.


def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = F.relu(m.norm(m.first(x)))
    joined = torch.cat([m.second(F.pad(first, (1, 1, 1, 1))), first * 0.5], 1)
    return joined.flatten(1), joined.softmax(-1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Applied(forward, first=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), second=nn.Conv2d(8, 8, 3)).eval()


@torch.no_grad()
def converted(module: nn.Module, *batches: tuple[Any, ...], config=INT8, **convert: bool) -> GraphModule:
    prepared = zp.prepare_pt2e(export(module, *batches[0]), XNNPACKQuantizer().set_global(config))
    for inputs in batches:
        prepared(*inputs)
    return zp.convert_pt2e(prepared, **convert)


def cells(model: GraphModule) -> dict[str, dict[str, str]]:
    """Returns the cells of the table by the name of the operator, and the totals as ``""``."""
    lines = zp.summary(model).splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", lines[0])]
    ends = [*starts[1:], None]
    names = [lines[0][a:b].strip() for a, b in zip(starts, ends, strict=True)]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines[1:-2]]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows} | {"": {"totals": " | ".join(lines[-2:])}}


def test_lines():
    model = converted(net(), X)
    table = cells(model)
    assert [(row["operator"], row["module"]) for name, row in table.items() if name] == [
        ("conv2d+relu", "first"), ("pad+conv2d", "second"), ("mul", ""), ("cat", ""), ("flatten", ""),
    ]  # fmt: skip
    assert [row["weight bytes"] for name, row in table.items() if name] == ["216", "576", "1", "", ""]
    assert table["conv2d_1"]["inputs"] == table["conv2d"]["output"]
    assert table["flatten"]["output"] == table["cat"]["output"] == "same"
    assert table["cat"]["inputs"] == f"2 x {table['conv2d_1']['output']}"
    assert "5 integer operators, 1 in float" in table[""]["totals"]


def test_numbers_are_those_of_the_graph():
    model = converted(net(), X)
    table = cells(model)
    quantize = model.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    _, scale, zero_point = quantize[0].args[:3]
    assert table["conv2d"]["inputs"] == f"int8 {scale:.4g} zp {zero_point}"
    weight = next(n.args[1] for n in model.graph.nodes if n.name == "conv2d")
    scales = getattr(model, weight.args[1].target)
    assert table["conv2d"]["weight"] == f"int8 per channel {float(scales.min()):.4g}..{float(scales.max()):.4g}"
    size = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
    assert f"{size:,} bytes of tensors" in table[""]["totals"]


def test_fewer_bits_at_run_time():
    module, inputs = models.mlp()
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, weight_qmin=-8, weight_qmax=7)
    row = cells(converted(module, inputs, config=config))["linear"]
    assert (row["inputs"], row["output"]) == ("int8 at run time", "int8 at run time")
    assert re.fullmatch(r"int8 -8\.\.7 per channel \S+", row["weight"])


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
def test_a_weight_that_steps_share_is_counted_once():
    module = Applied(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(4, 6)).eval()
    shown = [
        row["weight bytes"] for row in cells(converted(module, (torch.randn(3, 2, 4),))).values() if row.get("weight")
    ]
    assert shown.count("144") == 1
    assert "144 shared" in shown


def test_bodies_of_control_flow():
    def branches(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: m.layer(x), lambda x: m.layer(x) * 2, (x,))

    x = torch.rand(2, 8)
    text = zp.summary(converted(Applied(branches, layer=nn.Linear(8, 4)).eval(), (x,), (-x,)))
    assert len(re.findall(r"linear +\S* *linear +int8 .* int8 per channel .* int8 .* 32", text)) == 2


@pytest.mark.filterwarnings("ignore:`.*treespec:FutureWarning", "ignore:`.*TreeSpec:FutureWarning")
def test_a_model_that_another_package_converted():
    module, inputs = models.conv_relu()
    theirs = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = zp.for_torchao(XNNPACKQuantizer().set_global(INT8))
    prepared = theirs.prepare_pt2e(export(module, *inputs), quantizer)
    prepared(*inputs)
    table = cells(theirs.convert_pt2e(prepared))
    assert table["conv2d"]["operator"] == "conv2d+relu"
    assert table["conv2d"]["weight bytes"] == "54"


def test_nothing_is_integer():
    module, inputs = models.mlp()
    model = zp.convert_pt2e(zp.prepare_pt2e(export(module, *inputs), zp.ComposableQuantizer([])))
    assert zp.summary(model).startswith("no operator is integer\n0 integer operators, ")


WRONG: tuple[tuple[Callable[[], Any], type[Exception], str], ...] = (
    (
        lambda: zp.prepare_pt2e(export(net(), *X), XNNPACKQuantizer().set_global(INT8)),
        GraphError,
        "has observers|still",
    ),
    (lambda: converted(net(), X, use_reference_representation=True), GraphError, "reference representation"),
    (net, CaptureError, "not an exported graph module"),
)


@pytest.mark.parametrize(("make", "error", "words"), WRONG)
def test_other_models_are_refused(make: Callable[[], Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        zp.summary(make())
