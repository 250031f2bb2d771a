"""Every combination of layer, dimension, bias, batch norm and activation, in each spelling that export gives.

With nothing rounded, training is the float network's: output, gradients and statistics. Rounded, the prepared model in
eval mode is the converted one.
"""

import copy
import itertools

import models
import pytest
import qat_quantizers as qat
import torch
from qat_quantizers import in_eval_mode
from quantizers import ByHand
from torch import nn

from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.numerics import ops
from zeropoint.numerics.fake_quantize import disable_fake_quant
from zeropoint.passes.qat_batch_norm import groups_in
from zeropoint.report.trained.check_convert import check_convert
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYERS = {
    "linear": (lambda **k: nn.Linear(3, 4, **k), 1),
    "conv1d": (lambda **k: nn.Conv1d(3, 4, 2, **k), 1),
    "conv2d": (lambda **k: nn.Conv2d(3, 4, 2, **k), 2),
    "conv3d": (lambda **k: nn.Conv3d(3, 4, 2, **k), 3),
    "transposed1d": (lambda **k: nn.ConvTranspose1d(3, 4, 2, 2, **k), 1),
    "transposed2d": (lambda **k: nn.ConvTranspose2d(3, 4, 2, 2, **k), 2),
    "transposed3d": (lambda **k: nn.ConvTranspose3d(3, 4, 2, 2, **k), 3),
}
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
CHOICES = list(itertools.product((True, False), (True, False), ACTIVATIONS))
SPELLINGS = {
    "as exported": lambda program: program,
    "functional": lambda program: program.run_decompositions({}),
    "decomposed": lambda program: program.run_decompositions(),
}


class Branches(nn.Module):
    """One branch for each choice of bias, affine and activation; returns what all give."""

    def __init__(self, kind):
        super().__init__()
        layer, dims = LAYERS[kind]
        branches = {}
        for bias, affine, activation in CHOICES:
            norm = NORMS[dims](4, affine=affine, eps=0.02, momentum=0.3)
            name = f"bias_{bias}_affine_{affine}_{activation}"
            branches[name] = nn.Sequential(layer(bias=bias), norm, ACTIVATIONS[activation]())
        self.branches = nn.ModuleDict(branches)

    def forward(self, x):
        return tuple(branch(x) for branch in self.branches.values())


def sizes(kind):
    return (6, 3) if kind == "linear" else (4, 3, *[3] * LAYERS[kind][1])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_combination(kind, spelling):
    torch.manual_seed(0)
    module, x = Branches(kind), torch.randn(sizes(kind))
    models.randomize_norms(module)
    program = SPELLINGS[spelling](torch.export.export(module.train(), (x,)))
    prepared = prepare_qat_pt2e(copy.deepcopy(program.module()), ByHand(qat.qat))
    assert len(groups_in(prepared.graph)) == len(CHOICES)
    check_floats(module, copy.deepcopy(prepared).apply(disable_fake_quant), x)
    train(prepared, x)
    converted = convert_pt2e(copy.deepcopy(prepared))
    assert not [node for node in converted.graph.nodes if node.target in BATCH_NORMS]
    check = check_convert(prepared, converted, (x,))
    assert check.agrees, check
    assert len(check.sites) >= 2 * len(CHOICES) + 1
    expected, found = in_eval_mode(prepared)(x), converted(x)
    scales = [read.args[1] for read in converted.graph.output_node().args[0]]
    assert all(read.target is ops.DEQUANTIZE_PER_TENSOR for read in converted.graph.output_node().args[0])
    for one, other, scale in zip(expected, found, scales, strict=True):
        assert (one - other).abs().max() <= 1.001 * scale


def check_floats(module, prepared, x):
    for model in (module, prepared):
        outputs = model(x)
        model.outputs_seen = outputs
        weights = [torch.linspace(-1, 1, each.numel()).reshape(each.shape) for each in outputs]
        sum((each * weight).mean() for each, weight in zip(outputs, weights, strict=True)).backward()
    for name, *both in zip(module.branches, module.outputs_seen, prepared.outputs_seen, strict=True):
        assert torch.allclose(*both, atol=1e-5, rtol=1e-5), name
    found = dict(prepared.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.allclose(found[name].grad, parameter.grad, atol=1e-5, rtol=1e-5), name
    state = prepared.state_dict()
    for name, buffer in module.named_buffers():
        assert torch.allclose(state[name], buffer, atol=1e-5, rtol=1e-5), name
    del module.outputs_seen


def train(prepared, x):
    optimizer = torch.optim.SGD(prepared.parameters(), 0.02)
    for step in range(2):
        torch.manual_seed(step)
        loss = sum(each.square().mean() for each in prepared(torch.randn_like(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
