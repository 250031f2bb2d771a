"""Batch norm in training: the same network, rounded where it will be; and convert gives what was trained."""

import copy
import operator

import models
import pytest
import qat_quantizers as qat
import torch
from qat_quantizers import KEY, in_eval_mode
from quantizers import ByHand, annotate
from torch import nn

from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.core.errors import AnnotationError, GraphError
from zeropoint.core.specs import FixedQParamsQuantizationSpec, QuantizationSpec, SharedQuantizationSpec
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.numerics.fake_quantize import FixedQParamsFakeQuantize, disable_fake_quant, disable_observer
from zeropoint.numerics.observers import PlaceholderObserver
from zeropoint.passes.qat_batch_norm import QAT_KEY, groups_in
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

aten = torch.ops.aten
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OURS = ByHand(qat.qat)


def trained_mode(module):
    """Returns the module in train mode, with statistics and factors that are not 0 and 1."""
    torch.manual_seed(0)
    models.randomize_norms(module)
    return module.train()


def export(module, *inputs):
    return torch.export.export(module, inputs).module()


def prepared_of(module, x, quantizer=OURS):
    return prepare_qat_pt2e(export(trained_mode(module), x), quantizer)


def operators(model):
    return [node.target for node in model.graph.nodes if node.op == "call_function"]


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


