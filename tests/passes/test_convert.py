"""Observers become quantize and dequantize operators."""

import copy
import io

import models
import pytest
import quantizers
import torch
from quantizers import KEY, OURS, annotate
from torch import nn

from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.core.errors import CalibrationError, CaptureError, GraphError, NonFiniteError, SpecError
from zeropoint.core.specs import FixedQParamsQuantizationSpec, QuantizationSpec
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.show import show
from zeropoint.numerics import ops
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerGroupMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
    PlaceholderObserver,
)
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

aten = torch.ops.aten
PER_TENSOR = quantizers.activation(qscheme=torch.per_tensor_symmetric, quant_min=-127)
QDQ = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)


def by(function):
    return quantizers.ByHand(function)


def prepared(build, function=quantizers.static, calibrate=True):
    _, inputs = build()
    model = prepare_pt2e(models.exported(build), by(function))
    if calibrate:
        with torch.no_grad():
            model(*inputs)
    return model


def converted(build, function=quantizers.static, **settings):
    return convert_pt2e(prepared(build, function), **settings)


def linear_with(**specs):
    """Returns an annotate function for the first linear layer."""
    output = specs.pop("output", None)
    return lambda model: annotate(models.find(model, "linear"), specs, output)


def close_to_float(model, build, decibels=25.0):
    module, inputs = build()
    expected, actual = module(*inputs), model(*inputs)
    assert 10 * torch.log10(expected.pow(2).mean() / (expected - actual).pow(2).mean()) > decibels


# What is emitted.


def test_per_tensor_literals_and_per_channel_buffers():
    model = converted(models.linear)
    q = models.find(model, "quantize_per_tensor")
    assert isinstance(q.args[1], float)
    assert isinstance(q.args[2], int)
    dq = models.find(model, "dequantize_per_channel")
    assert [read.op for read in dq.args[:3]] == ["get_attr"] * 3
    buffers = dict(model.named_buffers())
    assert buffers[dq.args[0].target].dtype == torch.int8
    assert buffers[dq.args[1].target].dtype == torch.float32
    assert buffers[dq.args[2].target].dtype == torch.int64
    assert dq.args[1].target.startswith("_scale_")
    assert dq.args[2].target.startswith("_zero_point_")
    assert dq.args[3:] == (0, -127, 127, torch.int8)


def test_integers_and_scales_are_those_of_the_observers():
    module, inputs = models.linear()
    model = converted(models.linear)
    observer = MinMaxObserver(torch.int8, torch.per_tensor_affine)
    observer(inputs[0])
    scale, zero_point = observer.calculate_qparams()
    q = models.find(model, "quantize_per_tensor")
    assert q.args[1:] == (scale.item(), zero_point.item(), -128, 127, torch.int8)
    weights = PerChannelMinMaxObserver(0, torch.int8, torch.per_channel_symmetric, quant_min=-127, quant_max=127)
    weights(module.weight)
    scales, _ = weights.calculate_qparams()
    expected = (module.weight / scales[:, None]).round().clamp(-127, 127)
    assert torch.equal(model._frozen_param0.float(), expected)
    close_to_float(model, models.linear)


