"""Which configuration a node gets."""

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.annotate.rules import NOT_SELECTED, Rules, forget_erased, note_erased, origin_of, type_name
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import RuleError
from zeropoint.graph.no_ops import erase_no_ops
from zeropoint.passes.fold_batch_norm import fold_batch_norm

aten = torch.ops.aten
ONE, TWO, THREE, FOUR = (QuantizationConfig(quantizers.activation(quant_min=-i), None, None, None) for i in range(4))
CONV, LINEAR = type_name(nn.Conv2d), type_name(nn.Linear)
BLOCK = type_name(models.Net.Block)


@pytest.fixture
def model():
    return models.exported(models.net)


def chosen(rules, model, operator="conv2d", index=1):
    return rules.choose(models.find(model, operator, index))


def test_no_rule(model):
    assert chosen(Rules(), model) == (None, NOT_SELECTED)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(everything=FOUR), FOUR),
        (Rules(by_operator={aten.conv2d.default: THREE}, everything=FOUR), THREE),
        (Rules(by_module_type={CONV: TWO}, by_operator={aten.conv2d.default: THREE}, everything=FOUR), TWO),
        (Rules({"blocks.1": ONE}, {CONV: TWO}, {aten.conv2d.default: THREE}, FOUR), ONE),
        (Rules({"blocks.1": ONE}, {CONV: TWO}, by_node_name={"conv2d_1": THREE, "conv2d": FOUR}), THREE),
    ],
)
def test_node_precedes_module_name_precedes_type_precedes_operator_precedes_all(model, rules, expected):
    assert chosen(rules, model)[0] is expected


@pytest.mark.parametrize("order", [1, -1])
def test_the_innermost_module_wins_by_name(model, order):
    names = {"blocks": ONE, "blocks.1": TWO, "blocks.1.conv": THREE}
    assert chosen(Rules(dict(list(names.items())[::order])), model)[0] is THREE
    assert chosen(Rules({"blocks": ONE, "blocks.1": TWO}), model, "relu")[0] is TWO
    assert chosen(Rules({"blocks": ONE, "blocks.1": TWO}), model, "relu", 0)[0] is ONE


def test_the_innermost_module_wins_by_type(model):
    assert chosen(Rules(by_module_type={BLOCK: ONE, CONV: TWO}), model)[0] is TWO
    assert chosen(Rules(by_module_type={BLOCK: ONE, LINEAR: TWO}), model)[0] is ONE


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("*.conv", True),
        ("blocks.?.conv", True),
        ("blocks.*", True),
        ("*conv*", True),
        ("*", True),
        ("blocks", True),
        ("conv", False),
    ],
)
def test_globs_match_as_in_file_names(model, glob, matches):
    assert (chosen(Rules({glob: ONE}), model)[0] is ONE) == matches


def test_the_last_of_two_globs_for_one_module_wins(model):
    assert chosen(Rules({"*.conv": ONE, "blocks.1.*": TWO}), model)[0] is TWO


def test_none_leaves_float_and_says_by_which_rule(model):
    rules = Rules({"blocks.1": None}, {LINEAR: None}, {aten.mean.dim: None}, FOUR)
    assert chosen(rules, model) == (None, "set_module_name('blocks.1', None) leaves it out")
    assert chosen(rules, model, "linear", 0) == (None, f"set_module_type({LINEAR}, None) leaves it out")
    assert chosen(rules, model, "mean", 0) == (None, "set_operator_type(aten.mean.dim, None) leaves it out")
    assert rules.leaves_out(models.find(model, "mean"))
    assert not rules.leaves_out(models.find(model, "add"))
    assert not Rules().leaves_out(models.find(model, "add"))


