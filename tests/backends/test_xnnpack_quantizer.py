"""What the user's rules and configurations select, and that models annotated so run rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from tests.backends.xnn_graph import delegates, float_nodes, integer_kinds
from tests.models import Applied, export
from zeropoint import convert_pt2e, prepare_pt2e
from zeropoint.backends.xnnpack import (
    LoweredProgram,
    XNNPACKQuantizer,
    get_default_quantization_config,
    get_symmetric_quantization_config,
    lower_program,
)
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import LoweringError, NothingQuantizedError, RuleError, SpecError
from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.coverage import CoverageRow
from zeropoint.report.record import record_of
from zeropoint.report.torchao_mark import MARK
from zeropoint.runtime.child import run_in_child

aten = torch.ops.aten
INT8 = get_symmetric_quantization_config(is_per_channel=True)
PER_TENSOR = get_symmetric_quantization_config()
Q_AND_DQ = ("quantize_per_tensor", "dequantize_per_tensor")


class Stage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Net(nn.Module):
    """Convolutions in stages, additions, a concatenation and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.ModuleList([Stage(4), Stage(4)])
        self.heads = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        both = torch.cat([stage(x) for stage in self.stages], 1)
        return self.heads(F.adaptive_avg_pool2d(both, 1).flatten(1))


INPUTS = (torch.randn(1, 3, 8, 8),)


def rows(quantizer: XNNPACKQuantizer, module: nn.Module | None = None, *inputs: torch.Tensor) -> list[CoverageRow]:
    torch.manual_seed(0)
    model = export((module or Net()).eval(), *(inputs or INPUTS))
    return list(record_of(prepare_pt2e(model, quantizer)).coverage)


def quantized(quantizer: XNNPACKQuantizer) -> set[str]:
    """Returns ``module:operator`` of what is quantized in the net."""
    return {f"{row.module}:{row.operator}" for row in rows(quantizer) if row.is_quantized}


CONVS = {"stem:conv2d"} | {f"stages.{i}.{name}:conv2d" for i in (0, 1) for name in ("conv1", "conv2")}
RELUS = {"stages.0:relu", "stages.1:relu"}
LINEAR = {"heads.0:linear", "heads.1:relu", "heads.2:linear"}
ADDS = {"stages.0:add", "stages.1:add"}
REST = {":cat", ":adaptive_avg_pool2d", ":flatten"}
EVERYTHING = CONVS | RELUS | LINEAR | ADDS | REST

RULES: tuple[tuple[str, Callable[[XNNPACKQuantizer], object], set[str]], ...] = (
    ("global", lambda q: q.set_global(INT8), EVERYTHING),
    ("module", lambda q: q.set_module_name("stem", INT8), {"stem:conv2d"}),
    (
        "module and all in it",
        lambda q: q.set_module_name("stages.1", INT8),
        {"stages.1.conv1:conv2d", "stages.1.conv2:conv2d", "stages.1:relu", "stages.1:add"},
    ),
    (
        "modules by pattern",
        lambda q: q.set_module_name("stages.*.conv1", INT8),
        {"stages.0.conv1:conv2d", "stages.1.conv1:conv2d"} | RELUS,
    ),
    (
        "list of modules, which is never called",
        lambda q: q.set_module_name("stages", INT8),
        CONVS - {"stem:conv2d"} | RELUS | ADDS,
    ),
    ("module type", lambda q: q.set_module_type(nn.Linear, INT8), LINEAR),
    ("module type by name", lambda q: q.set_module_type("torch.nn.modules.conv.Conv2d", INT8), CONVS | RELUS),
    ("own module type", lambda q: q.set_module_type(Stage, INT8), CONVS - {"stem:conv2d"} | RELUS | ADDS),
    ("operator", lambda q: q.set_operator_type(aten.add.Tensor, INT8), ADDS),
    (
        "operators",
        lambda q: q.set_operator_type(aten.cat.default, INT8).set_operator_type(aten.conv2d.default, INT8),
        CONVS | RELUS | {":cat"},
    ),
    (
        "filter",
        lambda q: q.set_global(INT8).set_filter_function(lambda n: n.target is aten.linear.default),
        LINEAR - {"heads.1:relu"},
    ),
    ("all but a module", lambda q: q.set_global(INT8).set_module_name("heads", None), EVERYTHING - LINEAR),
    ("all but an operator", lambda q: q.set_global(INT8).set_operator_type(aten.cat.default, None), EVERYTHING - REST),
    ("all but a type", lambda q: q.set_global(INT8).set_module_type(nn.Conv2d, None), EVERYTHING - CONVS - RELUS),
    (
        "the inner module wins",
        lambda q: q.set_global(INT8).set_module_name("stages.0", None).set_module_name("stages.0.conv2", INT8),
        EVERYTHING - {"stages.0.conv1:conv2d", "stages.0:relu", "stages.0:add"},
    ),
    (
        "a name wins over a type",
        lambda q: q.set_module_type(nn.Linear, INT8).set_module_name("heads.0", None),
        {"heads.2:linear"},
    ),
    (
        "a type wins over an operator",
        lambda q: (
            q.set_operator_type(aten.linear.default, INT8)
            .set_module_type(nn.Linear, None)
            .set_module_name("stem", INT8)
        ),
        {"stem:conv2d"},
    ),
    (
        "an operator wins over global",
        lambda q: q.set_global(INT8).set_operator_type(aten.relu.default, None),
        EVERYTHING - RELUS - {"heads.1:relu"},
    ),
)  # fmt: skip