@pytest.mark.parametrize("build", [models.net, models.mlp, models.branches, models.conv_relu, models.adds])
def test_converted_models_compute_about_the_same(build):
    close_to_float(converted(build), build, 18.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("limits", [(-128, 127), (None, None)])
def test_dynamic(symmetric, limits):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    spec = QuantizationSpec(torch.int8, PlaceholderObserver, *limits, scheme, is_dynamic=True)
    model = converted(models.mlp, linear_with(input=spec, weight=quantizers.weight()))
    choose = models.find(model, "choose_qparams_symmetric" if symmetric else "choose_qparams")
    assert choose.args[1:] == (-128, 127, PlaceholderObserver().eps, torch.int8)
    linear = models.find(model, "linear")
    dq = linear.args[0]
    assert dq.target is ops.DEQUANTIZE_PER_TENSOR_TENSOR
    assert dq.args[0].target is ops.QUANTIZE_PER_TENSOR_TENSOR
    assert [n.args[0] for n in dq.args[1:3]] == [choose, choose]
    close_to_float(model, models.mlp)
    assert all("val" in node.meta for node in model.graph.nodes if node.op == "call_function")


def test_dynamic_needs_no_data():
    spec = QuantizationSpec(torch.int8, PlaceholderObserver, -128, 127, torch.per_tensor_affine, is_dynamic=True)
    function = linear_with(input=spec, weight=quantizers.weight())
    model = convert_pt2e(prepared(models.mlp, function, calibrate=False))
    close_to_float(model, models.mlp)


def test_dynamic_16_bit_is_refused():
    spec = QuantizationSpec(torch.int16, PlaceholderObserver, qscheme=torch.per_tensor_affine, is_dynamic=True)
    with pytest.raises(SpecError, match=r"input_1: dynamic quantization to torch.int16.*Use int8 or uint8"):
        converted(models.mlp, linear_with(input=spec))


def test_float16():
    spec = QuantizationSpec(torch.float16, PlaceholderObserver)
    model = converted(models.mlp, linear_with(weight=spec))
    back = models.find(model, "linear").args[1]
    assert back.args[1] == torch.float32
    assert back.args[0].args[1] == torch.float16
    close_to_float(model, models.mlp, 50.0)


def test_a_float32_placeholder_disappears():
    spec = QuantizationSpec(torch.float32, PlaceholderObserver)
    model = converted(models.mlp, linear_with(input=quantizers.activation(), bias=spec))
    assert models.find(model, "linear").args[2].target == "0.bias"


def grouped(scheme=torch.per_channel_symmetric, dtype=torch.int8, low=-8, high=7, **settings):
    observer = PerGroupMinMaxObserver.with_args(group_size=2, **settings)
    return QuantizationSpec(dtype, observer, low, high, scheme, 0)


def by_hand(weight, low, high, symmetric):
    """Returns the integers, scales and zero points of groups of two."""
    rows = weight.detach().reshape(-1, 2)
    least, greatest = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if symmetric:
        scale, zero_point = torch.maximum(-least, greatest) / ((high - low) / 2), torch.zeros(len(rows))
    else:
        scale = (greatest - least) / (high - low)
        zero_point = (low - (least / scale).round()).clamp(low, high)
    integers = (rows * (1 / scale[:, None]) + zero_point[:, None]).round().clamp(low, high)
    shape = (len(weight), -1)
    return integers.reshape(weight.shape), scale.reshape(shape), zero_point.reshape(shape)


@pytest.mark.parametrize(
    ("spec", "symmetric"),
    [
        (grouped(), True),
        (grouped(low=-127, high=127), True),
        (grouped(torch.per_channel_affine), False),
        (grouped(torch.per_channel_affine, torch.uint8, 0, 15), False),
        (grouped(torch.per_channel_affine, torch.uint8, 0, 255), False),
    ],
    ids=["int4", "int8", "affine int4", "affine uint4", "affine uint8"],
)
def test_weights_per_group(spec, symmetric):
    module, (x,) = models.linear()
    model = converted(models.linear, linear_with(weight=spec))
    integers, scale, zero_point = by_hand(module.weight, spec.quant_min, spec.quant_max, symmetric)
    dq = models.find(model, "dequantize_per_channel_group")
    assert dq.args[3:] == (spec.quant_min, spec.quant_max, spec.dtype, 2, torch.float32)
    stored = dict(model.named_buffers())
    assert stored[dq.args[0].target].dtype == spec.dtype
    assert torch.equal(stored[dq.args[0].target].float(), integers)
    assert torch.equal(stored[dq.args[1].target], scale)
    assert torch.equal(stored[dq.args[2].target].float(), zero_point)
    real = ((integers - zero_point.repeat_interleave(2, 1)) * scale.repeat_interleave(2, 1)).to(torch.float32)
    assert torch.equal(model(x), nn.functional.linear(x, real, module.bias))
    assert dq.meta["val"].shape == (3, 4)
    assert not [name for name in model.state_dict() if name.endswith("weight")]
    again = torch.export.export(model, (x,)).module()
    assert torch.equal(again(x), model(x))


def test_weights_per_group_that_are_not_folded():
    model = converted(models.linear, linear_with(weight=grouped()), fold_quantize=False)
    folded = converted(models.linear, linear_with(weight=grouped()))
    q = models.find(model, "quantize_per_channel_group")
    assert q.args[3:] == (-8, 7, torch.int8, 2)
    assert q.meta["val"].dtype == torch.int8
    _, (x,) = models.linear()
    assert torch.equal(model(x), folded(x))


@pytest.mark.parametrize("kind", [MovingAveragePerGroupMinMaxObserver, PerGroupMinMaxObserver])
def test_fake_quantizers_per_group(kind):
    observer = FakeQuantize.with_args(observer=kind.with_args(group_size=2))
    spec = QuantizationSpec(torch.int8, observer, -8, 7, torch.per_channel_symmetric)
    model = prepared(models.linear, linear_with(weight=spec))
    _, (x,) = models.linear()
    trained = model(x)
    torch.testing.assert_close(convert_pt2e(model)(x), trained)


def test_weights_per_group_of_another_float_dtype():
    module, (x,) = models.linear()
    model = models.export(module.bfloat16(), x.bfloat16())
    model = prepare_pt2e(model, by(linear_with(weight=grouped())))
    model = convert_pt2e(model)
    assert models.find(model, "dequantize_per_channel_group").args[-1] == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int64, torch.int4])
