"""The small functions and passes of torchao's package: ours give what torchao's give."""

import copy
import importlib
import warnings

import models
import pytest
import quantizers
import torch
from quantizers import annotate
from torch import nn

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.graph.show import show
from zeropoint.numerics import ops
from zeropoint.pt2e import quantizer as ours_quantizer
from zeropoint.pt2e import utils as ours
from zeropoint.pt2e.constant_fold import constant_fold
from zeropoint.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from zeropoint.pt2e.quantize_pt2e import _convert_to_reference_decomposed_fx
from zeropoint.workflow import convert_pt2e, prepare_pt2e

pytest.importorskip("torchao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = importlib.import_module("torchao.quantization.pt2e.utils")
    theirs_quantizer = importlib.import_module("torchao.quantization.pt2e.quantizer")
    theirs_fold = importlib.import_module("torchao.quantization.pt2e.constant_fold").constant_fold

SCHEMES = (
    torch.per_tensor_affine, torch.per_tensor_symmetric, torch.per_channel_affine, torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)  # fmt: skip
RANGES = [(torch.int8, -128, 127), (torch.int8, -127, 127), (torch.uint8, 0, 255), (torch.quint8, 0, 127)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@pytest.mark.parametrize("custom", [True, False])
def test_scales_of_ranges(scheme, dtype, low, high, custom):
    eps = torch.tensor([2.0**-20])
    ends = [(torch.tensor(-1.7), torch.tensor(3.1)), (torch.tensor(0.3), torch.tensor(0.4)), (torch.zeros(()),) * 2]
    if scheme in ours.PER_CHANNEL:
        ends = [tuple(map(torch.stack, zip(*ends, strict=True)))]
    for smallest, largest in ends:
        arguments = (smallest, largest, low, high, dtype, eps, custom, scheme)
        expected, found = theirs.determine_qparams(*arguments), ours.determine_qparams(*arguments)
        for a, b in zip(expected, found, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)


def test_ranges_of_nothing():
    nothing = [(torch.tensor([]),) * 2, (torch.tensor(torch.inf), torch.tensor(-torch.inf))]
    for ends in nothing:
        with pytest.warns(UserWarning, match="no data was observed"):
            assert not ours.check_min_max_valid(*ends)
        with pytest.warns(UserWarning, match="no data"):
            scale, zero_point = ours.determine_qparams(*ends, 0, 255, torch.uint8, torch.tensor([1e-6]), True)
        assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    assert ours.check_min_max_valid(torch.tensor(1.0), torch.tensor(1.0))
    for ends in ((2.0, 1.0), (torch.nan, 1.0)):
        with pytest.raises(CalibrationError):
            ours.check_min_max_valid(*map(torch.tensor, ends))


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.qint8, torch.uint8, torch.quint8, torch.int16, torch.uint16, torch.int32, torch.quint4x2],
)
@pytest.mark.parametrize("reduce_range", [True, False])
def test_ranges_of_integers(dtype, reduce_range):
    for custom, low, high in ((False, None, None), (True, 0, 15)):
        arguments = (low, high, custom, dtype, reduce_range)
        assert ours.calculate_qmin_qmax(*arguments) == theirs.calculate_qmin_qmax(*arguments)
    assert ours.to_underlying_dtype(dtype) == theirs.to_underlying_dtype(dtype)


def test_ranges_that_are_none_are_refused():
    ours.validate_qmin_qmax(-8, 7)
    for bad in ((1, 7), (-7, -1), (0, 0)):
        with pytest.raises(SpecError, match="is no range that holds 0"):
            ours.validate_qmin_qmax(*bad)


def test_dtypes_without_integers():
    assert ours.to_underlying_dtype(torch.quint2x4) == theirs.to_underlying_dtype(torch.quint2x4) == torch.uint8
    assert ours.to_underlying_dtype(torch.float8_e5m2) == torch.float8_e5m2
    with pytest.raises(SpecError, match="no type to quantize to"):
        ours.to_underlying_dtype(torch.bool)
    with pytest.raises(SpecError, match=r"torch\.float16 has no integers"):
        ours.to_underlying_dtype(torch.float16)


