"""What the programs of the docs give, besides running, and that the names in their tables exist."""

import importlib
import re
import warnings

import pytest
import torch
from test_tiny import ROOT, programs

from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db

aten = torch.ops.aten


@pytest.fixture(scope="module")
def device():
    names: dict[str, object] = {}
    for program in programs(ROOT / "docs" / "write_a_quantizer.md"):
        exec(compile(program, "write_a_quantizer.md", "exec"), names)
    return names


def readers_of_integers(model: torch.fx.GraphModule) -> list[str]:
    """Returns the nodes that read dequantized values, in order."""
    found = [node for node in model.graph.nodes if node.target not in ops.QUANTIZE_OPS]
    return [n.name for n in found if any(i.target in ops.DEQUANTIZE_OPS for i in n.all_input_nodes)]


def int32_biases(model: torch.fx.GraphModule) -> int:
    tensors = (getattr(model, str(node.target), None) for node in model.graph.nodes if node.op == "get_attr")
    return sum(isinstance(t, torch.Tensor) and t.dtype == torch.int32 for t in tensors)


def test_a_table(device):
    converted = device["by_table"]
    expected = ["conv2d", "conv2d_1", "add", "cat", "max_pool2d", "mean", "linear", "sigmoid"]
    assert readers_of_integers(converted) == expected
    assert int32_biases(converted) == 3
    reasons = {row.node: row.reason for row in converted.meta["zeropoint"].coverage if not row.is_quantized}
    assert reasons["cumsum"] == "the device adds up along an axis on its CPU"


def test_a_rule_of_the_user(device):
    assert int32_biases(device["by_table_but_the_head"]) == 2


def test_by_hand(device):
    converted = device["by_hand"]
    assert readers_of_integers(converted) == [
        "conv2d", "conv2d_1", "add", "cat", "max_pool2d", "mean", "linear", "sigmoid", "output",
    ]  # fmt: skip
    assert int32_biases(converted) == 3
    fixed = [n.args[1:3] for n in converted.graph.nodes if n.target is ops.QUANTIZE_PER_TENSOR]
    assert fixed[-1] == (1 / 256, -128)


@pytest.mark.parametrize("name", ["by_table", "by_hand", "reference"])
def test_they_compute_what_the_network_does(device, name):
    (x,) = device["example_inputs"]
    assert sqnr_db(device["model"](x), device[name](x)) > 30


def test_the_reference_is_integer(device):
    computed = {n.target for n in device["reference"].graph.nodes if n.op == "call_function"}
    assert aten.conv2d.default not in computed
    assert aten.linear.default not in computed


MIGRATION = ROOT / "docs" / "migration.md"


def test_every_name_of_torchao_is_on_the_page():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("torchao.quantization.pt2e")
    named = set(re.findall(r"\w+", MIGRATION.read_text()))
    assert set(theirs.__all__) - named == set()


@pytest.mark.filterwarnings("ignore")  # ExecuTorch and torchao warn where they are imported.
def test_programs_of_the_page_quantize():
    names: dict[str, object] = {}
    for program in programs(MIGRATION):
        exec(compile(program, "migration.md", "exec"), names)
    (x,) = names["example_inputs"]
    for name in ("quantized", "from_training"):
        targets = [node.target for node in names[name].graph.nodes]
        assert targets.count(ops.DEQUANTIZE_PER_CHANNEL) == 2
        assert aten.batch_norm.default not in targets
        assert names[name](x).shape == (4, 4, 14, 14)
    kept = [type(m).__module__ for n, m in names["kept"].named_modules() if n.startswith("activation_post_process")]
    assert kept
    assert all(module.startswith("torchao.") for module in kept)


def test_accuracy_page_finds_and_cures():
    names: dict[str, object] = {}
    for program in programs(ROOT / "docs" / "accuracy.md"):
        exec(compile(program, "accuracy.md", "exec"), names)
    found = names["found"]
    gained = names["zp"].compare(names["model"], names["cured"], names["data"]).sqnr_db - found.sqnr_db
    assert gained > 6
    assert abs(gained - found.gain_db) < 1