def train(model, x, steps=3):
    """Trains by a plain loop; returns the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(x.shape, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def check_floats(module, prepared, x):
    """With nothing rounded, training is that of the float model: output, gradients and statistics."""
    prepared, module = copy.deepcopy(prepared).apply(disable_fake_quant), copy.deepcopy(module)
    results = [model(x) for model in (module, prepared)]
    for result in results:
        (result * torch.linspace(-1, 1, result.numel()).reshape(result.shape)).mean().backward()
    assert torch.allclose(*results, atol=1e-5, rtol=1e-5)
    found = dict(prepared.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name].grad, parameter.grad, atol=1e-5, rtol=1e-4), name
    for name, buffer in module.named_buffers():
        if name in prepared.state_dict():
            assert torch.allclose(prepared.get_buffer(name), buffer, atol=1e-6), name


def check_convert(prepared, x, steps=1):
    """Converts, in train and in eval mode; the result is the prepared model in eval mode, within one integer."""
    train_mode, eval_mode = copy.deepcopy(prepared), in_eval_mode(prepared)
    expected = eval_mode(x)
    for model in (train_mode, copy.deepcopy(eval_mode)):
        converted = convert_pt2e(model)
        result = converted(x)
        scale = models.find(converted, "dequantize_per_tensor", -1).args[1]
        assert (result - expected).abs().max() <= steps * scale * 1.001
        assert (result != expected).float().mean() < 0.02
    return converted


def sizes(dims):
    return (4, 4, *[5] * dims)


KINDS = {
    **{f"conv{d}d": (lambda d, **k: CONV[d](4, 6, 3, stride=2, padding=1, dilation=2, **k), d) for d in CONV},
    **{f"grouped{d}d": (lambda d, **k: CONV[d](4, 6, 3, groups=2, **k), d) for d in CONV},
    **{f"same{d}d": (lambda d, **k: CONV[d](4, 6, 2, padding="same", **k), d) for d in CONV},
    **{f"transposed{d}d": (lambda d, **k: TRANSPOSED[d](4, 6, 3, 2, 1, 1, **k), d) for d in TRANSPOSED},
    **{f"transposed grouped{d}d": (lambda d, **k: TRANSPOSED[d](4, 6, 3, groups=2, **k), d) for d in TRANSPOSED},
    "linear": (lambda d, **k: nn.Linear(4, 6, **k), 0),
}
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("bias", "affine", "activation"), [
    (True, True, "relu"), (False, True, "relu6"), (True, False, "none"), (False, False, "relu"),
])  # fmt: skip
@pytest.mark.parametrize(("layer", "dims"), KINDS.values(), ids=KINDS)
def test_every_kind_of_layer(layer, dims, bias, affine, activation):
    norm = NORM[max(dims, 1)](6, affine=affine, eps=0.03, momentum=0.3)
    module = nn.Sequential(layer(dims, bias=bias), norm, ACTIVATIONS[activation]())
    x = torch.randn(sizes(dims))
    prepared = prepared_of(module, x)
    (norm,) = norms(prepared)
    assert norm.args[5:8] == (True, 0.3, 0.03)
    check_floats(module, prepared, x)
    assert train(prepared, x).isfinite()
    converted = check_convert(prepared, x)
    assert not norms(converted)
    assert aten.add_.Tensor not in operators(converted)
    weight = argument(models.find(converted, operator_of(prepared)), "weight")
    assert weight.args[3] == int("transpose" in operator_of(prepared))  # The channel axis.


def operator_of(model):
    (group,) = groups_in(model.graph)
    return models.name_of(group["layer"])


def test_the_form_operator_by_operator():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x)
    assert operators(prepared) == [
        aten.add.Tensor, aten.sqrt.default, aten.div.Tensor, aten.reshape.default, aten.mul.Tensor,
        aten.zeros_like.default, aten.conv2d.default, aten.add_.Tensor, aten.reshape.default, aten.div.Tensor,
        aten.reshape.default, aten.add.Tensor, aten.batch_norm.default, aten.relu.default,
    ]  # fmt: skip
    (group,) = groups_in(prepared.graph)
    conv = models.find(prepared, "conv2d")
    assert prepared.get_submodule(argument(conv, "weight").target).ch_axis == 0
    assert argument(conv, "weight").args[0] is group["weight"]
    assert argument(conv, "bias") is group["bias"]
    assert group["weight"].meta["nn_module_stack"] == conv.meta["nn_module_stack"]
    assert argument(models.find(prepared, "batch_norm"), "input") is group["output"]


def test_without_bias_none_is_added():
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), torch.randn(sizes(2)))
    assert aten.zeros_like.default not in operators(prepared)
    assert argument(models.find(prepared, "conv2d"), "bias") is None


def test_the_weight_is_quantized_as_it_was_trained():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x)
    train(prepared, x)
    prepared.apply(disable_observer)
    state = prepared.state_dict()
    scaled = state["0.weight"] * (state["1.weight"] / torch.sqrt(state["1.running_var"] + 1e-5)).reshape(-1, 1, 1, 1)
    fake = prepared.get_submodule(argument(models.find(prepared, "conv2d"), "weight").target)
    converted = convert_pt2e(prepared)
    weight = argument(models.find(converted, "conv2d"), "weight")
    integers = converted.get_buffer(weight.args[0].target)
    scale = converted.get_buffer(weight.args[1].target)
    assert torch.equal(scale, fake.scale)
    assert torch.equal(integers * scale.reshape(-1, 1, 1, 1), fake(scaled))


# Biases and other specs.


def test_a_derived_bias_has_the_scale_of_input_times_weight():
    x = torch.randn(sizes(2))
    quantizer = ByHand(lambda model: qat.qat(model, bias=qat.derived_bias))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x, quantizer)
    conv = models.find(prepared, "conv2d")
    zeros = argument(conv, "bias").args[0]
    assert zeros.target is aten.zeros_like.default
    assert list(conv.meta[KEY].input_qspec_map) == [
        models.find(prepared, "placeholder"), argument(conv, "weight").args[0], zeros
    ]  # fmt: skip
    train(prepared, x)
    converted = check_convert(prepared, x)
    conv = models.find(converted, "conv2d")
    activation, weight, bias = (argument(conv, name) for name in ("input", "weight", "bias"))
    scale = converted.get_buffer(bias.args[1].target)
    assert torch.allclose(scale, activation.args[1] * converted.get_buffer(weight.args[1].target))
    assert converted.get_buffer(bias.args[0].target).dtype == torch.int32


def test_shared_specs_that_name_the_weight_follow_it():
    def function(model):
        qat.qat(model)
        first, second = (models.find(model, "conv2d", i) for i in (0, 1))
        edge = argument(first, "weight"), first
        second.meta[KEY].input_qspec_map[argument(second, "weight")] = SharedQuantizationSpec(edge)

    layers = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(*layers), x, ByHand(function))
    first, second = (models.find(prepared, "conv2d", i) for i in (0, 1))
    fakes = [prepared.get_submodule(argument(conv, "weight").target) for conv in (first, second)]
    assert fakes[0] is fakes[1]
    spec = second.meta[KEY].input_qspec_map[argument(second, "weight").args[0]]
    assert spec.edge_or_node == (argument(first, "weight").args[0], first)
    train(prepared, x)
    check_convert(prepared, x)


def test_fixed_specs_are_fake_quantizers():
    def function(model):
        fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
        annotate(models.find(model, "sigmoid"), {"self": qat.fake_activation()}, fixed)

    prepared = prepared_of(nn.Sigmoid(), torch.randn(3), ByHand(function))
    found = [module for module in prepared.modules() if isinstance(module, FixedQParamsFakeQuantize)]
    assert [fake.scale.item() for fake in found] == [1 / 256]


def test_a_measured_bias_is_refused():
    quantizer = ByHand(lambda model: qat.qat(model, bias=lambda node, kind: qat.fake_activation()))
    with pytest.raises(AnnotationError, match=r"conv2d .*its bias is to be measured.*DerivedQuantizationSpec"):
        prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(sizes(2)), quantizer)


def test_a_float_bias_may_be_named():
    of_bias = QuantizationSpec(torch.float32, PlaceholderObserver)
    x = torch.randn(sizes(2))
    quantizer = ByHand(lambda model: qat.qat(model, bias=lambda node, kind: of_bias))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x, quantizer)
    train(prepared, x)
    converted = check_convert(prepared, x)
    assert argument(models.find(converted, "conv2d"), "bias").op == "get_attr"


# Modules that are used more than once.


class Shared(nn.Module):
    """One convolution and two batch norms, used as ``forward`` says."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