@pytest.mark.parametrize("custom", [True, False])
def test_the_middle_of_four_bits_is_one_of_their_integers(custom):
    ends, eps = (torch.tensor(-1.0), torch.tensor(1.0)), torch.tensor([1e-6])
    found = ours.determine_qparams(*ends, 0, 15, torch.quint4x2, eps, custom, torch.per_tensor_symmetric)
    observer = MinMaxObserver(dtype=torch.quint4x2, qscheme=torch.per_tensor_symmetric)
    observer(torch.stack(ends))
    assert found[1].item() == observer.calculate_qparams()[1].item() == 7


@pytest.mark.parametrize(
    "build",
    [
        lambda: MinMaxObserver(torch.int8, torch.per_tensor_symmetric, quant_min=-127, quant_max=127),
        lambda: PerChannelMinMaxObserver(dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=1),
    ],
)
def test_what_an_observer_says(build):
    observer = build()
    observer(torch.randn(3, 4))
    expected, found = theirs.get_qparam_dict(observer), ours.get_qparam_dict(observer)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]


def test_what_a_placeholder_says():
    assert ours.get_qparam_dict(PlaceholderObserver(dtype=torch.float16)) == {"qscheme": None, "dtype": torch.float16}


class Inner(nn.Module):
    def forward(self, x, key1=3, key2=6):
        return x * key1 + key2


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Inner(), nn.Sequential(nn.Linear(3, 2))

    def forward(self, x):
        return self.b(self.a(x, key2=1) + self.a(x, 5, key2=2))


def test_inputs_of_submodules():
    x = torch.randn(2, 3)
    expected, found = (package.get_fqn_to_example_inputs(Outer(), (x,)) for package in (theirs, ours))
    assert found.keys() == expected.keys() == {"", "a", "b", "b.0"}
    assert found["a"][1:] == expected["a"][1:] == (5, 2)
    assert all(torch.equal(found[path][0], expected[path][0]) for path in found)


def test_parts_of_modules():
    module = Outer()
    assert ours.getattr_from_fqn(module, "b.0.weight") is module.b[0].weight
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for each in (module, module.a, linear):
        expected = theirs.has_no_children_ignoring_parametrizations(each)
        assert ours.has_no_children_ignoring_parametrizations(each) == expected


def test_a_value_becomes_a_buffer():
    model = models.export(nn.Linear(2, 2), torch.randn(1, 2))
    model.register_buffer("_x_0", torch.ones(1))
    with model.graph.inserting_before(next(iter(model.graph.nodes))):
        node = ours.create_getattr_from_value(model, model.graph, "_x_", [1.0, 2.0])
        tensor = ours.create_getattr_from_value(model, model.graph, "_x_", model.weight)
    assert (node.target, tensor.target) == ("_x_1", "_x_2")
    assert torch.equal(model._x_1, torch.tensor([1.0, 2.0]))
    assert model._x_2.data_ptr() != model.weight.data_ptr()
    assert not model._x_2.requires_grad


def shared_dequantize():
    """A converted graph whose annotated readers read one dequantize operator, as before torchao's pass."""

    def function(model):
        act = quantizers.activation()
        annotate(models.find(model, "linear", 0), {}, act)
        annotate(models.find(model, "linear", 1), {"input": act})

    model = convert_pt2e(prepared(models.branches, function))
    pairs = [node for node in model.graph.nodes if node.target in ops.DEQUANTIZE_OPS]
    for each in pairs[1:]:
        each.replace_all_uses_with(pairs[0])
        model.graph.erase_node(each)
    pairs[0].args[0].append(pairs[0])
    return model


def prepared(build, function):
    model = prepare_pt2e(models.exported(build), quantizers.ByHand(function))
    model(*build()[1])
    return model


def test_each_annotated_reader_gets_a_dequantize():
    found, expected = shared_dequantize(), shared_dequantize()
    ours_quantizer.DuplicateDQPass()(found)
    theirs_quantizer.DuplicateDQPass()(expected)
    readers = [
        sorted(
            sorted(user.name for user in node.users) for node in model.graph.nodes if node.target in ops.DEQUANTIZE_OPS
        )
        for model in (found, expected)
    ]
    assert readers[0] == readers[1]
    assert len(readers[0]) == 2
    inputs = models.branches()[1]
    for a, b in zip(found(*inputs), shared_dequantize()(*inputs), strict=True):
        assert torch.equal(a, b)


