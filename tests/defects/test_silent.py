"""What torchao and ExecuTorch do wrongly without a word, and zeropoint does rightly or refuses."""

import copy
from types import SimpleNamespace

import models
import pytest
import qat_quantizers
import quantizers
import torch
from peer import BY_TORCHAO, THEIRS, affine, pt2e, quantizer, workflow, xnnpack
from quantizers import ByHand, activation, annotate, weight
from torch import nn

from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CalibrationError, GraphError, SpecError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.train_eval import move_exported_model_to_eval, move_exported_model_to_train
from zeropoint.numerics import observers
from zeropoint.numerics.fake_quantize import FusedMovingAvgObsFakeQuantize, disable_fake_quant
from zeropoint.numerics.granularity import PerTensor
from zeropoint.numerics.mapping import MappingType, ZeroPointDomain
from zeropoint.numerics.observers import HistogramObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.qat_batch_norm import groups_in
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

aten = torch.ops.aten
OURS = prepare_pt2e, convert_pt2e, quantizers.STATIC
ON_TORCHAO = workflow.prepare_pt2e, workflow.convert_pt2e, BY_TORCHAO
OF_US = SimpleNamespace(
    **{**vars(observers), **vars(qat_quantizers.OURS)},
    FusedMovingAvgObsFakeQuantize=FusedMovingAvgObsFakeQuantize,
    PerTensor=PerTensor,
    MappingType=MappingType,
)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def applied(function, **modules):
    module = models.Applied(function, **modules)
    torch.manual_seed(0)
    models.randomize_norms(module)
    return module


# Batch norm in post-training quantization: a prepared model computes what the float model does.


def differences(module):
    """Returns by how much our prepared model, and torchao's, differ from the float model."""
    expected = module.eval()(X)
    model = models.export(module, X)
    ours, theirs = prepare_pt2e(copy.deepcopy(model), quantizers.STATIC), workflow.prepare_pt2e(model, BY_TORCHAO)
    return [(prepared(X) - expected).abs().max().item() for prepared in (ours, theirs)]


def test_batch_norm_is_folded_into_a_convolution_with_other_readers():
    """torchao folds batch norm into a convolution whose output is read elsewhere, so the other reader gets it too."""
    module = applied(lambda m, x: m.norm(y := m.conv(x)) + y, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    ours, theirs = differences(module)
    assert ours < 1e-5 < 0.1 < theirs


def test_one_convolution_is_folded_with_two_batch_norms():
    """torchao folds the first of two batch norms after one convolution into it, and leaves the second out."""
    module = applied(
        lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x)),
        conv=nn.Conv2d(3, 4, 1), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4),
    )  # fmt: skip
    ours, theirs = differences(module)
    assert ours < 1e-5 < 0.1 < theirs


def test_one_convolution_is_folded_where_it_has_no_batch_norm():
    """torchao folds batch norm into a convolution that is called a second time without it."""
    module = applied(lambda m, x: m.norm(m.conv(x)) + m.conv(x), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    ours, theirs = differences(module)
    assert ours < 1e-5 < 0.1 < theirs


def test_batch_norm_in_train_mode_is_folded():
    """torchao folds batch norm that was exported in train mode, and its counter still counts in the quantized model."""
    module = applied(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)).train()
    model, found = models.export(module, X), []
    for prepare, convert, by in (OURS, ON_TORCHAO):
        prepared = prepare(copy.deepcopy(model), by)
        prepared(X)
        found.append(convert(prepared))
    ours, theirs = found
    assert models.count(theirs, "add_") == 1
    assert not models.count(theirs, "batch_norm")
    expected = module(X)  # Ours is in train mode as well, and says so: the norm stays.
    assert sqnr_db(expected, ours(X)) > 35
    module(X)
    assert sqnr_db(module.eval()(X), ours.eval()(X)) > 35
    assert not models.count(ours, "add_")


# Batch norm in training. torchao takes a minute for each model: its part was measured once.


def trained(*layers, x=X):
    """Returns layers in train mode, and what prepare_qat_pt2e makes of them."""
    module = nn.Sequential(*layers)
    torch.manual_seed(0)
    for layer in layers:  # Those of parametrize are drawn when the file is imported, after whatever was before it.
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    models.randomize_norms(module)
    module.train()
    return module, prepare_qat_pt2e(models.export(module, x), ByHand(qat_quantizers.qat))