USES = {
    "both twice": lambda m, x: m.one(m.conv(m.one(m.conv(x)))),
    "two batch norms": lambda m, x: m.one(m.conv(x)) + m.two(m.conv(x)),
    "with and without": lambda m, x: m.one(m.conv(x)) + m.conv(x),
    "one batch norm of two layers": lambda m, x: m.one(m.conv(x)) + m.one(m.other(x)),
}


@pytest.mark.parametrize("function", USES.values(), ids=USES)
def test_modules_that_are_called_twice(function):
    x = torch.randn(sizes(2))
    module = Shared(function)
    prepared = prepared_of(module, x)
    check_floats(module, prepared, x)
    assert len(groups_in(prepared.graph)) == len(norms(prepared)) == models.count(prepared, "batch_norm")
    train(prepared, x)
    converted = check_float_sum(prepared, x)
    assert not norms(converted)
    assert "num_batches_tracked" not in str(list(converted.state_dict()))


def check_float_sum(prepared, x):
    """As ``check_convert``, for a model that ends in a sum in float: two or three integers."""
    return check_convert(prepared, x, steps=3)


def test_tied_weights_of_two_layers():
    module = Shared(lambda m, x: m.one(m.conv(x)) + m.two(m.other(x)))
    module.other.weight = module.conv.weight
    x = torch.randn(sizes(2))
    prepared = prepared_of(module, x)
    train(prepared, x)
    assert not norms(check_float_sum(prepared, x))


# What stays apart.


def reason(model, index=0):
    return norms(model)[index].meta[DECISION_KEY].refusal