@pytest.mark.parametrize(("rule", "expected"), [case[1:] for case in RULES], ids=[case[0] for case in RULES])
def test_rules_select(rule: Callable[[XNNPACKQuantizer], object], expected: set[str]):
    quantizer = XNNPACKQuantizer()
    assert rule(quantizer) is quantizer
    assert quantized(quantizer) == expected


def test_reason_of_what_a_rule_leaves_out():
    quantizer = XNNPACKQuantizer().set_global(INT8).set_module_name("heads.*", None)
    reasons = {row.module: row.reason for row in rows(quantizer) if row.operator == "linear"}
    assert reasons["heads.2"] == "set_module_name('heads.*', None) leaves it out"


def test_two_configurations_in_one_model():
    quantizer = XNNPACKQuantizer().set_global(INT8).set_module_type(nn.Linear, PER_TENSOR)
    prepared = prepare_pt2e(export(Net().eval(), *INPUTS), quantizer)
    prepared(*INPUTS)
    model = convert_pt2e(prepared)
    layers = (aten.linear.default, aten.conv2d.default)
    kinds = {node.target: node.args[1].target for node in model.graph.nodes if node.target in layers}
    assert "per_channel" in str(kinds[aten.conv2d.default])
    assert "per_tensor" in str(kinds[aten.linear.default])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            lambda q: q.set_module_name("stem.*", None),
            r"set_module_name\('stem.\*'\).*The model's modules: heads, heads.0",
        ),
        (lambda q: q.set_module_type(nn.LSTM, None), r"LSTM\).*module types: .*torch.nn.modules.conv.Conv2d"),
        (lambda q: q.set_operator_type(aten.mul.Tensor, None), r"aten.mul.Tensor\).*operators: .*cat, conv2d"),
        (lambda q: q.set_filter_function(lambda node: False), "it accepts no node"),
        (lambda q: q.set_global("int8"), "str is no configuration.*get_symmetric_quantization_config"),
        (lambda q: q.set_global(None), "NoneType is no configuration"),
    ],
)
def test_rule_that_matches_nothing(rule: Callable[[XNNPACKQuantizer], object], words: str):
    with pytest.raises(RuleError, match=words):
        rows(rule(XNNPACKQuantizer().set_global(INT8)))  # type: ignore[arg-type]


def folding() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).eval(), torch.randn(
        1, 3, 6, 6
    )


