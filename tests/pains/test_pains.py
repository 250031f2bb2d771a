"""What users ask of a quantization tool, each as what a user does and what comes out: one section per wish."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import requires, version
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

import zeropoint as zp
from tests.models import Applied
from zeropoint import QuantizationConfig, QuantizationSpec
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.core.errors import AnnotationError, GraphError, LoweringError, SpecError
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.pt2e import disable_observer
from zeropoint.runtime.child import run_in_child

INT8 = get_symmetric_quantization_config(is_per_channel=True)
Inputs = tuple[Any, ...]


def calibrated(
    model: nn.Module, batches: list[Inputs], config: QuantizationConfig = INT8, **export: Any
) -> GraphModule:
    graph = torch.export.export(model.eval(), batches[0], **export).module()
    prepared = zp.prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for inputs in batches:
            prepared(*inputs)
    return prepared


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 10))


def pictures(count: int, batch: int = 4) -> list[Inputs]:
    torch.manual_seed(1)
    return [(torch.randn(batch, 3, 8, 8),) for _ in range(count)]


# 8. train() and eval() switch dropout and batch norm, at once and any number of times.


def test_8_train_and_eval_switch():
    torch.manual_seed(0)
    graph = torch.export.export(conv_net().train(), pictures(1)[0]).module()
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    prepared = zp.prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))
    (x,) = pictures(1)[0]
    prepared.train()
    prepared(x)
    prepared.apply(disable_observer)
    for _ in range(3):
        prepared.train()
        assert not torch.equal(prepared(x), prepared(x))  # Dropout draws anew.
        prepared.eval()
        assert torch.equal(prepared(x), prepared(x))
    expected = prepared(x)
    converted = zp.convert_pt2e(prepared)
    assert sqnr_db(expected, converted(x)) > 40
    assert torch.equal(converted.train().eval()(x), converted(x))


# 10. What must share a scale does, whatever the order; a range that one member widens holds for all.


@torch.no_grad()
def test_10_a_concatenation_has_one_scale():
    def joined(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m.small(x), m.large(x) * 50, m.small(x).view(4, 8)], 1)

    module = Applied(joined, small=nn.Linear(8, 8), large=nn.Linear(8, 8))
    converted = zp.convert_pt2e(calibrated(module, [(torch.randn(4, 8),)]))
    cat = next(node for node in converted.graph.nodes if node.name == "cat")
    scales = {source.args[1:3] for source in cat.args[0]} | {reader.args[1:3] for reader in cat.users}
    assert len(scales) == 1


# 11. A prepared or converted model moves to another device, with all that export wrote into its graph.


def with_devices() -> nn.Module:
    return Applied(lambda m, x: m.layer(x) + torch.zeros(8).to("cpu") * torch.arange(8), layer=nn.Linear(8, 8))


def test_11_models_move_with_the_tensors_that_they_make():
    batches = [(torch.randn(4, 8),) for _ in range(3)]
    prepared = calibrated(with_devices(), batches)
    on_meta = copy.deepcopy(prepared).to("meta")  # It stands for any other device.
    assert {tensor.device.type for tensor in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}
    moved = zp.convert_pt2e(prepared).to("meta")
    assert moved(batches[0][0].to("meta")).device.type == "meta"


def test_11_what_cannot_be_moved_says_so_at_once():
    converted = zp.convert_pt2e(calibrated(with_devices(), [(torch.randn(4, 8),)]))
    with pytest.raises(GraphError, match=r"the graph is quantized.*torch\.float16 before it is exported"):
        converted.half()


# 12. A free batch or length stays free from capture to the file: train at 64, deploy at 1.


class Block(nn.Module):
    """A transformer's block: its length may be free."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wider, self.narrower = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.factors, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.factors(self.norm(x)).reshape(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32)
        x = x + self.out(attended)
        return x + self.narrower(F.gelu(self.wider(self.norm(x))))


FREE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], dict[int, Any]]] = {
    "convolutions": (conv_net, lambda n: torch.randn(n, 3, 8, 8), {0: Dim("batch")}),
    "linear": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), lambda n: torch.randn(n, 8), {0: Dim.AUTO}
    ),
    "transformer": (Block, lambda n: torch.randn(1, n, 32), {1: Dim("length", max=64)}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FREE)
def test_12_calibrated_at_64_runs_at_1_and_at_7(name: str):
    build, sample, free = FREE[name]
    torch.manual_seed(0)
    converted = zp.convert_pt2e(calibrated(build(), [(sample(64),)] * 2, dynamic_shapes=(free,)))
    deployed = [(sample(1),), (sample(7),)]
    for inputs, (actual,) in zip(deployed, run_in_child(lower(converted, deployed[0]), deployed), strict=True):
        assert sqnr_db(converted(*inputs), actual) > 60


# 14. One package for a range of torch versions.


def test_14_the_range_of_torch_versions_is_stated_and_holds_this_one():
    (wanted,) = (each for each in map(Requirement, requires("zeropoint") or ()) if each.name == "torch")
    assert wanted.specifier.contains(version("torch").partition("+")[0], prereleases=True)