def test_another_reader():
    x = torch.randn(sizes(2))
    module = Shared(lambda m, x: (lambda y: m.one(y) + y)(m.conv(x)))
    prepared = prepared_of(module, x)
    assert reason(prepared) == "batch norm is not folded: conv2d is read by add too"
    check_floats(module, prepared, x)
    train(prepared, x)
    converted = convert_pt2e(copy.deepcopy(prepared))
    assert norms(converted)[0].args[5] is False
    assert aten.add_.Tensor not in operators(converted)
    assert torch.allclose(converted(x), in_eval_mode(prepared)(x), atol=1e-5)


def test_no_running_statistics():
    x = torch.randn(sizes(2))
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU())
    prepared = prepared_of(module, x)
    assert reason(prepared) == "batch norm is not folded: it keeps no running statistics and normalizes by each batch"
    check_floats(module, prepared, x)
    train(prepared, x)
    converted = check_convert(prepared, x)
    assert norms(converted)[0].args[5] is True


def test_a_layer_whose_output_is_quantized_before_batch_norm():
    def function(model):
        qat.qat(model)
        models.find(model, "conv2d").meta[KEY].output_qspec = qat.fake_activation()

    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x, ByHand(function))
    assert reason(prepared) == "batch norm is not folded: conv2d is quantized by itself"
    train(prepared, x)
    check_convert(prepared, x)


def test_a_float_layer_is_trained_as_it_is_and_folded():
    x = torch.randn(sizes(2))
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))

    def function(model):
        qat.qat(model)
        for name in ("conv2d", "batch_norm"):
            del models.find(model, name).meta[KEY]

    prepared = prepared_of(module, x, ByHand(function))
    assert not groups_in(prepared.graph)
    train(prepared, x)
    assert not norms(check_convert(prepared, x))


# Modes, and models that are not as they should be.


def test_a_model_in_eval_mode_is_trained():
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    assert norms(prepare_qat_pt2e(export(module, x), OURS))[0].args[5] is True


def test_a_frozen_batch_norm_stays_frozen():
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)))
    module[1].eval()
    prepared = prepare_qat_pt2e(export(module, x), OURS)
    assert [norm.args[5] for norm in norms(prepared)] == [False, True]
    check_floats(module, prepared, x)
    train(prepared, x)
    assert not norms(check_convert(prepared, x))


def test_statistics_that_would_never_move_stay_frozen():
    """In eval mode, export writes ``momentum=None`` as 0."""
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None))).eval()
    prepared = prepare_qat_pt2e(export(module, torch.randn(sizes(2))), OURS)
    assert norms(prepared)[0].args[5:7] == (False, 0.0)


def test_channels_whose_factor_is_0():
    """torchao divides 0 by 0 there."""
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    with torch.no_grad():
        module[1].weight[::2] = 0
    prepared = prepare_qat_pt2e(export(module, x), OURS)
    check_floats(module, prepared, x)
    prepared(x)
    converted = check_convert(prepared, x)
    weight = argument(models.find(converted, "conv2d"), "weight")
    assert converted.get_buffer(weight.args[0].target)[::2].count_nonzero() == 0


def test_dropout_ends():
    x = torch.randn(sizes(2))
    layers = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
    prepared = prepared_of(nn.Sequential(*layers), x)
    prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), converted(x))


@pytest.mark.parametrize("table", [None, {}], ids=["all", "only functional"])
def test_a_decomposed_program(table):
    x = torch.randn(sizes(2))
    module = trained_mode(Shared(lambda m, x: m.one(m.conv(m.one(m.conv(x)).relu())) + m.two(m.other(x))))
    program = torch.export.export(module, (x,)).run_decompositions(table)
    prepared = prepare_qat_pt2e(program.module(), OURS)
    assert len(groups_in(prepared.graph)) == 3
    assert all(norm.target is aten.batch_norm.default for norm in norms(prepared))
    check_floats(module, prepared, x)
    train(prepared, x)
    converted = check_float_sum(prepared, x)
    assert not norms(converted)
    assert not {aten.copy_.default, aten.add_.Tensor} & set(operators(converted))