def test_rules_of_modules_that_are_folded_or_do_nothing():
    module, x = folding()
    ruled = XNNPACKQuantizer().set_global(INT8).set_module_type(nn.Dropout, None).set_module_name("1", INT8)
    model = prepare_pt2e(torch.export.export(module, (x,)).module(), ruled)  # type: ignore[arg-type]
    assert [row.is_quantized for row in record_of(model).coverage] == [True, True]
    assert set(model.meta) == {"inline_constraints", "zeropoint", MARK}
    with pytest.raises(RuleError, match=r"\[1.*\] is folded into conv2d \(conv2d\) \[0.*\], which computes both"):
        rows(XNNPACKQuantizer().set_global(INT8).set_module_name("1", None), module, x)


def test_nothing_quantized():
    with pytest.raises(NothingQuantizedError, match=r"stays? float|no rule selects it"):
        rows(XNNPACKQuantizer())
    with pytest.raises(NothingQuantizedError, match="sigmoid: the XNNPACK delegate computes it in float only"):
        rows(XNNPACKQuantizer().set_global(INT8), nn.Sigmoid(), torch.randn(2, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"act_qmin": 6, "act_qmax": 5},
        {"act_qmin": -129},
        {"act_qmax": 128},
        {"weight_qmin": -200},
        {"weight_qmax": 255},
        {"weight_qmin": 3, "weight_qmax": -3},
        {"act_qmin": 1},
        {"act_qmax": -1},
        {"weight_qmin": 1},
        {"weight_qmin": -1.5},
        {"weight_qmin": None},
        {"is_per_channel": "yes"},
        {"is_dynamic": 1},
    ],
)
def test_range_that_does_not_hold(arguments: dict[str, int]):
    with pytest.raises(SpecError):
        get_symmetric_quantization_config(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"act_qmin": 1}, r"act_qmin=1, act_qmax=127 leaves out 0\. Choose -128 and 127, which the delegate takes"),
        ({"weight_qmax": -1}, r"weight_qmin=-127, weight_qmax=-1 leaves out 0\. Choose -127 and 127, or -8 and 7"),
    ],
)
def test_a_range_without_0_says_which_one_to_choose(arguments: dict[str, int], words: str):
    with pytest.raises(SpecError, match=words):
        get_symmetric_quantization_config(**arguments)


def test_configuration_says_what_was_asked():
    static = get_symmetric_quantization_config(True, False, False, -128, 127, -127, 127)
    assert static.input_activation == static.output_activation
    assert (static.weight.qscheme, static.weight.quant_min, static.weight.quant_max) == (
        torch.per_channel_symmetric,
        -127,
        127,
    )
    assert (static.bias, static.is_qat, static.is_dynamic) == (None, False, False)
    dynamic = get_symmetric_quantization_config(is_dynamic=True)
    assert (dynamic.is_dynamic, dynamic.output_activation, dynamic.weight.qscheme) == (
        True,
        None,
        torch.per_tensor_symmetric,
    )
    assert get_symmetric_quantization_config(is_qat=True).is_qat
    assert get_symmetric_quantization_config(is_qat=True, is_dynamic=True).is_dynamic
    narrow = get_symmetric_quantization_config(act_qmin=-64, act_qmax=63, weight_qmin=-8, weight_qmax=7)
    assert (narrow.input_activation.quant_min, narrow.weight.quant_max) == (-64, 7)
    assert get_default_quantization_config().weight.qscheme == torch.per_channel_symmetric


def converted(module: nn.Module, quantizer: XNNPACKQuantizer, *inputs: Any, dynamic_shapes: Any = None) -> GraphModule:
    with torch.no_grad():
        model = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes).module()
    prepared = prepare_pt2e(model, quantizer)
    prepared(*inputs)
    return convert_pt2e(prepared)