def test_qat_resets_eps_and_momentum():
    """torchao's prepare_qat_pt2e gives every fused batch norm eps=1e-5 and momentum=0.1."""
    module, prepared = trained(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.1, momentum=0.5))
    prepared.apply(disable_fake_quant)
    assert torch.allclose(prepared(X), module(X), atol=1e-5)
    for name, tensor in module[1].named_buffers():
        assert torch.allclose(prepared.state_dict()[f"1.{name}"], tensor, atol=1e-6)
    move_exported_model_to_eval(prepared)
    assert torch.allclose(prepared(X), module.eval()(X), atol=1e-5)


@pytest.mark.parametrize(("conv", "norm", "shape"), [
    (nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), (2, 3, 6)),
    (nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
])  # fmt: skip
def test_qat_leaves_counters_of_other_dimensions(conv, norm, shape):
    """torchao removes num_batches_tracked.add_ of BatchNorm2d only: those of 1d and 3d count in the quantized model."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module, prepared = trained(conv, norm, x=x)
    prepared(x)
    module(x)
    converted = convert_pt2e(prepared)
    assert not models.count(converted, "add_")
    assert "1.num_batches_tracked" not in converted.state_dict()
    assert sqnr_db(module.eval()(x), converted(x)) > 20


def check_fused(*layers, x=X):
    module, prepared = trained(*layers, x=x)
    assert len(groups_in(prepared.graph)) == 1
    prepared(x)
    module(x)
    converted = convert_pt2e(prepared)
    assert not [node for node in converted.graph.nodes if node.target in BATCH_NORMS]
    assert sqnr_db(module.eval()(x), converted(x)) > 20


def test_qat_leaves_conv3d_unfused():
    """torchao's patterns have no convolution of three dimensions: its batch norm stays float in the quantized model."""
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    check_fused(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), x=x)


def test_qat_leaves_padding_same_unfused():
    """torchao's patterns have no convolution whose padding is a word: its batch norm stays float as well."""
    check_fused(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4))


# Train and eval mode.


@pytest.fixture(scope="module")
def moved():
    """Returns a model with unusual numbers, and its exports in eval mode: moved there by us, and by torchao."""
    module = nn.Sequential(nn.BatchNorm2d(3, eps=0.1, momentum=0.5), nn.Dropout(0.3), nn.Dropout2d(0.2))
    torch.manual_seed(0)
    models.randomize_norms(module)
    model = models.export(module.train(), X)
    theirs = pt2e.move_exported_model_to_eval(copy.deepcopy(model))
    return module, move_exported_model_to_eval(model), theirs


def test_a_switch_resets_the_share_of_dropout(moved):
    """torchao's move_exported_model_to_train and _to_eval give every dropout p=0.5."""
    _, ours, theirs = moved
    assert [models.find(each, "dropout").args[1] for each in (ours, theirs)] == [0.3, 0.5]
    trained = move_exported_model_to_train(copy.deepcopy(ours))
    assert models.find(trained, "dropout").args[1:] == (0.3, True)


def test_a_switch_resets_eps_of_batch_norm(moved):
    """torchao's move_exported_model_to_train and _to_eval give every batch norm eps=1e-5 and momentum=0.1."""
    module, ours, theirs = moved
    numbers = [models.find(each, "batch_norm").args[6:8] for each in (ours, theirs)]
    assert numbers == [(0.5, 0.1), (0.1, 1e-5)]
    assert torch.allclose(ours(X), copy.deepcopy(module).eval()(X), atol=1e-6)


def test_a_switch_leaves_dropout_of_channels(moved):
    """torchao's move_exported_model_to_eval knows dropout of values only: with Dropout2d, eval mode stays random."""
    _, ours, theirs = moved
    assert torch.equal(ours(X), ours(X))
    assert not torch.equal(theirs(X), theirs(X))


