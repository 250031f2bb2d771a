"""What is quantized, what is not and why; and the record that a model carries."""

import copy
import pickle

import models
import pytest
import quantizers
import torch
from quantizers import ByHand, annotate

from zeropoint.annotate.plan import DECISION_KEY, Decision, Plan
from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.annotate.read import read_plan
from zeropoint.core.errors import GraphError
from zeropoint.core.policy import BackendPolicy
from zeropoint.report.coverage import NOT_ANNOTATED, compute_nodes, coverage, quantized_count
from zeropoint.report.record import model_bytes, policy_of, record_of
from zeropoint.workflow import convert_pt2e, prepare_pt2e


def test_compute_nodes_leave_out_constants_inputs_and_bookkeeping():
    assert [n.name for n in compute_nodes(models.exported(models.counter))] == ["select", "add_", "mul", "add"]
    assert [n.name for n in compute_nodes(models.exported(models.mlp))] == ["linear", "relu", "linear_1"]


def test_compute_nodes_of_bodies_count():
    names = [n.name for n in compute_nodes(models.exported(models.conditional))]
    assert "linear" in names


def test_rows_of_annotations_by_hand():
    model = models.exported(models.net)
    quantizers.static(model)
    rows = {row.node: row for row in coverage(model, read_plan(model))}
    assert rows["conv2d"].is_quantized
    assert rows["relu"].reason == NOT_ANNOTATED
    assert rows["linear"].module == "head"
    assert rows["linear"].source.startswith("models.py:")
    assert str(rows["relu"]).startswith("relu (relu) [blocks.0.act, models.py:")
    assert str(rows["relu"]).endswith(f"]: float: {NOT_ANNOTATED}")
    assert quantized_count(rows.values()) == 4


def test_rows_of_decisions():
    model = models.exported(models.linear)
    linear = models.find(model, "linear")
    linear.meta[DECISION_KEY] = Decision("linear", (linear,), "groups=2")
    (row,) = coverage(model, read_plan(model))
    assert (row.pattern, row.reason, row.is_quantized) == ("linear", "groups=2", False)
    linear.meta[DECISION_KEY] = Decision("linear", (linear,))
    (row,) = coverage(model, read_plan(model))
    assert str(row).endswith("linear (linear): integer (linear)")


def test_a_node_that_another_quantizer_annotated_is_quantized_whatever_was_decided_before():
    model = models.exported(models.linear)
    linear = models.find(model, "linear")
    linear.meta[DECISION_KEY] = Decision("linear", (linear,), "no rule selects it")
    annotate(linear, {"input": quantizers.activation()})
    (row,) = coverage(model, read_plan(model))
    assert row.is_quantized


def test_an_empty_plan():
    assert quantized_count(coverage(models.exported(models.mlp), Plan())) == 0


class Backend(ByHand):
    policy = BackendPolicy("b", "float")


def test_the_policy_of_composed_quantizers_is_the_one_that_they_agree_on():
    one, other = Backend(lambda m: None), Backend(lambda m: None)
    assert policy_of(ComposableQuantizer([one, other])) == Backend.policy
    assert policy_of(ComposableQuantizer([one, ByHand(lambda m: None)])) is None
    assert policy_of(ByHand(lambda m: None)) is None


def test_the_record_goes_along():
    _, inputs = models.net()
    prepared = prepare_pt2e(models.exported(models.net), Backend(quantizers.static))
    float_bytes = record_of(prepared).float_bytes
    assert record_of(prepared).converted_bytes == 0
    assert pickle.loads(pickle.dumps(record_of(copy.deepcopy(prepared)))) == record_of(prepared)
    prepared(*inputs)
    record = record_of(convert_pt2e(prepared))
    assert record.policy == Backend.policy
    assert 0 < record.converted_bytes < float_bytes == record.float_bytes
    assert quantized_count(record.coverage) == 4


@pytest.mark.parametrize("which", ["given", "returned"])
def test_a_prepared_model_is_not_prepared_again(which):
    given = models.exported(models.linear)
    returned = prepare_pt2e(given, quantizers.STATIC)
    words = r"prepare_pt2e: the model is prepared already: it has observers\. Calibrate it and .*Export the model again"
    with pytest.raises(GraphError, match=words):
        prepare_pt2e({"given": given, "returned": returned}[which], quantizers.STATIC)


@pytest.mark.parametrize("which", ["prepared", "converted"])
def test_a_converted_model_is_prepared_only_after_another_export(which):
    _, inputs = models.linear()
    prepared = prepare_pt2e(models.exported(models.linear), quantizers.STATIC)
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    with pytest.raises(GraphError, match=r"the model is converted already\. Use it as it is\. Export the model again"):
        prepare_pt2e({"prepared": prepared, "converted": converted}[which], quantizers.STATIC)
    prepare_pt2e(torch.export.export(converted, inputs).module(), quantizers.STATIC)


def test_a_model_that_a_quantizer_left_as_it_was_is_prepared_again():
    untouched = prepare_pt2e(models.exported(models.linear), ByHand(lambda model: None))
    assert quantized_count(record_of(prepare_pt2e(untouched, quantizers.STATIC)).coverage) == 1


def test_bytes_count_a_tied_tensor_once():
    model = models.exported(models.linear)
    before = model_bytes(model)
    assert before == (4 * 3 + 3) * 4
    model.register_parameter("tied", model.get_parameter("weight"))
    assert model_bytes(model) == before


def test_a_model_of_another_package_has_an_empty_record():
    record = record_of(models.exported(models.linear))
    assert (record.policy, record.coverage, record.rounds_biases) == (None, (), False)
    assert record.float_bytes == 60