@torch.no_grad()
def agreement(model: GraphModule, lowered: LoweredProgram, *batches: tuple[Any, ...]) -> float:
    """Returns the lowest SQNR in dB of the file's outputs against the model's."""
    lowest = float("inf")
    for inputs, outputs in zip(batches, run_in_child(lowered.pte, batches), strict=True):
        expected = model(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        lowest = min(lowest, *(sqnr_db(e, a) for e, a in zip(expected, outputs, strict=True)))
    return lowest


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.four = nn.Linear(8, 6), nn.Conv2d(3, 4, 3), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(x), self.conv(y), self.four(z)


def test_activations_quantized_at_run_time():
    """Linear and convolution at 8 bits, and a linear layer at 4; one row each: the delegate quantizes row by row."""
    torch.manual_seed(0)
    eight = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    four = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, weight_qmin=-8, weight_qmax=7)
    inputs = (torch.randn(1, 8), torch.randn(1, 3, 6, 6), torch.randn(1, 32))
    model = converted(Dynamic(), XNNPACKQuantizer().set_global(eight).set_module_name("four", four), *inputs)
    lowered = lower_program(model, inputs)
    (graph,) = delegates(lowered.pte)
    assert lowered.outside == ()
    weights = {node.reads[1] for node in graph.nodes if node.kind in ("FullyConnected", "Conv2d")}
    assert weights == {"qc8c", "qc4c"}
    assert agreement(model, lowered, inputs, tuple(x * 3 for x in inputs)) > 55


def test_training_of_activations_quantized_at_run_time():
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, is_dynamic=True)
    model = converted(nn.Linear(8, 6), XNNPACKQuantizer().set_global(config), x := torch.randn(2, 8))
    (chosen,) = [node for node in model.graph.nodes if node.target is ops.CHOOSE_QPARAMS]
    assert chosen.args[1:] == (-128, 127, 2**-12, torch.int8)
    assert model(x).shape == (2, 6)


def test_numbers_made_tensors_have_the_place_of_their_reader():
    model = export(Applied(lambda _, x: x * 2.0 + 1.0), torch.randn(2, 8))
    prepared = prepare_pt2e(model, XNNPACKQuantizer().set_global(INT8))
    numbers = [node for node in prepared.graph.nodes if "_tensor_constant_" in str(node.target)]
    assert len(numbers) == 2
    for node in numbers:
        assert node.meta["stack_trace"]
        assert node.meta["from_node"]


def specs(*roles: str) -> QuantizationConfig:
    full = get_symmetric_quantization_config(is_per_channel=True)
    named = ("input_activation", "output_activation", "weight", "bias")
    return QuantizationConfig(*(getattr(full, role) if role in roles else None for role in named))


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ((), "conv2d: its configuration has no spec for weights"),
        (("input_activation", "output_activation"), "conv2d: its configuration has no spec for weights"),
        (("output_activation", "weight"), "conv2d: its configuration has no spec for input activations"),
    ],
)
def test_configuration_without_what_arithmetic_needs(roles: tuple[str, ...], words: str):
    with pytest.raises(NothingQuantizedError, match=words):
        rows(XNNPACKQuantizer().set_global(specs(*roles)), nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6))


def test_weights_alone_make_no_integer_operator():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = rows(XNNPACKQuantizer().set_global(specs("weight")), module, torch.randn(1, 3, 6, 6))
    assert {row.reason for row in found} == {"it is computed in float: only its weight is quantized"}


def test_configuration_of_executorch():
    theirs = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = theirs.get_symmetric_quantization_config(is_per_channel=True)
    found = rows(XNNPACKQuantizer().set_global(config), nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6))
    assert [row.is_quantized for row in found] == [True]


def test_four_bit_weights():
    torch.manual_seed(0)
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-8, weight_qmax=7)
    inputs = (torch.randn(16, 32),)
    model = converted(nn.Linear(32, 16), XNNPACKQuantizer().set_global(config), *inputs)
    lowered = lower_program(model, inputs)
    (graph,) = delegates(lowered.pte)
    assert [node.reads[1] for node in graph.nodes if node.kind == "FullyConnected"] == ["qc4c"]
    assert agreement(model, lowered, inputs) > 50


def test_narrow_activations_are_refused_by_lower():
    config = get_symmetric_quantization_config(act_qmin=-64, act_qmax=63)
    inputs = (torch.randn(2, 8),)
    with pytest.raises(LoweringError, match=r"it quantizes to torch.int8 in \[-64, 63\]"):
        lower_program(converted(nn.Linear(8, 6), XNNPACKQuantizer().set_global(config), *inputs), inputs)