def test_a_switch_thaws_frozen_batch_norm():
    """torchao's move_exported_model_to_train trains batch norms that were frozen when the model was exported."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.3)).train()
    module[0].eval()
    model = models.export(module, X)
    assert models.find(pt2e.move_exported_model_to_train(copy.deepcopy(model)), "batch_norm").args[5] is True
    move_exported_model_to_train(move_exported_model_to_eval(model))(X)
    assert torch.equal(model.state_dict()["0.running_mean"], torch.zeros(3))
    assert models.find(model, "dropout").args[2] is True


# Specs and quantizers.


def test_ch_axis_is_ignored_through_a_fake_quantizer():
    """torchao passes ch_axis on by the class name: a fake quantizer of a per-channel observer takes axis 0 always."""
    shapes = []
    for kind, prepare in ((OF_US, prepare_qat_pt2e), (THEIRS, workflow.prepare_qat_pt2e)):
        fake = kind.FusedMovingAvgObsFakeQuantize.with_args(observer=kind.MovingAveragePerChannelMinMaxObserver)
        spec = weight(kind, ch_axis=1, observer_or_fake_quant_ctr=fake)
        by = ByHand(lambda model, s=spec, k=kind: annotate(models.find(model, "linear"), {"weight": s}, kind=k))
        prepared = prepare(models.exported(models.linear), by)
        prepared(*models.linear()[1])
        (scale,) = (tensor for name, tensor in prepared.state_dict().items() if name.endswith("scale"))
        shapes.append(tuple(scale.shape))
    assert shapes == [(4,), (3,)]  # The weight is (3, 4).


def composed_of(kind, by, calls):
    """Returns a composed quantizer whose only part notes that it is called."""

    class Noting(type(by)):
        def validate(self, model):
            calls.append("validate")

        def prepare_obs_or_fq_callback(self, model, edge_or_node_to_obs_or_fq):
            calls.append("callback")

    return kind([Noting(by.function)])


@pytest.mark.parametrize("method", ["validate", "callback"])
def test_composed_quantizers_are_not_asked(method):
    """torchao's ComposableQuantizer calls neither validate nor prepare_obs_or_fq_callback of its parts."""
    ours, theirs = [], []
    prepare_pt2e(models.exported(models.linear), composed_of(ComposableQuantizer, quantizers.STATIC, ours))
    workflow.prepare_pt2e(
        models.exported(models.linear), composed_of(quantizer.ComposableQuantizer, BY_TORCHAO, theirs)
    )
    assert method in ours
    assert method not in theirs


def test_implicit_sharing_ignores_the_observer():
    """torchao lets readers of one tensor share an observer where their specs name different ones: the first wins."""
    kinds = []
    for kind, prepare in ((OF_US, prepare_pt2e), (THEIRS, workflow.prepare_pt2e)):
        specs = [activation(kind), activation(kind, observer_or_fake_quant_ctr=kind.HistogramObserver)]

        def function(model, specs=specs, kind=kind):
            for index, spec in enumerate(specs):
                annotate(models.find(model, "linear", index + 1), {"input": spec}, kind=kind)

        prepared = prepare(models.exported(models.branches), ByHand(function))
        kinds.append({type(module).__name__ for module in prepared.modules() if hasattr(module, "calculate_qparams")})
    assert kinds == [{"MinMaxObserver", "HistogramObserver"}, {"MinMaxObserver"}]


# ExecuTorch's quantizer for XNNPACK.


def quantized_by(set_rules, build, **settings):
    """Returns which operators our XNNPACKQuantizer, and ExecuTorch's, annotate."""
    found = []
    for kind, config in (
        (XNNPACKQuantizer, get_symmetric_quantization_config(**settings)),
        (xnnpack.XNNPACKQuantizer, xnnpack.get_symmetric_quantization_config(**settings)),
    ):
        by, model = kind(), models.exported(build)
        set_rules(by, config)
        with pytest.MonkeyPatch.context() as patch:
            if kind is not XNNPACKQuantizer:  # Ten seconds of exports, and nothing to find.
                norms = [name for name in xnnpack.OP_TO_ANNOTATOR if "bn" in name]
                for name in norms:
                    patch.setitem(xnnpack.OP_TO_ANNOTATOR, name, lambda *arguments: None)
            model = by.annotate(by.transform_for_annotation(model))
        annotated = (node for node in model.graph.nodes if quantizers.KEY in node.meta)
        found.append({models.name_of(n) for n in annotated if n.meta[quantizers.KEY].input_qspec_map})
    return found


def test_set_module_name_reaches_no_convolution():
    """ExecuTorch's filter asks the weight's node for its module, which has none: set_module_name finds none."""
    ours, theirs = quantized_by(lambda by, config: by.set_module_name("0", config), models.conv_relu)
    assert (ours, theirs) == ({"conv2d"}, set())


def test_set_module_type_reaches_no_convolution():
    """As by name: a type rule for Conv2d quantizes no convolution in ExecuTorch."""
    ours, theirs = quantized_by(lambda by, config: by.set_module_type(nn.Conv2d, config), models.conv_relu)
    assert (ours, theirs) == ({"conv2d"}, set())


def test_concatenation_ignores_the_filter():
    """ExecuTorch quantizes cat where the filter, or a rule for another module, leaves it out."""
    ours, theirs = quantized_by(lambda by, config: by.set_module_name("a", config), models.branches)
    assert (ours, theirs) == ({"linear"}, {"linear", "cat"})