def test_a_type_that_nothing_is_quantized_to_is_not_left_float(dtype):
    class Foreign(nn.Identity):
        qscheme, is_dynamic = torch.per_tensor_affine, False

        def calculate_qparams(self):
            return torch.ones(1), torch.zeros(1)

    Foreign.dtype = dtype
    spec = quantizers.activation(observer_or_fake_quant_ctr=lambda **fields: Foreign())
    model = prepared(models.linear, linear_with(input=spec), calibrate=False)
    with pytest.raises(SpecError, match=rf"input_1: dtype={dtype} is no type to quantize to"):
        convert_pt2e(model)
    assert [node.op for node in model.graph.nodes].count("call_module") == 1


def test_fixed():
    fixed = FixedQParamsQuantizationSpec(torch.int8, 0.125, 3, -128, 127, torch.per_tensor_affine)
    model = converted(models.mlp, linear_with(input=fixed))
    assert models.find(model, "quantize_per_tensor").args[1:3] == (0.125, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_float_dtypes_come_back_as_what_they_were(dtype, dynamic):
    module, (x,) = models.linear()
    module, x = module.to(dtype), x.to(dtype)
    act = quantizers.activation()
    if dynamic:
        act = QuantizationSpec(torch.int8, PlaceholderObserver, -128, 127, torch.per_tensor_affine, is_dynamic=True)
    model = prepare_pt2e(models.export(module, x), by(linear_with(input=act, weight=quantizers.weight())))
    model(x)
    model = convert_pt2e(model)
    assert model(x).dtype == dtype
    assert {n.kwargs.get("out_dtype") for n in model.graph.nodes if n.target in ops.DEQUANTIZE_OPS} == {dtype}


def test_legacy_dtypes_become_plain():
    spec = quantizers.activation(dtype=torch.quint8, quant_min=0, quant_max=255)
    model = converted(models.mlp, linear_with(input=spec))
    assert models.find(model, "quantize_per_tensor").args[5] == torch.uint8


def test_16_bit():
    spec = quantizers.activation(dtype=torch.int16, quant_min=-32768, quant_max=32767)
    close_to_float(converted(models.mlp, linear_with(input=spec, output=spec)), models.mlp, 70.0)


# Constants.


def test_constants_stay_float_where_they_are_not_to_be_folded():
    model = converted(models.linear, fold_quantize=False)
    q = models.find(model, "quantize_per_channel")
    assert q.args[0].target == "weight"
    assert not models.count(converted(models.linear), "quantize_per_channel")
    _, inputs = models.linear()
    assert torch.allclose(model(*inputs), converted(models.linear)(*inputs))


def test_float_weights_are_dropped_nested_ones_too():
    model = converted(models.net)
    state = model.state_dict()
    floats = [name for name, value in state.items() if value.is_floating_point()]
    assert not [name for name in floats if name.endswith("weight")]
    assert "blocks.0.conv.weight" not in state
    assert sum(name.startswith("_frozen_param") for name in state) == 3


def test_saved_files_shrink():
    module = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    x = torch.randn(2, 128)
    model = prepare_pt2e(models.export(module, x), quantizers.STATIC)
    model(x)

    def size(program):
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return len(buffer.getvalue())

    before, after = size(torch.export.export(module, (x,))), size(torch.export.export(convert_pt2e(model), (x,)))
    assert after < before * 0.5


def test_equal_readings_of_one_weight_are_one_buffer():
    model = converted(models.called_twice)
    assert sum(name.startswith("_frozen_param") for name in model.state_dict()) == 1
    close_to_float(model, models.called_twice)


def test_different_readings_of_one_weight_are_two():
    def function(model):
        for index, spec in ((0, quantizers.weight()), (1, PER_TENSOR)):
            annotate(models.find(model, "linear", index), {"weight": spec})

    model = converted(models.called_twice, function)
    assert sum(name.startswith("_frozen_param") for name in model.state_dict()) == 2


def test_operators_between_weight_and_observer_are_folded_in():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x.matmul(self.w.t())

    x = torch.randn(2, 4)
    act = quantizers.activation()
    model = models.export(Transposed(), x)
    model = prepare_pt2e(model, by(lambda m: annotate(models.find(m, "matmul"), {"self": act, "other": PER_TENSOR})))
    model(x)
    model = convert_pt2e(model)
    assert not models.count(model, "t")
    assert model._frozen_param0.shape == (4, 3)


def test_weights_need_no_calibration():
    function = linear_with(weight=quantizers.weight())
    with_data, without = (convert_pt2e(prepared(models.mlp, function, c)) for c in (True, False))
    assert torch.equal(with_data._frozen_param0, without._frozen_param0)


def test_a_weight_changed_after_calibration_is_quantized_as_it_is_now():
    model = prepared(models.mlp, linear_with(weight=quantizers.weight()))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(10)
    scale = convert_pt2e(model)._scale_0
    before = convert_pt2e(prepared(models.mlp, linear_with(weight=quantizers.weight())))._scale_0
    assert torch.allclose(scale, before * 10)


def test_mutable_buffers_are_quantized_at_run_time():
    def function(model):
        annotate(models.find(model, "add"), {"self": quantizers.activation()})

    model = converted(models.counter, function)
    assert models.find(model, "quantize_per_tensor").args[0].target == "state"
    assert not [name for name in model.state_dict() if "frozen" in name]


# Readers.


def test_each_annotated_reader_has_a_dequantize_of_its_own_and_the_others_share():
    def function(model):
        act = quantizers.activation()
        annotate(models.find(model, "linear", 0), {}, act)
        annotate(models.find(model, "linear", 1), {"input": act})

    model = converted(models.branches, function)
    readers = [{user.name for user in n.users} for n in model.graph.nodes if n.target in ops.DEQUANTIZE_OPS]
    assert sorted(readers, key=len) == [{"linear_1"}, {"linear_2", "cat"}]
    assert models.count(model, "quantize_per_tensor") == 1


def test_annotated_nodes_never_share_a_dequantize():
    for build in (models.net, models.branches, models.adds, models.called_twice):
        model = converted(build)
        for node in model.graph.nodes:
            if node.target in ops.DEQUANTIZE_OPS and any(KEY in user.meta for user in node.users):
                assert len(node.users) == 1


def test_a_tensor_read_twice_by_one_node():
    model = converted(models.adds)
    add = models.find(model, "add", 1)
    assert add.args[0] is add.args[1]


def test_two_scales_of_one_tensor_are_a_requantization():
    def function(model):
        annotate(models.find(model, "linear", 0), {}, quantizers.activation())
        annotate(models.find(model, "linear", 1), {"input": quantizers.activation(quant_max=100)})

    model = converted(models.branches, function)
    dq = models.find(model, "linear", 1).args[0]
    assert dq.args[4] == 100
    assert dq.args[0].args[0].target is ops.DEQUANTIZE_PER_TENSOR
    close_to_float(model, models.branches)


# Metadata.


@pytest.mark.parametrize("build", [models.net, models.branches])
def test_metadata_of_new_nodes(build):
    model = converted(build)
    for node in model.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            assert "val" in node.meta, node
        if node.op == "call_function":
            assert node.meta.get("stack_trace") or node.args[0].op in ("placeholder", "get_attr"), node
            assert "from_node" in node.meta or node.target not in QDQ
    for node in model.graph.nodes:
        if node.target in ops.DEQUANTIZE_OPS:
            (reader,) = node.users
            if KEY in reader.meta:
                assert node.meta["stack_trace"] == reader.meta["stack_trace"]
        if node.target in QDQ:  # By these, passes of backends would take it for a part of the layer.
            assert not {"source_fn_stack", "torch_fn", "nn_module_stack"} & set(node.meta)


def test_values_have_the_dtype_that_the_operators_give():
    model = converted(models.net)
    values = {n: n.meta["val"] for n in model.graph.nodes if n.target in QDQ}
    assert {v.dtype for n, v in values.items() if n.target in ops.QUANTIZE_OPS} == {torch.int8}
    assert {v.dtype for n, v in values.items() if n.target in ops.DEQUANTIZE_OPS} == {torch.float32}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            stored = dict([*model.named_buffers(), *model.named_parameters()])[node.target]
            assert (node.meta["val"].shape, node.meta["val"].dtype) == (stored.shape, stored.dtype)


def test_metadata_of_existing_nodes_is_kept():
    _, inputs = models.net()
    model = models.exported(models.net)
    before = {n.name: dict(n.meta) for n in model.graph.nodes if n.op == "call_function"}
    model = prepare_pt2e(model, quantizers.STATIC)
    model(*inputs)
    for node in convert_pt2e(model).graph.nodes:
        for key, value in before.get(node.name, {}).items():
            assert key in node.meta
            is_folded = key == "from_node" and node.name.startswith("conv2d")  # It computes batch norm now.
            assert key == "val" or is_folded or node.meta[key] == value


def test_the_models_own_metadata_is_kept():
    model = prepared(models.linear)
    model.meta["mine"] = 1
    result = convert_pt2e(model)
    assert result.meta["mine"] == 1
    assert result.graph is model.graph


# What is refused.


def test_a_model_that_was_not_prepared():
    with pytest.raises(GraphError, match=r"convert_pt2e: the model has no observers: it was not prepared\. Give the"):
        convert_pt2e(models.exported(models.linear))


@pytest.mark.parametrize("which", ["prepared", "converted"])
def test_a_second_convert(which):
    model = prepared(models.linear)
    again = {"prepared": model, "converted": convert_pt2e(model)}[which]
    with pytest.raises(GraphError, match=r"no observers: it was converted already\. Convert it once"):
        convert_pt2e(again)


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
@pytest.mark.parametrize("composed", [True, False])
def test_a_quantizer_that_annotated_nothing(prepare, composed):
    module, inputs = models.linear()
    quantizer = by(lambda model: None)
    model = prepare(models.exported(models.linear), ComposableQuantizer([quantizer]) if composed else quantizer)
    words = (
        r"convert_pt2e: the quantizer annotated nothing .* stays float\. Give prepare_pt2e a quantizer that annotates"
    )
    with pytest.warns(UserWarning, match=words) as warned:
        result = convert_pt2e(model)
    assert warned[0].filename == __file__
    assert torch.equal(result(*inputs), module(*inputs))


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
def test_a_quantizer_that_is_composed_of_none(prepare):
    module, inputs = models.linear()
    result = convert_pt2e(prepare(models.exported(models.linear), ComposableQuantizer([])))
    assert not any(node.target in ops.DEQUANTIZE_OPS for node in result.graph.nodes)
    assert torch.equal(result(*inputs), module(*inputs))


def test_a_module_that_is_not_exported():
    with pytest.raises(CaptureError, match="got Linear, not an exported graph module"):
        convert_pt2e(models.linear()[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_reference_representation": "yes"}, "convert_pt2e: use_reference_representation='yes' is no bool"),
        ({"fold_quantize": 1}, "convert_pt2e: fold_quantize=1 is no bool"),
    ],
)
def test_flags(settings, words):
    with pytest.raises(SpecError, match=words):
        convert_pt2e(prepared(models.linear), **settings)


def test_no_data_names_the_tensor():
    with pytest.raises(
        CalibrationError, match=r"input_1.*: no data reached this MinMaxObserver. Run the prepared model"
    ):
        convert_pt2e(prepared(models.linear, calibrate=False))


def test_converting_again_after_an_error_is_converting_once():
    """The model of a convert that failed is as it was: calibrate it, as the message says, and convert."""
    _, inputs = models.mlp()
    model = prepared(models.mlp, calibrate=False)
    before = show(model)
    with pytest.raises(CalibrationError, match="Run the prepared model"):
        convert_pt2e(model)
    assert show(model) == before
    model(*inputs)
    torch.testing.assert_close(convert_pt2e(model)(*inputs), converted(models.mlp)(*inputs), rtol=0, atol=0)


def test_converting_in_inference_mode(monkeypatch, recwarn):
    """Large weights get their memory from another thread, which is in no such mode."""
    monkeypatch.setattr("zeropoint.numerics.scratch.WORTH_A_THREAD", 1)
    _, inputs = models.mlp()
    with torch.inference_mode():
        model = prepared(models.mlp)
        inside = convert_pt2e(model)(*inputs)
    assert torch.equal(inside, converted(models.mlp)(*inputs))
    assert not [warning for warning in recwarn if "thread" in str(warning.message)]


def test_no_data_reached_a_fake_quantizer():
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
    function = linear_with(input=quantizers.activation(observer_or_fake_quant_ctr=fake))
    with pytest.raises(CalibrationError, match="input_1: no data reached this FakeQuantize"):
        convert_pt2e(prepared(models.linear, function, calibrate=False))


def test_nan_names_the_tensor():
    model = prepared(models.linear, calibrate=False)
    with pytest.raises(NonFiniteError, match=r"input_1, read as linear.input: NaN in batch 0"):
        model(torch.full((2, 4), float("nan")))


def test_a_scale_that_is_not_positive_and_finite():
    class Broken(MinMaxObserver):
        def calculate_qparams(self):
            return torch.tensor([0.0]), torch.tensor([0])

    function = linear_with(input=quantizers.activation(observer_or_fake_quant_ctr=Broken))
    with pytest.raises(CalibrationError, match=r"input_1.*: its scale is \[0.0\]"):
        converted(models.linear, function)


def test_torchaos_observers_without_data_are_an_error_too():
    observer = pytest.importorskip("torchao.quantization.pt2e").MinMaxObserver
    function = linear_with(input=quantizers.activation(observer_or_fake_quant_ctr=observer))
    with pytest.raises(CalibrationError, match=r"input_1.*: no data reached"):
        convert_pt2e(prepared(models.linear, function, calibrate=False))


@pytest.mark.parametrize("name", ["HistogramObserver", "MovingAverageMinMaxObserver", "default_fake_quant"])
def test_more_of_torchaos_without_data(name):
    constructor = getattr(pytest.importorskip("torchao.quantization.pt2e"), name)
    if name == "default_fake_quant":
        from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver

        constructor = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
    function = linear_with(input=quantizers.activation(observer_or_fake_quant_ctr=constructor))
    with pytest.raises(CalibrationError, match=r"input_1.*: no data reached"):
        convert_pt2e(prepared(models.linear, function, calibrate=False))


# Observers that convert themselves.


class Halving(ObserverBase):
    """Replaces itself by an operator of its own, and leaves its value to others, as torchao's affine observers do."""

    def __init__(self, dtype=torch.int8, **spec):
        super().__init__(dtype)

    def calculate_qparams(self):
        raise NotImplementedError

    def convert(self, model, node):
        model.register_buffer("_half", torch.tensor(0.5))
        with model.graph.inserting_before(node):
            half = model.graph.get_attr("_half")
            product = model.graph.call_function(aten.mul.Tensor, (node.args[0], half))
        node.replace_all_uses_with(product)
        model.graph.erase_node(node)


def test_an_observer_that_converts_itself():
    spec = quantizers.activation(observer_or_fake_quant_ctr=Halving)
    model = converted(models.linear, linear_with(input=spec, weight=quantizers.weight()))
    module, (x,) = models.linear()
    assert torch.allclose(model(x), module(x / 2), atol=0.05)
    assert models.find(model, "mul").meta["val"].shape == (2, 4)
    assert not [m for m in model.modules() if isinstance(m, ObserverBase)]


def test_torchaos_affine_observers():
    ao = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver

    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=ao.MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=ao.PerGroup(2), eps=2**-12
    )
    spec = QuantizationSpec(torch.int8, observer, -128, 127)
    model = converted(models.linear, linear_with(weight=spec))
    close_to_float(model, models.linear)
    assert all("val" in n.meta for n in model.graph.nodes if n.op == "call_function")