class Attention(nn.Module):
    """An encoder as in BERT: ids, positions by integer arithmetic, an integer mask made into -10000 in float."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 16), nn.Embedding(12, 16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.cumsum(mask, 1) * mask + 1
        shifted = (ids * 2 - 1 + mask) // 2 + 0
        x = self.norm(self.words(shifted.clamp(0, 19)) + self.positions(places))
        bias = (1.0 - mask[:, None, None, :].to(torch.float32)) * -10000.0
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / 2.83 + bias
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float32).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)) + x

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, 8)).transpose(1, 2)


def test_integer_arithmetic_and_masks_are_left_alone():
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 20, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    net = Attention()
    model = converted(net, XNNPACKQuantizer().set_global(INT8), ids, mask)
    named = record_of(model).coverage
    assert {row.operator for row in named if row.is_quantized} >= {"linear", "transpose", "unflatten"}
    integer = [row.reason for row in named if row.operator in ("mul", "add", "sub") and "int64" in row.reason]
    assert len(integer) >= 5
    masked = [row for row in named if row.operator == "add" and "a mask or a position" in row.reason]
    assert len(masked) == 1
    with torch.no_grad():
        assert sqnr_db(net(ids, mask), model(ids, mask)) > 25
    lowered = lower_program(model, (ids, mask))
    assert agreement(model, lowered, (ids, mask)) > 40


class Distances(nn.Module):
    """Logarithms of distances between places, which are infinite at 0, choose a bias, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.biases = nn.Linear(8, 8), nn.Embedding(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        distances = (places[None, :] - places[:, None]).abs()
        far = (torch.log(distances.float() / 2) / 0.7 * 3).to(torch.long)
        return self.layer(x) + self.biases(torch.where(distances < 3, distances, far.clamp(0, 5))).sum(1)


@pytest.mark.parametrize("free", [False, True])
def test_float_made_of_places_is_left_alone(free: bool):
    torch.manual_seed(0)
    net, inputs = Distances().eval(), (torch.randn(2, 10, 8),)
    exported = torch.export.export(net, inputs, dynamic_shapes=({1: torch.export.Dim.DYNAMIC},) if free else None)
    prepared = prepare_pt2e(exported.module(), XNNPACKQuantizer().set_global(INT8))
    prepared(*inputs)
    model = convert_pt2e(prepared)
    (scaled,) = [row for row in record_of(model).coverage if row.operator == "mul"]
    assert "a mask or a position, not data" in scaled.reason
    with torch.no_grad():
        assert sqnr_db(net(*inputs), model(*inputs)) > 25


class Copies(nn.Module):
    """Copies, for the sake of what is written to them, or to what they were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.relu_()
        u = self.first(x)
        before = u.clone()
        u[:, 0] = 0
        return self.second(u) * self.factor.clone().mul_(2) + y + before + self.factor


def test_copies_that_are_written_to_stay():
    torch.manual_seed(0)
    net, inputs = Copies().eval(), (torch.randn(64, 8),)
    kept = inputs[0].clone()
    with torch.no_grad():
        expected = net(*inputs)
        model = converted(net, XNNPACKQuantizer().set_global(INT8), *inputs)
        assert sqnr_db(expected, model(*inputs)) > 25
    assert torch.equal(inputs[0], kept)


def test_an_operator_that_returns_several_tensors_has_a_reason():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, other = self.layer(x).unflatten(1, (2, 4)).unbind(1)
            return one * other

    model = converted(Halves(), XNNPACKQuantizer().set_global(INT8), torch.randn(4, 8))
    (row,) = [row for row in record_of(model).coverage if row.operator == "unbind"]
    assert row.reason == "the XNNPACK delegate does not take it: the portable float kernel computes it"


class Converts(nn.Module):
    """Conversions to the type that a tensor is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.to(torch.float32)).type_as(x)
        return self.second(F.relu(x).to(x.device, copy=False)).to(torch.float64)