# 17. int16 activations: they are what was asked for, or an error says that they cannot be.

WIDE = QuantizationSpec(torch.int16, MinMaxObserver, -32768, 32767, torch.per_tensor_symmetric)
INT16 = replace(INT8, input_activation=WIDE, output_activation=WIDE)


@torch.no_grad()
def test_17_activations_of_16_bits_are_nearer_to_float():
    net, batches = conv_net(), pictures(4)
    narrow, wide = (zp.convert_pt2e(calibrated(net, batches, config)) for config in (INT8, INT16))
    lost = [sqnr_db(net(*batches[0]), model(*batches[0])) for model in (narrow, wide)]
    assert lost[1] > lost[0] + 5  # What is left is of the weights.
    integers = [n.meta["val"].dtype for n in wide.graph.nodes if "quantize_per_tensor" in n.name and n.name[0] == "q"]
    assert set(integers) == {torch.int16}


def test_17_a_file_for_xnnpack_is_refused_in_words():
    net, batches = conv_net(), pictures(2)
    words = r"(?s)relu \(relu\) \[2\].* torch\.int16 in \[-32768, 32767\].*The delegate has int8 kernels only"
    with pytest.raises(LoweringError, match=words):
        zp.quantize(net, batches[0], batches, quantizer=XNNPACKQuantizer().set_global(INT16))
    with pytest.raises(LoweringError, match=words):
        lower(zp.convert_pt2e(calibrated(net, batches, INT16)), batches[0])


# 21. Recurrent layers are taken apart; all gates are quantized, with one scale over time.


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_21_recurrent_layers_are_integer_and_run(kind: type[nn.Module]):
    torch.manual_seed(0)
    module, batches = Applied(lambda m, x: m.rnn(x)[0], rnn=kind(8, 16)), [(torch.randn(3, 2, 8),) for _ in range(4)]
    converted = zp.convert_pt2e(calibrated(module, batches))
    linear = [node for node in converted.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert all("dequantize" in source.name for node in linear for source in node.args[:2])
    steps = [node.args[0].args[1:3] for node in linear if node.args[1].args[0] is linear[-1].args[1].args[0]]
    assert len(steps) > 1
    assert len(set(steps)) == 1
    assert sqnr_db(module(*batches[0]), converted(*batches[0])) > 25
    (actual,) = run_in_child(lower(converted, batches[0]), batches[:1])
    assert sqnr_db(converted(*batches[0]), actual[0]) > 40


# 24. "Is this graph right?"


def test_24_summary_has_a_line_for_each_integer_operator():
    lines = zp.summary(zp.convert_pt2e(calibrated(conv_net(), pictures(2)))).splitlines()
    assert [line.split()[2] for line in lines[1:-2] if line.split()[1].isdigit()] == [
        "conv2d+relu", "max_pool2d", "flatten", "linear",
    ]  # fmt: skip
    number = r"[\d.e+-]+"
    assert re.search(
        rf"conv2d\+relu +int8 {number}.* int8 per channel {number}\.\.{number} +int8 {number}.* 216$", lines[1]
    )
    assert "4 integer operators, 0 in float" in lines[-2]


# 25. What cannot work is refused where it is written down, with what can.


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda: QuantizationSpec(torch.int8, MinMaxObserver, 0, 255),
            "quant_max=255 does not fit torch.int8.*-128..127",
        ),
        (lambda: QuantizationSpec(torch.int64, MinMaxObserver), "torch.int64 is no type to quantize to.*torch.int8"),
        (
            lambda: QuantizationSpec(torch.int8, MinMaxObserver, qscheme="affine"),
            "qscheme='affine' is unknown.*per_tensor",
        ),
        (lambda: QuantizationSpec(torch.int8, "MinMaxObserver"), "is not callable.*Give a class"),
        (lambda: QuantizationConfig(torch.int8, None, None, None), "is no quantization spec.*QuantizationSpec"),
        (lambda: get_symmetric_quantization_config(act_qmin=1), "leaves out 0.*Choose -128 and 127"),
    ],
)
def test_25_the_error_comes_with_the_configuration(write: Callable[[], object], words: str):
    with pytest.raises(SpecError, match=words):
        write()


# 29. A tied weight is one tensor in all forms; rules that contradict each other about it are an error.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_29_a_tied_weight_stays_one():
    converted = zp.convert_pt2e(calibrated(Tied(), [(torch.randn(4, 8),)]))
    stored = [tensor for tensor in converted.state_dict().values() if tensor.dtype == torch.int8 and tensor.dim() == 2]
    assert len({tensor.data_ptr() for tensor in stored}) == 1
    assert "64 shared" in zp.summary(converted)


def test_29_rules_that_contradict_are_an_error():
    graph = torch.export.export(Tied().eval(), (torch.randn(4, 8),)).module()
    quantizer = XNNPACKQuantizer().set_global(INT8).set_module_name("second", None)
    with pytest.raises(AnnotationError, match=r"(first|second)(.|\n)*weight"):
        zp.prepare_pt2e(graph, quantizer)