def test_a_filter_function_precedes_all(model):
    rules = Rules({"blocks": ONE}, everything=FOUR, filter_function=lambda node: node.name != "conv2d_1")
    assert models.find(model, "conv2d", 1).name == "conv2d_1"
    assert chosen(rules, model) == (None, "the filter function leaves it out")
    assert chosen(rules, model, index=0)[0] is ONE  # a rule for a container that is indexed, never called


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            Rules({"block.1": ONE}),
            r"set_module_name\('block.1'\): the rule matches no node.*modules: blocks, blocks\.0,",
        ),
        (Rules(by_module_type={CONV: ONE, "torch.nn.Conv2d": TWO}), r"set_module_type\(torch.nn.Conv2d\).*Conv2d"),
        (
            Rules(by_operator={aten.sub.Tensor: ONE}),
            r"set_operator_type\(aten.sub.Tensor\).*operators: add, batch_norm,",
        ),
        (Rules(by_node_name={"conv2d_9": None}), r"set_node_name\('conv2d_9'\): .*nodes: conv2d, batch_norm"),
        (Rules(filter_function=lambda node: False), "set_filter_function: it accepts no node"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_names_what_there_is(model, rules, words):
    with pytest.raises(RuleError, match=words):
        rules.check_all_match(model)


def test_rules_that_match(model):
    Rules({"blocks.?.conv": ONE}, {CONV: TWO}, {aten.add.Tensor: None}, FOUR, lambda n: True).check_all_match(model)
    Rules(by_node_name={"conv2d_1": ONE, "add": None}).check_all_match(model)


# Nodes that are erased before annotation: `models.net` has batch norm after its convolutions.

NORM, DROPOUT, BATCH_NORM = type_name(nn.BatchNorm2d), type_name(nn.Dropout), aten.batch_norm.default


@pytest.fixture
def folded(model):
    fold_batch_norm(model)
    return model


@pytest.mark.parametrize(
    ("rules", "rule", "state"),
    [
        (Rules({"blocks.1.norm": None}, everything=ONE), r"set_module_name\('blocks.1.norm'\)", "is to be quantized"),
        (Rules({"*.norm": TWO}, everything=ONE), r"set_module_name\('\*.norm'\)", "is chosen otherwise"),
        (Rules({"blocks.1": None, "*.norm": TWO}, {CONV: TWO}), r"set_module_name\('\*.norm'\)", "stays float"),
        (Rules(by_module_type={NORM: None}, everything=ONE), rf"set_module_type\({NORM}\)", "is to be quantized"),
        (Rules({}, {}, {BATCH_NORM: ONE}), r"set_operator_type\(aten.batch_norm.default\)", "stays float"),
    ],
)
def test_a_rule_for_a_folded_batch_norm_must_be_that_of_its_layer(folded, rules, rule, state):
    place = r"batch_norm(_1)? \(batch_norm\) \[blocks.\d.norm, .*\] is folded into conv2d(_1)? \(conv2d\) \[blocks"
    words = rf"{rule}: {place}.*, which computes both and {state}\. Set a rule for that layer, and leave this one out"
    with pytest.raises(RuleError, match=words):
        rules.check_all_match(folded)


@pytest.mark.parametrize(
    "rules",
    [
        Rules({"blocks.1.norm": ONE}, everything=ONE),
        Rules({"blocks.1.norm": None, "blocks.1.conv": None}, everything=ONE),
        Rules(by_module_type={NORM: None, CONV: None}, everything=ONE),
        Rules(by_module_type={NORM: None}),
        Rules({"blocks.1": ONE, "blocks.1.conv": None}),
        Rules({"blocks": None}, everything=ONE),
        Rules({"*": TWO, "blocks.1.conv": ONE}),
    ],
)
def test_rules_that_hold_for_a_folded_batch_norm(folded, rules):
    rules.check_all_match(folded)


@pytest.mark.parametrize(
    "rules",
    [Rules({"1": None}), Rules({"1": ONE}), Rules({}, {DROPOUT: ONE}), Rules({}, {}, {aten.dropout.default: None})],
)
def test_a_rule_for_an_operator_that_did_nothing(rules):
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU()).eval()
    model = torch.export.export(module, (torch.randn(2, 4),)).module()
    note_erased(model, map(origin_of, erase_no_ops(model)))
    assert not models.count(model, "dropout")
    rules.check_all_match(model)
    forget_erased(model)
    with pytest.raises(RuleError, match="matches no node"):
        rules.check_all_match(model)


def test_rules_match_in_bodies_of_control_flow():
    model = models.exported(models.conditional)
    Rules(by_operator={aten.linear.default: ONE}).check_all_match(model)


def test_a_module_called_twice_is_matched_at_both_calls():
    model = models.exported(models.called_twice)
    assert [chosen(Rules({"layer": ONE}), model, "linear", i)[0] for i in (0, 1)] == [ONE, ONE]