# What is done with the result.


@pytest.mark.parametrize("build", [models.net, models.branches])
def test_converted_models_export_again(build):
    _, inputs = build()
    model = converted(build)
    again = torch.export.export(model, inputs)
    assert torch.equal(again.module()(*inputs), model(*inputs))
    assert not [name for name in again.state_dict if "blocks" in name and name.endswith("weight")]


def test_converted_models_can_be_part_of_a_model_that_is_quantized():
    inner = converted(models.linear)
    outer = models.Applied(lambda m, x: m.act(m.inner(x)) + 1, inner=inner, act=nn.ReLU())
    _, (x,) = models.linear()
    model = prepare_pt2e(
        models.export(outer, x), by(lambda m: annotate(models.find(m, "relu"), {"self": quantizers.activation()}))
    )
    model(x)
    assert torch.allclose(convert_pt2e(model)(x), outer(x), atol=0.05)


def test_a_copy_of_a_prepared_model_converts_equally():
    model = prepared(models.net)
    other = copy.deepcopy(model)
    _, inputs = models.net()
    one, two = convert_pt2e(model), convert_pt2e(other)
    assert show(one) == show(two)
    assert torch.equal(one(*inputs), two(*inputs))
    assert one.meta.keys() == two.meta.keys()


def test_a_copy_with_derived_observers():
    def product(observers):
        scales = [observer.calculate_qparams()[0] for observer in observers]
        return scales[0] * scales[1], torch.zeros_like(scales[1], dtype=torch.int64)

    def function(model):
        linear = models.find(model, "linear")
        x, w, _ = linear.args
        bias = OURS.DerivedQuantizationSpec(
            [(x, linear), (w, linear)], product, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
        )
        annotate(linear, {"input": quantizers.activation(), "weight": quantizers.weight(), "bias": bias})

    model = prepared(models.linear, function)
    one, two = convert_pt2e(copy.deepcopy(model)), convert_pt2e(model)
    assert show(one) == show(two)
    dq = models.find(one, "linear").args[2]
    assert one.get_buffer(dq.args[0].target).dtype == torch.int32
    assert dq.args[3] == 0
    close_to_float(one, models.linear)


