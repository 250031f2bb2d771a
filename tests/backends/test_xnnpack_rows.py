"""Every row of the XNNPACK table takes its examples, in integers, and refuses its counter-examples in words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.fx import GraphModule

from tests.backends.examples import EXAMPLES, LAYERS, Branches, Example, inputs_of
from tests.backends.xnn_graph import XnnGraph, delegates, float_nodes, integer_kinds, operators_outside
from tests.models import export
from zeropoint import convert_pt2e, prepare_pt2e
from zeropoint.backends.xnnpack import (
    LoweredProgram,
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
    lower_program,
)
from zeropoint.backends.xnnpack.table import TABLE
from zeropoint.backends.xnnpack.transform import TO_ANNOTATE
from zeropoint.core.configs import QuantizationConfig
from zeropoint.graph.source import module_path
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.coverage import CoverageRow
from zeropoint.report.record import record_of
from zeropoint.runtime.child import run_in_child

aten = torch.ops.aten
PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)
PER_TENSOR = get_symmetric_quantization_config()
ONE_SCALE = tuple(example for example in LAYERS if example.layers and len(example.operators) == 1)[::2]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@dataclass
class Built:
    """Examples side by side as one model, from the exported graph to what the runtime computed."""

    examples: tuple[Example, ...]
    exported: dict[int, set[object]]
    converted: GraphModule
    lowered: LoweredProgram
    graph: XnnGraph
    expected: list[tuple[torch.Tensor, ...]]
    actual: list[tuple[torch.Tensor, ...]]

    def coverage(self, index: int) -> list[CoverageRow]:
        rows = record_of(self.converted).coverage
        return [row for row in rows if row.module.split(".")[0] == f"example{index}"]

    def first_input(self, index: int) -> int:
        return sum(len(example.shapes) for example in self.examples[:index])

    def step(self, index: int) -> float:
        """Returns the scale of an output."""
        output = next(node for node in self.converted.graph.nodes if node.op == "output")
        return output.args[0][index].args[1]


def build(examples: tuple[Example, ...], config: QuantizationConfig) -> Built:
    torch.manual_seed(0)
    model = export(Branches(examples).eval(), *inputs_of(examples))
    exported = {i: set() for i in range(len(examples))}
    for node in model.graph.nodes:
        path = module_path(node)
        if node.op == "call_function" and path.startswith("example"):
            exported[int(path.split(".")[0].removeprefix("example"))].add(node.target)
    prepared = prepare_pt2e(model, XNNPACKQuantizer().set_global(config))
    for _ in range(3):
        prepared(*inputs_of(examples))
    converted = convert_pt2e(prepared)
    batches = [inputs_of(examples, factor) for factor in (1.0, 1.3)]
    lowered = lower_program(converted, batches[0])
    (graph,) = delegates(lowered.pte)
    with torch.no_grad():
        expected = [converted(*inputs) for inputs in batches]
    return Built(examples, exported, converted, lowered, graph, expected, run_in_child(lowered.pte, batches))


@pytest.fixture(scope="module")
def per_channel() -> Built:
    return build(EXAMPLES, PER_CHANNEL)


@pytest.fixture(scope="module")
def per_tensor() -> Built:
    return build(ONE_SCALE, PER_TENSOR)


def check(built: Built, index: int) -> None:
    example, rows = built.examples[index], built.coverage(index)
    assert set(example.operators) <= built.exported[index]
    assert example.row in [row.pattern for row in rows]
    assert [str(row) for row in rows if not row.is_quantized] == []
    nodes = built.graph.of_input(built.first_input(index))
    assert integer_kinds(nodes), [str(node) for node in nodes]
    assert float_nodes(nodes) == []
    for expected, actual in zip(built.expected, built.actual, strict=True):
        difference = (expected[index] - actual[index]).abs().max() / built.step(index)
        assert difference < 1.01
        assert sqnr_db(expected[index], actual[index]) >= 55


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=[str(example) for example in EXAMPLES])
def test_example_is_computed_in_integers(per_channel: Built, index: int):
    check(per_channel, index)


@pytest.mark.parametrize("index", range(len(ONE_SCALE)), ids=[str(example) for example in ONE_SCALE])
def test_layer_with_one_scale_for_its_weight(per_tensor: Built, index: int):
    check(per_tensor, index)


def test_one_delegate_and_nothing_outside(per_channel: Built, per_tensor: Built):
    for built in (per_channel, per_tensor):
        assert (built.lowered.delegates, built.lowered.outside) == (1, ())
        assert operators_outside(built.lowered.pte) == []


def test_every_operator_of_the_table_has_an_example():
    shown = {(example.row, operator) for example in EXAMPLES for operator in example.operators}
    for pattern in TABLE.patterns:
        heads = {operator for operator in pattern.chain[0] if (pattern.name, operator) not in shown}
        fused = {op for step in pattern.chain[1:] for op in step if (pattern.name, op) not in shown}
        before = {operator for operator in pattern.before if (pattern.name, operator) not in shown}
        assert (heads, fused, before) == (set(), set(), set()), pattern.name


def test_every_spelling_has_an_example():
    """Of what is computed in integers then; what is in float has its own (test_xnnpack_refusals.py)."""
    shown = {operator for example in EXAMPLES for operator in example.operators}
    in_float = {operator for operators, _ in TABLE.float_only for operator in operators}
    assert set(TO_ANNOTATE) - shown - in_float == set()
