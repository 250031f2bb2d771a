"""Where torchao and ExecuTorch stop with an error, and zeropoint does what was asked."""

import copy
import itertools

import models
import pytest
import qat_quantizers
import quantizers
import torch
from peer import BY_TORCHAO, THEIRS, affine, pt2e, their_prepare, workflow, x86, xnnpack
from quantizers import ByHand, activation, annotate, weight
from torch import nn
from torch.fx import Graph, GraphModule

from zeropoint.annotate.groups import resolve
from zeropoint.annotate.read import read_plan
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.configs import QuantizationConfig
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument
from zeropoint.graph.train_eval import move_exported_model_to_eval
from zeropoint.numerics import observers
from zeropoint.numerics.fake_quantize import disable_fake_quant, disable_observer
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.pt2e.observer import default_weight_observer
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

aten = torch.ops.aten
OURS = prepare_pt2e, convert_pt2e, quantizers.OURS
ON_TORCHAO = workflow.prepare_pt2e, workflow.convert_pt2e, THEIRS
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def by_weight(constructor, kind=quantizers.OURS):
    """Returns a quantizer of the weight of a linear layer, per tensor, by an observer."""
    spec = kind.QuantizationSpec(torch.int8, constructor, -127, 127, torch.per_tensor_symmetric)
    return ByHand(lambda model: annotate(models.find(model, "linear"), {"weight": spec}, kind=kind))


def quantized(build, by, workflow_of=OURS, reference=False):
    prepare, convert, _ = workflow_of
    inputs = build()[1]
    prepared = prepare(models.exported(build), by)
    with torch.no_grad():
        prepared(*inputs)
    return convert(prepared, use_reference_representation=reference)


# Observers.


def test_nested_with_args():
    """torchao reads __name__ of what with_args was called on, which a constructor that has arguments already lacks."""
    with pytest.raises(AttributeError, match="'PartialWrapper' object has no attribute '__name__'"):
        workflow.prepare_pt2e(
            models.exported(models.linear), by_weight(pt2e.observer.default_weight_observer.with_args(eps=1e-3), THEIRS)
        )
    converted = quantized(models.linear, by_weight(default_weight_observer.with_args(eps=0.5)))
    assert models.find(converted, "dequantize_per_tensor").args[1] == 0.5


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_the_other_partial_wrapper():
    """torchao knows constructors of one PartialWrapper class; there is a second one in torchao, and one in torch."""
    constructor = torch.ao.quantization.MinMaxObserver.with_args(eps=0.5)
    with pytest.raises(AttributeError, match="has no attribute '__name__'"):
        workflow.prepare_pt2e(models.exported(models.linear), by_weight(constructor, THEIRS))
    for stock_observers in ("replace", "keep"):
        prepared = prepare_pt2e(models.exported(models.linear), by_weight(constructor), stock_observers=stock_observers)
        prepared(*models.linear()[1])
        assert models.find(convert_pt2e(prepared), "dequantize_per_tensor").args[1] == 0.5


# Batch norm.


def trained(*layers):
    """Returns layers in train mode, and what prepare_qat_pt2e makes of them."""
    module = nn.Sequential(*layers)
    torch.manual_seed(0)
    models.randomize_norms(module)
    module.train()
    return module, prepare_qat_pt2e(models.export(module, X), ByHand(qat_quantizers.qat))


def check_trained(module, prepared):
    """With nothing rounded, it is the float model in both modes; and what is converted is it in eval mode, rounded."""
    floats = copy.deepcopy(prepared).apply(disable_fake_quant)
    assert torch.allclose(floats(X), module(X), atol=1e-5)
    assert torch.allclose(floats.eval()(X), module.eval()(X), atol=1e-5)
    prepared(X).square().mean().backward()
    expected = copy.deepcopy(prepared).eval().apply(disable_observer)(X)
    converted = convert_pt2e(prepared)
    scale = models.find(converted, "output").args[0][0].args[1]
    assert (converted(X) - expected).abs().max() <= 1.01 * scale
    return converted


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


def test_batch_norm_without_factors_in_qat():
    """torchao's pattern has a weight and a bias of batch norm: with affine=False the first forward fails."""
    assert not norms(check_trained(*trained(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))))


def test_batch_norm_without_statistics_in_qat():
    """torchao's pattern has running statistics: with track_running_stats=False the first forward fails."""
    check_trained(*trained(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))