def without_metadata(build):
    """A converted model whose operators have a line and a tag each, its quantize and dequantize operators none."""
    model = convert_pt2e(prepared(build, quantizers.static), fold_quantize=False)
    for index, node in enumerate(model.graph.nodes):
        node.meta.pop("stack_trace", None)
        node.meta.pop("quantization_tag", None)
        if node.target not in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS):
            node.meta["quantization_tag"] = node.meta["stack_trace"] = f"line {index}"
    return model


class MadeWeights(nn.Module):
    """Weights whose values are moved, and one that is computed, before a layer reads them."""

    def __init__(self):
        super().__init__()
        self.square, self.flat = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        x = nn.functional.linear(x, self.square.permute(1, 0))
        x = nn.functional.linear(x, self.flat.view(4, 4))
        return nn.functional.linear(x, self.square.neg())


def made_weights():
    return MadeWeights().eval(), (torch.ones(2, 4),)


@pytest.mark.parametrize("build", [models.mlp, models.net, made_weights])
def test_metadata_of_quantize_and_dequantize_operators(build):
    found, expected = without_metadata(build), without_metadata(build)
    ours_quantizer.PortNodeMetaForQDQ()(found)
    theirs_quantizer.PortNodeMetaForQDQ()(expected)
    for a, b in zip(found.graph.nodes, expected.graph.nodes, strict=True):
        for key in ("stack_trace", "quantization_tag"):
            assert a.meta.get(key) == b.meta.get(key), a.name


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shared", torch.arange(4.0))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x):
        self.state.add_(x)
        return self.shared.neg() * 2, x + self.shared, self.state * 2


def test_constants_are_folded():
    x = torch.randn(4)
    found, expected = (models.export(Constants(), x) for _ in range(2))
    before = [y.clone() for y in copy.deepcopy(found)(x)]
    constant_fold(found)
    theirs_fold(expected)
    for model in (found, expected):
        frozen = [name for name in dict(model.named_buffers()) if name.startswith("_frozen_param")]
        assert len(frozen) == 1, show(model)
        assert {"shared", "state"} <= set(dict(model.named_buffers()))
        assert all(torch.equal(a, b) for a, b in zip(model(x), before, strict=True))
    kept = models.export(Constants(), x)
    constant_fold(kept, lambda node: node.target is torch.ops.aten.neg.default)
    assert models.count(kept, "mul") == 2


class Numbers(nn.Module):
    """Constants of which numbers are made, and two that one operator returns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("number", torch.tensor(3))
        self.weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        first, second = self.weight.split(3, 1)
        return x * (self.number + 1).item(), x @ first.t().neg(), second.sum()


def test_constants_that_are_no_tensors_stay_computed():
    x = torch.randn(4, 3)
    found, expected = (models.export(Numbers(), x) for _ in range(2))
    before = found(x)
    constant_fold(found)
    theirs_fold(expected)
    operators = [
        [str(node.target) for node in model.graph.nodes if node.op != "get_attr"] for model in (found, expected)
    ]
    assert operators[0] == operators[1]
    assert "aten.item.default" in operators[0]
    frozen = [{name: b for name, b in model.named_buffers() if "_frozen" in name} for model in (found, expected)]
    assert {name: b.shape for name, b in frozen[0].items()} == {name: b.shape for name, b in frozen[1].items()}
    assert not list(found.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found(x), before, strict=True))


def test_weights_of_half_precision_stay_as_they_are():
    half = quantizers.weight(
        dtype=torch.float16,
        quant_min=None,
        quant_max=None,
        qscheme=None,
        observer_or_fake_quant_ctr=PlaceholderObserver,
    )

    def function(model):
        annotate(models.find(model, "linear"), {"weight": half})

    model = _convert_to_reference_decomposed_fx(prepared(models.mlp, function))
    expected = copy.deepcopy(model)
    constant_fold(model)
    theirs_fold(expected)
    assert models.count(model, "convert_element_type") == models.count(expected, "convert_element_type") == 2


def test_weights_stay_integers():
    def function(model):
        annotate(models.find(model, "linear"), {"weight": quantizers.weight()})

    model = _convert_to_reference_decomposed_fx(prepared(models.mlp, function))
    assert models.count(model, "quantize_per_channel") == 1
    constant_fold(model)
    assert models.count(model, "quantize_per_channel") == 0
    assert models.count(model, "dequantize_per_channel") == 1
    assert model._frozen_param0.dtype == torch.int8
    assert "0.weight" not in model.state_dict()