def test_dynamic_convolution_with_relu_stays_float():
    """ExecuTorch leaves a convolution float where activations are quantized at run time and relu follows."""
    ours, theirs = quantized_by(
        lambda by, config: by.set_global(config), models.conv_relu, is_dynamic=True, is_per_channel=True
    )
    assert (ours, theirs) == ({"conv2d"}, set())


# Observers and convert.


def test_histograms_are_searched_for_256_levels():
    """torchao's HistogramObserver searches a range for 8 bits where quant_min and quant_max say 4."""
    x, errors = torch.randn(5000, generator=torch.Generator().manual_seed(0)), []
    for kind in (HistogramObserver, pt2e.HistogramObserver):
        observer = kind(dtype=torch.int8, quant_min=-8, quant_max=7, qscheme=torch.per_tensor_affine)
        observer(x)
        scale, zero_point = (value.item() for value in observer.calculate_qparams())
        errors.append((torch.fake_quantize_per_tensor_affine(x, scale, int(zero_point), -8, 7) - x).square().mean())
    assert errors[0] < 0.9 * errors[1]


def test_convert_without_data_gives_scale_1():
    """torchao converts a model that saw no data, with scale 1 for each tensor."""
    with pytest.warns(UserWarning, match="must run observer"):
        theirs = workflow.convert_pt2e(workflow.prepare_pt2e(models.exported(models.linear), BY_TORCHAO))
    assert models.find(theirs, "quantize_per_tensor").args[1:3] == (1.0, 0)
    prepared = prepare_pt2e(models.exported(models.linear), quantizers.STATIC)
    with pytest.raises(CalibrationError, match="no data reached this MinMaxObserver"):
        convert_pt2e(prepared)


def test_a_converted_model_is_converted_again():
    """torchao's convert_pt2e accepts a model that it has converted."""
    inputs, found = models.linear()[1], []
    for prepare, convert, by in (OURS, ON_TORCHAO):
        prepared = prepare(models.exported(models.linear), by)
        prepared(*inputs)
        found.append(convert(prepared))
    ours, theirs = found
    workflow.convert_pt2e(theirs)
    with pytest.raises(GraphError, match="converted already"):
        convert_pt2e(ours)


def by_affine(observer, is_dynamic=False, **settings):
    """Returns a quantizer of the input of a linear layer, by an observer of blocks."""
    constructor = observer.with_args(target_dtype=torch.int8, **settings)
    kind = QuantizationSpec if "zeropoint" in observer.__module__ else THEIRS.QuantizationSpec
    spec = kind(torch.int8, constructor, is_dynamic=is_dynamic)
    package = quantizers.OURS if kind is QuantizationSpec else THEIRS
    return ByHand(lambda model: annotate(models.find(model, "linear"), {"input": spec}, kind=package))


def test_zero_point_domain_is_lost():
    """torchao's convert forgets zero_point_domain and preserve_zero: the integers mean something else afterwards."""
    x = torch.linspace(3, 4, 8).reshape(2, 4)
    settings = {"granularity": pt2e.PerTensor(), "mapping_type": pt2e.MappingType.ASYMMETRIC, "preserve_zero": False}
    by = by_affine(affine.AffineQuantizedMinMaxObserver, zero_point_domain=pt2e.ZeroPointDomain.FLOAT, **settings)
    prepared = workflow.prepare_pt2e(models.exported(models.linear), by)
    expected = prepared(x)
    assert sqnr_db(expected, workflow.convert_pt2e(prepared)(x)) < 10
    with pytest.raises(SpecError, match="no operator quantizes by zero_point_domain=FLOAT"):
        observers.AffineQuantizedMinMaxObserver(
            MappingType.ASYMMETRIC,
            torch.int8,
            PerTensor(),
            zero_point_domain=ZeroPointDomain.FLOAT,
            preserve_zero=False,
        )


def test_block_size_is_that_of_the_last_batch():
    """torchao writes the sizes of the last calibration batch into the graph, though the batch was exported as free."""
    module, (x,) = models.linear()
    batch = torch.export.Dim("batch", min=2, max=64)
    model, found = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module(), []
    for kind, name, (prepare, convert, _) in ((observers, OF_US, OURS), (affine, pt2e, ON_TORCHAO)):
        settings = {"granularity": name.PerTensor(), "mapping_type": name.MappingType.ASYMMETRIC}
        by = by_affine(kind.AffineQuantizedPlaceholderObserver, is_dynamic=True, **settings)
        prepared = prepare(copy.deepcopy(model), by)
        prepared(x)
        found.append(convert(prepared))
    ours, theirs = found
    larger = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(module(larger), ours(larger)) > 30
    with pytest.raises(AssertionError, match="Expecting input size at 0 dimension: 5 to be divisible by block_size"):
        theirs(larger)