def test_a_product_with_a_matrix():
    module = models.Applied(lambda m, x: m.norm(x @ m.matrix), norm=NORM[1](6))
    module.matrix = nn.Parameter(torch.randn(4, 6))
    x = torch.randn(8, 4)
    prepared = prepared_of(module, x)
    assert operator_of(prepared) == "linear"
    check_floats(module, prepared, x)
    train(prepared, x)
    assert not norms(check_convert(prepared, x))


def test_moves_between():
    x = torch.randn(4, 4, 3)
    module = models.Applied(lambda m, x: m.norm(m.conv(x).squeeze(-1)), conv=nn.Conv1d(4, 6, 3), norm=NORM[1](6))
    prepared = prepared_of(module, x, ByHand(after_squeeze))
    assert len(groups_in(prepared.graph)) == 1
    check_floats(module, prepared, x)
    train(prepared, x)
    assert not norms(check_convert(prepared, x))


def after_squeeze(model):
    qat.qat(model)
    models.find(model, "conv1d").meta[KEY].output_qspec = None
    norm = models.find(model, "batch_norm")
    norm.meta[KEY] = qat.OURS.QuantizationAnnotation(output_qspec=qat.fake_activation(), _annotated=True)


def test_a_weight_that_is_computed():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    module, x = nn.Sequential(conv, nn.BatchNorm2d(6)), torch.randn(sizes(2))
    prepared = prepared_of(module, x)
    check_floats(module, prepared, x)
    train(prepared, x)
    assert not norms(check_convert(prepared, x))


def test_a_node_of_a_group_that_is_gone():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x)
    prepared(x)
    del groups_in(prepared.graph)[0]["norm"].meta[QAT_KEY]
    with pytest.raises(GraphError, match=r"these are gone: norm\. Leave the nodes with the metadata qat_conv_bn"):
        convert_pt2e(prepared)


def test_what_prepare_pt2e_refuses():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x)
    with pytest.raises(GraphError, match="prepare_qat_pt2e: the model is prepared already"):
        prepare_qat_pt2e(prepared, OURS)


def test_after_training_metadata_is_that_of_the_layer():
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    model = torch.export.export(module, (x,), strict=True).module()
    source = models.find(model, "conv2d").meta["source_fn_stack"]
    prepared = prepare_qat_pt2e(model, OURS)
    prepared(x)
    converted = convert_pt2e(prepared)
    conv = models.find(converted, "conv2d")
    assert argument(conv, "bias").meta["source_fn_stack"] == source
    assert argument(conv, "weight").args[0].meta["source_fn_stack"] == source
    assert not [node for node in converted.graph.nodes if QAT_KEY in node.meta and node is not conv]


def test_parameters_keep_their_places_where_no_one_else_reads_them():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x)
    prepared(x)
    names = {name for name, _ in convert_pt2e(prepared).named_parameters()}
    assert names == {"0.bias"}


def test_the_users_module_is_not_changed():
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    prepared = prepare_qat_pt2e(export(module, x), OURS)
    prepared(x)
    before = copy.deepcopy(module.state_dict())
    convert_pt2e(prepared)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_training_resumes_from_a_state():
    x = torch.randn(sizes(2))
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    first, second = prepared_of(copy.deepcopy(module), x), prepared_of(copy.deepcopy(module), x)
    train(first, x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(train(first, x), train(second, x))


def test_calibration_does_not_put_batch_norm_into_this_form():
    x = torch.randn(sizes(2))
    module = trained_mode(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    prepared = prepare_pt2e(export(module, x), OURS)
    assert not norms(prepared)
    assert not groups_in(prepared.graph)


def test_all_arithmetic_is_gone():
    x = torch.randn(sizes(2))
    prepared = prepared_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x)
    prepared(x)
    rest = set(operators(convert_pt2e(prepared))) - {*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS, operator.getitem}
    assert rest == {aten.conv2d.default, aten.relu.default}