def test_conversions_that_do_nothing_are_removed():
    inputs = (torch.randn(4, 8),)
    model = converted(Converts(), XNNPACKQuantizer().set_global(INT8), *inputs)
    rows = record_of(model).coverage
    assert [row.operator for row in rows] == ["linear", "relu", "linear", "to"]
    assert [row.is_quantized for row in rows] == [True, True, True, False]
    assert model(*inputs).dtype == torch.float64


def test_tied_linear_layers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.first(x)) * 4)

    torch.manual_seed(0)
    inputs = (torch.randn(16, 8),)
    model = converted(Tied(), XNNPACKQuantizer().set_global(INT8), *inputs)
    lowered = lower_program(model, inputs)
    (graph,) = delegates(lowered.pte)
    assert float_nodes(graph.nodes) == []
    assert agreement(model, lowered, inputs) > 45


def test_computed_weight_is_refused():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.last = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return self.last(F.linear(x, self.raw * factor))

    found = rows(XNNPACKQuantizer().set_global(INT8), Normalized(), torch.randn(2, 8), torch.randn(8))
    assert [row.reason for row in found if row.operator == "linear"] == ["its weight mul is computed at run time", ""]


@pytest.mark.parametrize(
    "activation", [nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)]
)
def test_activation_is_fused(activation: nn.Module):
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), activation), XNNPACKQuantizer().set_global(INT8), *INPUTS)
    names = [str(node.target).split(".")[1] for node in model.graph.nodes if node.op == "call_function"]
    conv = names.index("conv2d")
    assert names[conv + 1] in ("relu6", "hardtanh", "relu_", "hardtanh_")
    assert names[conv + 2 :] == list(Q_AND_DQ)


def test_activation_with_another_reader_is_not_fused():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return F.relu6(y) + y

    model = converted(Forked(), XNNPACKQuantizer().set_global(INT8), *INPUTS)
    names = [str(node.target).split(".")[1] for node in model.graph.nodes if node.op == "call_function"]
    assert names[names.index("conv2d") + 1] == "quantize_per_tensor"


@pytest.mark.parametrize("is_qat", [False, True])
def test_dropout_stays_for_training(is_qat: bool):
    model = export(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval(), torch.randn(4, 8))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=is_qat))
    transformed = quantizer.transform_for_annotation(model)
    assert any(node.target is aten.dropout.default for node in transformed.graph.nodes) == is_qat


class Free(nn.Module):
    """A network whose batch is free: padding with stride 2, depthwise, pooling, flatten, squeeze, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head, self.side = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = x + F.hardtanh(self.depthwise(x), 0.0, 4.0)
        x = torch.max_pool2d(torch.cat([x, x * 0.7], 3), 2)
        pooled = F.adaptive_avg_pool2d(x, 1)
        return self.head(pooled.flatten(1)), self.side(x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1))


def test_free_batch():
    """A global pool stays float: its integer kernel writes past its buffer once the batch grows."""
    torch.manual_seed(0)
    example, shapes = (torch.randn(4, 3, 16, 16),), ({0: torch.export.Dim("batch", min=1, max=16)},)
    model = converted(Free(), XNNPACKQuantizer().set_global(INT8), *example, dynamic_shapes=shapes)
    left = [row.operator for row in record_of(model).coverage if "its batch is free" in row.reason]
    assert sorted(left) == ["adaptive_avg_pool2d", "mean"]
    lowered = lower_program(model, example, dynamic_shapes=shapes)
    assert (lowered.delegates, lowered.outside) == (1, ())
    (graph,) = delegates(lowered.pte)
    assert {str(node).split("(")[0] for node in graph.nodes if str(node) in float_nodes(graph.nodes)} <= {
        "GlobalAvgPooling2d", "StaticTranspose", "StaticReshape",
    }  # fmt: skip
    assert {"StaticConstantPad", "Conv2d", "DepthwiseConv2d", "FullyConnected"} <= set(integer_kinds(graph.nodes))
    batches = [(torch.randn(size, 3, 16, 16),) for size in (4, 1, 9, 15, 2)]
    assert agreement(model, lowered, *batches) > 40