def test_a_layer_and_its_batch_norm_called_twice_in_qat():
    """torchao's convert tries to erase the counter of a batch norm that is called twice while it is still read."""
    layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert not norms(check_trained(*trained(layer, nn.ReLU(), layer)))


def test_switching_batch_norm_without_statistics():
    """torchao's move_exported_model_to_eval asks batch norm for statistics that it does not have."""
    module = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Dropout(0.5)).train()
    model = move_exported_model_to_eval(models.export(module, X))
    assert torch.allclose(model(X), module.eval()(X), atol=1e-6)


def test_transposed_convolution_with_groups_and_batch_norm():
    """torchao folds batch norm into a transposed convolution along the wrong axis where it has groups."""

    @models.seeded
    def build():
        return nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (torch.randn(2, 4, 5, 5),)

    with pytest.raises(RuntimeError, match="must match the size"):
        workflow.prepare_pt2e(models.exported(build), BY_TORCHAO)
    module, inputs = build()
    prepared = prepare_pt2e(models.exported(build), ByHand(lambda model: None))
    assert not models.count(prepared, "batch_norm")
    assert torch.allclose(prepared(*inputs), module(*inputs), atol=1e-5)


# The reference representation.


def test_reference_of_a_linear_layer_without_bias():
    """torchao divides the bias of a linear layer by its scale, where there is none too."""

    @models.seeded
    def build():
        return nn.Linear(4, 3, bias=False), (torch.randn(2, 4),)

    spec = activation(qscheme=torch.per_tensor_symmetric, quant_min=-127)
    by = ByHand(lambda model: quantizers.static(model, weight_spec=spec))
    reference, plain = (quantized(build, by, reference=flag) for flag in (True, False))
    inputs = build()[1]
    assert not models.count(reference, "dequantize_per_tensor")
    assert (reference(*inputs) - plain(*inputs)).abs().max() < 1.01 * models.find(plain, "output").args[0][0].args[1]


def test_reference_of_dynamic_linear_layers_in_a_row():
    """torchao's reference of a linear layer with scales at run time gives float64, which the next one does not take."""
    by = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=True, is_per_channel=True))
    reference = quantized(models.mlp, by, reference=True)
    module, inputs = models.mlp()
    assert reference(*inputs).dtype == torch.float32
    assert sqnr_db(module(*inputs), reference(*inputs)) > 30


# Quantizers.


