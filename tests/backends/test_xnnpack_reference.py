"""Every row of the XNNPACK table in the reference representation, against the q/dq form; models against the runtime."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests import models
from tests.backends.examples import EXAMPLES, LAYERS, Branches, Example, inputs_of
from tests.models import export
from zeropoint import convert_pt2e, prepare_pt2e
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.backends.xnnpack.config import get_default_quantization_config
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import LoweringError
from zeropoint.numerics import ops
from zeropoint.runtime.child import run_in_child
from zoo import architectures, waifu2x

aten = torch.ops.aten
OUT_DTYPE = torch.ops.higher_order.out_dtype
IN_FLOAT = (
    aten.mul.Tensor, aten.div.Tensor, aten.reciprocal.default, aten.round.default, aten.add.Tensor, aten.sub.Tensor,
    aten.clamp.default, aten.to.dtype, aten.view.default, aten.repeat.default, OUT_DTYPE,
)  # fmt: skip
"""What quantizing, dequantizing and requantizing are made of; views and repeats are of scales and biases."""
ONE_SCALE = tuple(example for example in LAYERS if example.layers)[::2]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@dataclass
class Built:
    """A model in both representations, and what they give for some inputs."""

    quantized: GraphModule
    reference: GraphModule
    batches: list[tuple[torch.Tensor, ...]]
    expected: list[tuple[torch.Tensor, ...]]
    actual: list[tuple[torch.Tensor, ...]]

    def steps(self, others: list[tuple[torch.Tensor, ...]], index: int) -> list[torch.Tensor]:
        """Returns by how many quantization steps an output differs from others, for each batch."""
        output = next(node for node in self.quantized.graph.nodes if node.op == "output")
        scale = output.args[0][index].args[1]
        return [(a[index] - b[index]) / scale for a, b in zip(self.actual, others, strict=True)]


@torch.no_grad()
def build(module: nn.Module, batches: list[tuple[torch.Tensor, ...]], config: QuantizationConfig) -> Built:
    prepared = prepare_pt2e(export(module.eval(), *batches[0]), XNNPACKQuantizer().set_global(config))
    for inputs in batches:
        prepared(*inputs)
    quantized = convert_pt2e(copy.deepcopy(prepared))
    reference = convert_pt2e(prepared, use_reference_representation=True)
    batches = [*batches, tuple(x * 1.7 for x in batches[0])]
    expected, actual = ([outputs(m, *inputs) for inputs in batches] for m in (quantized, reference))
    return Built(quantized, reference, batches, expected, actual)


def outputs(model: GraphModule, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = model(*inputs)
    return found if isinstance(found, tuple) else (found,)


def side_by_side(examples: tuple[Example, ...], config: QuantizationConfig) -> Built:
    torch.manual_seed(0)
    return build(Branches(examples), [inputs_of(examples) for _ in range(3)], config)


@pytest.fixture(scope="module")
def per_channel() -> Built:
    return side_by_side(EXAMPLES, get_symmetric_quantization_config(is_per_channel=True))


@pytest.fixture(scope="module")
def per_tensor() -> Built:
    return side_by_side(ONE_SCALE, get_symmetric_quantization_config())


def check(built: Built, index: int) -> None:
    """At most one step, and in one value of 1000; where this was measured, none of 69834 values differs."""
    for difference in built.steps(built.expected, index):
        assert difference.abs().max() < 1.01
        assert (difference.abs() > 0.5).sum() <= difference.numel() // 1000


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=[str(example) for example in EXAMPLES])
def test_example(per_channel: Built, index: int):
    check(per_channel, index)


@pytest.mark.parametrize("index", range(len(ONE_SCALE)), ids=[str(example) for example in ONE_SCALE])
def test_layer_with_one_scale_for_its_weight(per_tensor: Built, index: int):
    check(per_tensor, index)


def test_every_row_is_integer_arithmetic(per_channel: Built, per_tensor: Built):
    for built in (per_channel, per_tensor):
        for node in built.reference.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
                assert node.target in IN_FLOAT, node
            assert node.target not in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)
        accumulated = [n for n in built.reference.graph.nodes if n.target is OUT_DTYPE and n.args[1] == torch.int32]
        assert len(accumulated) >= len(built.reference.graph.find_nodes(op="call_function", target=OUT_DTYPE)) // 5


def test_weights_are_those_stored(per_channel: Built):
    stored, same = per_channel.reference.state_dict(), per_channel.quantized.state_dict()
    assert stored.keys() == same.keys()
    for name, value in stored.items():
        assert torch.equal(value, same[name])


def test_runs_with_gradients(per_channel: Built):
    inputs = per_channel.batches[0]
    for actual, expected in zip(per_channel.reference(*inputs), per_channel.actual[0], strict=True):
        assert torch.equal(actual, expected)


# Whole models.


def resnet18() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    model, inputs = architectures.resnet18(size=64)
    return model, [inputs]


def super_resolution() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    model, _ = waifu2x.load(1)
    return model, [tuple(x[..., :48, :48] for x in inputs) for inputs in waifu2x.calibration(4, 1)]


def small() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    model, inputs = models.net()
    return model, [inputs]


@functools.cache
def built(load: Callable[..., Any]) -> Built:
    return build(*load(), get_default_quantization_config())


@pytest.mark.parametrize("load", [small, resnet18, super_resolution])
def test_whole_model_against_the_runtime(load):
    """At most one step. Where this was measured, the reference equals the q/dq form in all values. So does the
    runtime, but for what one tie in an early addition of ResNet-18 reaches: XNNPACK adds with fixed-point multipliers.
    """
    model = built(load)
    run = run_in_child(lower(model.quantized, model.batches[0]), model.batches)
    for difference, from_run in zip(model.steps(model.expected, 0), model.steps(run, 0), strict=True):
        assert (difference.abs() > 0.5).sum() <= difference.numel() // 1000
        assert max(difference.abs().max(), from_run.abs().max()) < 1.01


@pytest.mark.parametrize("strict", [False, True])
def test_exported_again(strict: bool):
    model = built(small)
    again = torch.export.export(model.reference, model.batches[0], strict=strict).module()
    for inputs, (expected,) in zip(model.batches, model.actual, strict=True):
        assert torch.equal(again(*inputs), expected)


@torch.no_grad()
def test_lowering_is_refused():
    model = built(small)
    words = r"xnnpack\.lower: the model is in the reference representation.*use_reference_representation=False"
    for reference in (model.reference, torch.export.export(model.reference, model.batches[0]).module()):
        with pytest.raises(LoweringError, match=words):
            lower(reference, model.batches[0])


def test_a_reference_without_products_is_refused_after_another_export():
    """Of products, the operator out_dtype stays; a sum has none, and export drops the record of the model."""
    x = torch.randn(2, 4)

    class Added(torch.nn.Module):
        def forward(self, x):
            return x + x * 0.5

    prepared = prepare_pt2e(
        torch.export.export(Added(), (x,)).module(),
        XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    )
    prepared(x)
    reference = convert_pt2e(prepared, use_reference_representation=True)
    again = torch.export.export(reference, (x,)).module()
    with pytest.raises(LoweringError, match="is in the reference representation"):
        lower(again, (x,))
