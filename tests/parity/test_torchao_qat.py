"""Training with torchao and with us, by one quantizer and on the same data: the same graph and the same numbers.

torchao takes a minute for each model that it prepares and converts, so the models here are the parts of one.
"""

import copy
from types import SimpleNamespace

import models
import pytest
import qat_quantizers
import quantizers
import torch
from quantizers import KEY
from torch import nn

from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import LAYERS, TRANSPOSED
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
from torchao.quantization.pt2e import quantizer as ao_quantizer  # noqa: E402

THEIRS = SimpleNamespace(**vars(pt2e), **{k: v for k, v in vars(ao_quantizer).items() if k not in vars(pt2e)})
aten = torch.ops.aten


def block(*layers):
    return nn.Sequential(*layers)


PARTS = {
    "conv1d": lambda: (block(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (4, 3, 7)),
    "conv2d": lambda: (block(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)), (4, 3, 6, 6)),
    "no_bias": lambda: (block(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6()), (4, 3, 6, 6)),
    "depthwise": lambda: (block(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU6()), (4, 4, 6, 6)),
    "transposed1d": lambda: (block(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (4, 3, 5)),
    "transposed2d": lambda: (block(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4)), (4, 3, 4, 4)),
    "derived_bias": lambda: (block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (4, 3, 6, 6)),
    "two": lambda: (
        block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)),
        (4, 3, 6, 6),
    ),
}  # fmt: skip


class Parts(nn.Module):
    """Every part with an input of its own."""

    def __init__(self):
        super().__init__()
        for name, build in PARTS.items():
            setattr(self, name, build()[0])

    def forward(self, *inputs):
        return tuple(getattr(self, name)(x) for name, x in zip(PARTS, inputs, strict=True))


def data(step):
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(build()[1], generator=generator) for build in PARTS.values())


def annotated(model, kind=THEIRS):
    """Transposed convolutions per tensor, since torchao takes the wrong axis; one bias as int32."""
    qat_quantizers.qat(model, kind)
    for node in model.graph.nodes:
        if node.target in LAYERS:
            wanted = node.meta[KEY].input_qspec_map
            if node.target in TRANSPOSED:
                wanted[argument(node, "weight")] = qat_quantizers.fake_weight_per_tensor(kind)
            if "derived_bias" in argument(node, "weight").target:
                wanted[argument(node, "bias")] = qat_quantizers.derived_bias(node, kind)


def trained(model, steps=3):
    """Trains by a plain loop; returns the outputs of each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    outputs = []
    for step in range(steps):
        results = model(*data(step))
        outputs.append([result.detach() for result in results])
        optimizer.zero_grad()
        sum(result.square().mean() for result in results).backward()
        optimizer.step()
    return outputs


@pytest.fixture(scope="module")
def both():
    """Returns what torchao and we make of the model: prepared, trained, converted."""
    torch.manual_seed(0)
    module = Parts()
    models.randomize_norms(module)
    model = torch.export.export(module.train(), data(0)).module()
    quantizer = quantizers.ByHand(annotated)
    found = []
    for prepare, convert in (
        (quantize_pt2e.prepare_qat_pt2e, quantize_pt2e.convert_pt2e),
        (prepare_qat_pt2e, convert_pt2e),
    ):
        prepared = prepare(copy.deepcopy(model), quantizer)
        graph = copy.deepcopy(prepared)
        outputs = trained(prepared)
        states = copy.deepcopy(prepared.state_dict())
        evaluated = copy.deepcopy(prepared)
        converted = convert(prepared)
        found.append(SimpleNamespace(**locals()))
    return found


def chain(model, norm):
    """Returns a batch norm with all that it depends on as a tree: operators, their numbers, parameters."""

    def tree(value):
        if not isinstance(value, torch.fx.Node):
            return value
        match value.op:
            case "get_attr":
                return value.target
            case "placeholder":
                return "input"
            case "call_module":
                kind = type(model.get_submodule(value.target)).__name__
                return kind.removesuffix("OrFakeQuantize"), tree(value.args[0])
            case _:
                read = [each for each in value.args if each is not None and not isinstance(each, bool)]
                return value.target, *map(tree, read)

    return tree(norm)


@pytest.mark.parametrize("index", range(len(PARTS) + 1))
def test_the_prepared_graphs_are_equal_operator_by_operator(both, index):
    theirs, ours = (
        sorted((chain(each.graph, node) for node in each.graph.graph.nodes if node.target in BATCH_NORMS), key=str)
        for each in both
    )
    assert theirs[index] == ours[index]
    assert str(ours[index]).count("'aten.div', overload='Tensor'") >= 2


@pytest.mark.parametrize("part", PARTS)
def test_training_gives_the_same_outputs(both, part):
    index = list(PARTS).index(part)
    for theirs, ours in zip(both[0].outputs, both[1].outputs, strict=True):
        assert torch.allclose(theirs[index], ours[index], atol=1e-5)


def test_trained_parameters_and_statistics_are_equal(both):
    theirs, ours = (each.states for each in both)
    for name in dict(Parts().named_parameters()) | dict(Parts().named_buffers()):
        assert torch.allclose(theirs[name].float(), ours[name].float(), atol=1e-5), name


@pytest.mark.parametrize("part", PARTS)
def test_converted_models_agree_within_one_integer(both, part):
    index = list(PARTS).index(part)
    results = [each.converted(*data(7))[index] for each in both]
    scales = [models.find(each.converted, "output").args[0][index].args[1] for each in both]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    assert (results[0] - results[1]).abs().max() <= scales[1] * 1.001
    integers = [(result / scale).round() for result, scale in zip(results, scales, strict=True)]
    assert (integers[0] != integers[1]).float().mean() < 0.05


def test_converted_graphs_have_the_same_operators(both):
    def operators(model):
        return sorted(str(node.target) for node in model.graph.nodes if node.op == "call_function")

    theirs, ours = (operators(each.converted) for each in both)
    assert [each for each in theirs if each != "aten.add_.Tensor"] == ours  # theirs count batches in one dimension
    assert "aten.batch_norm.default" not in ours


def test_ours_is_what_was_trained(both):
    model = qat_quantizers.in_eval_mode(both[1].evaluated)
    for name, prepared, converted in zip(PARTS, model(*data(7)), both[1].converted(*data(7)), strict=True):
        index = list(PARTS).index(name)
        scale = models.find(both[1].converted, "output").args[0][index].args[1]
        assert (prepared - converted).abs().max() <= scale * 1.001, name