def test_a_convolution_and_a_number():
    """torchao's X86InductorQuantizer asserts that both addends are nodes: conv(x) + 1 stops annotate."""

    @models.seeded
    def build():
        return models.Applied(lambda m, x: m.conv(x) + 1, conv=nn.Conv2d(3, 4, 1)), (X,)

    theirs = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with pytest.raises(AssertionError):
        workflow.prepare_pt2e(models.exported(build), theirs)
    converted = quantized(build, XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    assert sqnr_db(build()[0](X), converted(X)) > 30


def test_a_configuration_of_weights_alone():
    """ExecuTorch's XNNPACKQuantizer asks whether the activation of a configuration is dynamic; there may be none."""
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    theirs = xnnpack.XNNPACKQuantizer().set_global(type(config)(None, None, config.weight, None))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'is_dynamic'"):
        workflow.prepare_pt2e(models.exported(models.mlp), theirs)
    of_weight = get_symmetric_quantization_config(is_per_channel=True).weight
    by = XNNPACKQuantizer().set_global(QuantizationConfig(None, None, of_weight, None))
    converted, (module, inputs) = quantized(models.mlp, by), models.mlp()
    assert models.count(converted, "dequantize_per_channel") == 2
    assert sqnr_db(module(*inputs), converted(*inputs)) > 30


# Annotations.


@models.seeded
def added():
    return models.Applied(lambda m, x: (x * 2.0) + x.relu()), (torch.randn(8),)


def test_shared_specs_that_point_forward():
    """torchao makes observers in the order of the graph: a shared spec of a later node is an AssertionError."""

    def function(model, kind):
        relu, add = models.find(model, "relu"), models.find(model, "add")
        annotate(relu, {}, kind.SharedQuantizationSpec(add), kind)
        annotate(add, {}, activation(kind), kind)

    with pytest.raises(AssertionError, match="please make sure only refer to edge or node that has observer"):
        quantized(added, ByHand(lambda model: function(model, THEIRS)), ON_TORCHAO)
    converted = quantized(added, ByHand(lambda model: function(model, quantizers.OURS)))
    scales = {node.args[1] for node in converted.graph.nodes if models.name_of(node) == "dequantize_per_tensor"}
    assert len(scales) == 1
    module, inputs = added()
    assert sqnr_db(module(*inputs), converted(*inputs)) > 30


def test_derived_specs_that_point_forward():
    """torchao makes observers in the order of the map: a bias derived from a weight that comes later is a KeyError."""

    def function(model, kind):
        linear = models.find(model, "linear")
        x, of_weight, bias = (argument(linear, name) for name in ("input", "weight", "bias"))
        derived = kind.DerivedQuantizationSpec(
            [(x, linear), (of_weight, linear)], qat_quantizers.bias_of, torch.int32, -(2**31), 2**31 - 1,
            torch.per_channel_symmetric, 0,
        )  # fmt: skip
        specs = {bias: derived, x: activation(kind), of_weight: weight(kind)}
        linear.meta[quantizers.KEY] = kind.QuantizationAnnotation(specs, None)

    with pytest.raises(KeyError):
        quantized(models.linear, ByHand(lambda model: function(model, THEIRS)), ON_TORCHAO)
    converted = quantized(models.linear, ByHand(lambda model: function(model, quantizers.OURS)))
    module, inputs = models.linear()
    assert models.count(converted, "dequantize_per_channel") == 2
    assert sqnr_db(module(*inputs), converted(*inputs)) > 30


def test_long_chains_of_shared_specs():
    """torchao follows shared specs by recursion: a chain as long as Python's limit is a RecursionError."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(2000):
        nodes.append(graph.call_function(aten.relu.default, (nodes[-1],)))
    graph.output(nodes[-1])
    model = GraphModule(nn.Module(), graph)
    for node, following in itertools.pairwise(nodes[1:]):
        annotate(node, {}, THEIRS.SharedQuantizationSpec(following), THEIRS)
    annotate(nodes[-1], {}, activation(THEIRS), THEIRS)
    (group,) = set(resolve(read_plan(model)).values())
    assert len(group.sites) == 2000
    with pytest.raises(RecursionError):
        their_prepare._get_edge_or_node_to_group_id(their_prepare._get_edge_or_node_to_qspec(model))


def test_tensors_given_by_name():
    """torchao asserts that an annotated node has no tensor among its keyword arguments."""

    @models.seeded
    def build():
        return models.Applied(lambda m, x: torch.add(x, other=x.relu())), (torch.randn(8),)

    def by(kind):
        def function(model):
            add = models.find(model, "add")
            x, other = argument(add, "self"), argument(add, "other")
            add.args, add.kwargs = (x,), {"other": other}
            annotate(add, {"self": activation(kind), "other": activation(kind)}, None, kind)

        return ByHand(function)

    with pytest.raises(AssertionError):
        quantized(build, by(THEIRS), ON_TORCHAO)
    converted = quantized(build, by(quantizers.OURS))
    module, inputs = build()
    assert models.count(converted, "dequantize_per_tensor") == 2
    assert sqnr_db(module(*inputs), converted(*inputs)) > 30


def test_dynamic_blocks_without_data():
    """torchao's convert asserts that an observer of blocks saw data, though at run time there is nothing to measure."""

    def by(kind, package):
        settings = {"granularity": pt2e.PerToken(), "mapping_type": pt2e.MappingType.ASYMMETRIC}
        constructor = package.AffineQuantizedPlaceholderObserver.with_args(target_dtype=torch.int8, **settings)
        spec = kind.QuantizationSpec(torch.int8, constructor, is_dynamic=True)
        return ByHand(lambda model: annotate(models.find(model, "linear"), {"input": spec}, kind=kind))

    with pytest.raises(AssertionError, match="Expecting block_size to be populated"):
        workflow.convert_pt2e(workflow.prepare_pt2e(models.exported(models.linear), by(THEIRS, affine)))
    converted = convert_pt2e(prepare_pt2e(models.exported(models.linear), by(quantizers.OURS, observers)))
    module, inputs = models.linear()
    assert sqnr_db(module(*inputs), converted(*inputs)) > 30