def test_statistics_can_be_saved_and_loaded():
    source = prepared(models.net)
    target = prepared(models.net, calibrate=False)
    target.load_state_dict(source.state_dict())
    assert show(convert_pt2e(target)) == show(convert_pt2e(source))


def test_a_dynamic_batch():
    module, inputs = models.net()
    batch = torch.export.Dim("batch", min=1, max=64)
    model = torch.export.export(module, inputs, dynamic_shapes=({0: batch},)).module()
    model = prepare_pt2e(model, quantizers.STATIC)
    model(*inputs)
    model = convert_pt2e(model)
    assert model(torch.randn(5, 3, 6, 6)).shape == (5, 5)
    again = torch.export.export(model, inputs, dynamic_shapes=({0: batch},))
    assert again.module()(torch.randn(7, 3, 6, 6)).shape == (7, 5)


# Control flow.


@pytest.mark.parametrize("build", [models.conditional, models.looped, models.scanned])
def test_bodies_of_control_flow(build):
    model = prepared(build)
    module, inputs = build()
    # cond runs one branch: let the other one see data, too
    with torch.no_grad():
        model(*(-x for x in inputs))
    model = convert_pt2e(model)
    body = next(body for _, body in bodies(model) if models.count(body, "linear"))
    assert models.find(body, "linear").args[0].target in ops.DEQUANTIZE_OPS
    with torch.no_grad():
        assert torch.allclose(model(*inputs), module(*inputs), atol=0.1)
        model.recompile()


def test_a_branch_that_no_data_reached_is_an_error():
    model = prepared(models.conditional, calibrate=False)
    with torch.no_grad():
        model(torch.full((2, 4), -1.0))
    with pytest.raises(CalibrationError, match="no data reached"):
        convert_pt2e(model)
