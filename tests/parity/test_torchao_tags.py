"""What convert makes carries the ``quantization_tag`` of the operator that asked for it, as torchao's does."""

import collections

import pytest
import quantizers
import torch
from quantizers import annotate
from test_torchao_graphs import THEIRS
from torch import nn

from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.workflow import convert_pt2e, prepare_pt2e

quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
aten = torch.ops.aten
ACT, WEIGHT = quantizers.activation(THEIRS), quantizers.weight(THEIRS)
DYNAMIC = quantizers.activation(THEIRS, is_dynamic=True, observer_or_fake_quant_ctr=THEIRS.PlaceholderObserver)
TAG = "quantization_tag"
X = torch.randn(4, 8)


class Branches(nn.Module):
    """A linear layer with two readers, of which one is another linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden) + torch.tanh(hidden)


def both_sides(model):
    for node in linears(model):
        tag(node, {"input": ACT, "weight": WEIGHT}, ACT)


def inputs_only(model):
    for node in linears(model):
        tag(node, {"input": ACT, "weight": WEIGHT})


def output_only(model):
    tag(linears(model)[0], {"weight": WEIGHT}, ACT)
    tag(linears(model)[1], {"weight": WEIGHT}, None)


def one_input(model):
    tag(linears(model)[1], {"input": ACT, "weight": WEIGHT}, ACT)


def at_run_time(model):
    for node in linears(model):
        tag(node, {"input": DYNAMIC, "weight": WEIGHT})


def tagged_weights(model):
    both_sides(model)
    for node in linears(model):
        argument(node, "weight").meta[TAG] = node.meta[TAG]


def linears(model):
    return [node for node in model.graph.nodes if node.target is aten.linear.default]


def tag(node, inputs, output=None):
    annotate(node, inputs, output, THEIRS)
    node.meta[TAG] = f"tag of {node.name}"


def tags(model):
    """Returns how many operators of each kind, and constants read by them, carry each tag."""
    kept = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS, *ops.CHOOSE_QPARAMS_OPS)
    nodes = [node for node in model.graph.nodes if node.target in kept]
    frozen = [n for n in model.graph.nodes if n.op == "get_attr" and "_frozen_param" in n.target]
    return collections.Counter(
        [(str(node.target), node.meta.get(TAG)) for node in nodes] + [("constant", n.meta.get(TAG)) for n in frozen]
    )


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    "function", [both_sides, inputs_only, output_only, one_input, at_run_time, tagged_weights], ids=lambda f: f.__name__
)
def test_tags_are_torchaos(function, folded):
    quantizer, found = quantizers.ByHand(function), []
    for prepare, convert in (
        (quantize_pt2e.prepare_pt2e, quantize_pt2e.convert_pt2e),
        (prepare_pt2e, convert_pt2e),
    ):
        prepared = prepare(torch.export.export(Branches().eval(), (X,)).module(), quantizer)
        prepared(X)
        found.append(tags(convert(prepared, fold_quantize=folded)))
    assert found[1] == found[0]
    assert any(name is not None for _, name in found[0])
