"""Our quantizers in torchao's prepare and in ExecuTorch's export recipes."""

import copy

import models
import pytest
import quantizers
import torch

from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.annotate.for_torchao import for_torchao
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import RuleError
from zeropoint.core.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.executorch import Program
from zeropoint.workflow import convert_pt2e, prepare_pt2e

pt2e = pytest.importorskip("torchao.quantization.pt2e")
theirs = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
ao_quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer")


def xnnpack(**settings):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **settings))


def scales(model):
    """Returns scale and zero point of each activation that is dequantized, by the operator that reads it."""
    found = {}
    for node in model.graph.nodes:
        if node.target is ops.DEQUANTIZE_PER_TENSOR:
            found.update({reader.name: node.args[1:3] for reader in node.users})
    return found


@pytest.mark.parametrize("build", [models.mlp, models.conv_relu, models.branches, models.adds])
def test_torchao_gives_the_scales_that_we_give(build):
    _, inputs = build()
    other = theirs.prepare_pt2e(models.exported(build), for_torchao(xnnpack()))
    ours = prepare_pt2e(models.exported(build), xnnpack())
    for prepared in (other, ours):
        prepared(*inputs)
    other, ours = theirs.convert_pt2e(other), convert_pt2e(ours)
    assert scales(other) == scales(ours)
    assert len(scales(ours)) >= 2
    step = max(scale for scale, _ in scales(ours).values())
    assert (other(*inputs) - ours(*inputs)).abs().max() <= 2 * step


def dynamic_outputs(build):
    """Returns what a model computes once quantized at run time: by torchao's workflow, and by ours."""
    _, inputs = build()
    other = theirs.prepare_pt2e(models.exported(build), for_torchao(xnnpack(is_dynamic=True)))
    other(*inputs)  # torchao finds the range of weights by running the model.
    ours = convert_pt2e(prepare_pt2e(models.exported(build), xnnpack(is_dynamic=True)))
    return theirs.convert_pt2e(other)(*inputs), ours(*inputs)


def test_dynamic_quantization_is_the_same_to_the_bit():
    assert torch.equal(*dynamic_outputs(models.conv_relu))


def test_dynamic_linear_layers_have_one_scale_in_torchao_and_one_per_token_in_ours():
    """torchao has no way to choose a scale per token; the delegate knows no other."""
    theirs_, ours = dynamic_outputs(models.mlp)
    assert 30 < sqnr_db(ours, theirs_) < 60


def test_training_uses_our_fake_quantizers():
    _, inputs = models.conv_relu()
    prepared = theirs.prepare_qat_pt2e(models.exported(models.conv_relu), for_torchao(xnnpack(is_qat=True)))
    fake = [module for module in prepared.modules() if hasattr(module, "fake_quant_enabled")]
    assert len(fake) >= 3
    assert all(type(module).__module__.startswith("zeropoint.") for module in fake)
    prepared(*inputs)
    assert len(scales(theirs.convert_pt2e(prepared))) >= 2


def test_all_four_kinds_of_specs_are_handed_on():
    model = models.exported(models.mlp)
    linears = [node for node in model.graph.nodes if models.name_of(node) == "linear"]
    first, second = linears
    measured = quantizers.activation()
    bias = DerivedQuantizationSpec(
        [(argument(first, "input"), first), (argument(first, "weight"), first)],
        lambda made: (made[0].calculate_qparams()[0] * made[1].calculate_qparams()[0], torch.tensor([0])),
        torch.int32, -(2**31), 2**31 - 1, torch.per_tensor_symmetric,
    )  # fmt: skip
    wanted = {argument(first, "input"): measured, argument(first, "weight"): measured, argument(first, "bias"): bias}

    def annotate(_):
        first.meta[quantizers.KEY] = QuantizationAnnotation(wanted)
        shared = SharedQuantizationSpec((argument(first, "input"), first))
        fixed = FixedQParamsQuantizationSpec(torch.uint8, 0.5, 3, 0, 255)
        second.meta[quantizers.KEY] = QuantizationAnnotation({argument(second, "input"): shared}, fixed)

    prepared = theirs.prepare_pt2e(model, for_torchao(quantizers.ByHand(annotate)))
    kinds = {type(spec).__name__ for spec in first.meta[quantizers.KEY].input_qspec_map.values()}
    assert kinds == {"QuantizationSpec", "DerivedQuantizationSpec"}
    assert isinstance(second.meta[quantizers.KEY].output_qspec, ao_quantizer.FixedQParamsQuantizationSpec)
    prepared(*models.mlp()[1])
    converted = theirs.convert_pt2e(prepared)
    dequantized = [node.args[1:3] for node in converted.graph.nodes if node.target is ops.DEQUANTIZE_PER_TENSOR]
    assert (0.5, 3) in dequantized
    assert len(dequantized) == 5


def test_the_channel_axis_of_a_fake_quantizer_is_kept():
    constructor = pt2e.FakeQuantize.with_args(observer=pt2e.PerChannelMinMaxObserver)
    spec = QuantizationSpec(torch.int8, constructor, -127, 127, torch.per_channel_symmetric, 1)
    model = models.exported(models.linear)
    linear = models.find(model, "linear")

    def annotate(_):
        linear.meta[quantizers.KEY] = QuantizationAnnotation({argument(linear, "weight"): spec})

    prepared = theirs.prepare_pt2e(model, for_torchao(quantizers.ByHand(annotate)))
    prepared(*models.linear()[1])
    converted = theirs.convert_pt2e(prepared)
    assert models.find(converted, "dequantize_per_channel").args[3] == 1


def test_it_is_composed_with_quantizers_of_torchao():
    class Theirs(ao_quantizer.Quantizer):
        def annotate(self, model):
            relu = models.find(model, "relu")
            spec = ao_quantizer.QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
            relu.meta[quantizers.KEY] = ao_quantizer.QuantizationAnnotation({relu.args[0]: spec}, _annotated=True)
            return model

        def validate(self, model):
            pass

    model = models.exported(models.mlp)
    annotations = ao_quantizer.ComposableQuantizer([Theirs(), for_torchao(xnnpack())])
    prepared = theirs.prepare_pt2e(model, annotations)
    prepared(*models.mlp()[1])
    dtypes = {n.args[5] for n in theirs.convert_pt2e(prepared).graph.nodes if n.target is ops.QUANTIZE_PER_TENSOR}
    assert dtypes == {torch.uint8, torch.int8}


def test_a_rule_that_matches_nothing_is_an_error_there_too():
    quantizer = for_torchao(xnnpack().set_module_name("nowhere", None))
    with pytest.raises(RuleError, match="nowhere"):
        theirs.prepare_pt2e(models.exported(models.mlp), quantizer)


@pytest.mark.filterwarnings("ignore:This API and all of its related functionality")
def test_an_export_recipe_of_executorch_runs_with_it():
    executorch = pytest.importorskip("executorch.export")
    partition = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    model, inputs = models.conv_relu()
    recipe = executorch.ExportRecipe(
        quantization_recipe=executorch.QuantizationRecipe(quantizers=[for_torchao(xnnpack())]),
        lowering_recipe=executorch.LoweringRecipe(partitioners=[partition.XnnpackPartitioner()]),
    )
    session = executorch.export(model=copy.deepcopy(model).eval(), example_inputs=[inputs], export_recipe=recipe)
    output = Program(bytes(session.get_pte_buffer()))(*inputs)[0]
    prepared = prepare_pt2e(models.exported(models.conv_relu), xnnpack())
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    step = max(scale for scale, _ in scales(converted).values())
    assert (output - converted(*inputs)).abs().max() <= 2 * step
