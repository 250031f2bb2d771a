"""Annotating by a small made-up table."""

import operator
from dataclasses import replace

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY, annotation_of
from zeropoint.annotate.match import annotate_by_table
from zeropoint.annotate.patterns import ACT, BIAS, BIAS_INT32, FOLLOW, SHARED, Pattern, Table, Weight
from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.annotate.read import read_plan
from zeropoint.annotate.rules import Rules
from zeropoint.annotate.table_quantizer import TableQuantizer
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import NothingQuantizedError, RuleError, SpecError
from zeropoint.core.policy import BackendPolicy
from zeropoint.core.specs import SharedQuantizationSpec
from zeropoint.graph.bind import Site, argument
from zeropoint.numerics.observers import MinMaxObserver
from zeropoint.workflow import prepare_pt2e, prepare_with_plan

aten = torch.ops.aten
CONFIG = QuantizationConfig(quantizers.activation(), quantizers.activation(), quantizers.weight(), None)
DYNAMIC = QuantizationConfig(quantizers.activation(is_dynamic=True), None, quantizers.weight(), None)


def at_most_four_features(match):
    features = match.argument("weight").meta["val"].shape[0]
    return None if features <= 4 else f"{features} features; this device has 4 at most"


def constant_weight(match):
    return None if match.is_constant(match.argument("weight")) else "its weight is no constant"


TABLE = Table(
    "tiny",
    (
        Pattern("conv", ((aten.conv2d.default,), (aten.batch_norm.default,), (aten.relu.default, aten.relu_.default)),
                {"input": ACT, "weight": Weight(0), "bias": BIAS}),
        Pattern("linear", ((aten.linear.default,), (aten.relu.default,)), {"input": ACT, "weight": Weight(0)},
                when=(constant_weight, at_most_four_features), dynamic=()),
        Pattern("mean", ((aten.mean.dim,),), {"self": FOLLOW}, output=SHARED),
        Pattern("cat", ((aten.cat.default,),), {"tensors": SHARED}, output=SHARED),
    ),
    (((aten.add.Tensor,), "this device cannot add"),),
)  # fmt: skip


class Tiny(TableQuantizer):
    table, policy = TABLE, BackendPolicy("tiny", "float")


def annotated(build, rules=None, *arguments):
    model = models.exported(build, *arguments)
    annotate_by_table(model, TABLE, Rules(everything=CONFIG) if rules is None else rules)
    return model


def decision(model, operator, index=0):
    return models.find(model, operator, index).meta[DECISION_KEY]


def test_two_rows_with_one_head_operator():
    add, relu = (aten.add.Tensor, aten.add_.Tensor), (aten.relu.default,)
    rows = (Pattern("sum", (add,), {}), Pattern("mean", ((aten.mean.dim,),), {}), Pattern("add", (add[1:], relu), {}))
    words = r"the table of tiny: the rows 'sum' and 'add' have one head operator, aten.add_.Tensor. Make them one row"
    with pytest.raises(SpecError, match=words):
        Table("tiny", rows)


def test_a_chain_is_annotated_at_its_ends():
    model = annotated(models.conv_relu)
    conv, relu = models.find(model, "conv2d"), models.find(model, "relu")
    assert read_plan(model).specs == {
        Site(conv, "input"): CONFIG.input_activation,
        Site(conv, "weight"): CONFIG.weight,
        Site(relu): CONFIG.output_activation,
    }
    assert decision(model, "relu") is decision(model, "conv2d")
    assert decision(model, "conv2d").nodes == (conv, relu)
    assert relu.meta[Q_ANNOTATION_KEY]._annotated


def test_steps_of_a_chain_may_be_missing():
    model = annotated(models.net)
    assert [n.name for n in decision(model, "conv2d").nodes] == ["conv2d", "batch_norm", "relu"]
    assert [n.name for n in decision(annotated(models.conv_relu), "conv2d").nodes] == ["conv2d", "relu"]


def test_a_result_with_two_readers_is_not_fused():
    @models.seeded
    def skip():
        return models.Applied(lambda m, x: m.c(x).relu() + m.c(x), c=nn.Conv2d(1, 1, 1)), (torch.randn(1, 1, 2, 2),)

    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            y = self.conv(x)
            return y.relu() + y

    model = models.export(TwoReaders().eval(), torch.randn(1, 1, 2, 2))
    annotate_by_table(model, TABLE, Rules(everything=CONFIG))
    assert [n.name for n in decision(model, "conv2d").nodes] == ["conv2d"]
    assert decision(model, "relu").refusal == "tiny has no integer kernel for this operator"


def test_each_operator_has_a_reason_to_stay_float():
    model = annotated(models.net, Rules({"blocks.0": None}, everything=CONFIG))
    assert decision(model, "conv2d").refusal == "set_module_name('blocks.0', None) leaves it out"
    assert decision(model, "add").refusal == "this device cannot add"
    assert decision(model, "mean").refusal == "its input add is float: quantizing here would only add conversions"
    assert decision(model, "linear").refusal == "5 features; this device has 4 at most"
    assert decision(model, "conv2d", 1).refusal is None
    calls = [n for n in model.graph.nodes if n.op == "call_function"]
    assert all(DECISION_KEY in node.meta for node in calls)
    assert len({node.meta[DECISION_KEY] for node in calls}) == 7  # the second block is one decision


def test_without_a_rule_nothing_is_selected():
    assert decision(annotated(models.conv_relu, Rules()), "conv2d").refusal == "no rule selects it"


def test_a_node_left_out_is_not_fused():
    model = annotated(models.conv_relu, Rules(by_operator={aten.relu.default: None}, everything=CONFIG))
    assert [n.name for n in decision(model, "conv2d").nodes] == ["conv2d"]
    assert decision(model, "relu").refusal == "tiny has no integer kernel for this operator"


def test_other_dtypes_stay_float():
    model = models.export(nn.Linear(3, 3).double(), torch.randn(2, 3).double())
    annotate_by_table(model, TABLE, Rules(everything=CONFIG))
    words = "it returns torch.float64; only float32 arithmetic is quantized"
    assert decision(model, "linear").refusal == words


def test_follow_and_shared():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            pooled = self.conv(x).mean((2, 3), keepdim=True)
            return torch.cat([pooled, pooled * 2])

    model = models.export(Pool(), torch.randn(1, 1, 2, 2))
    annotate_by_table(model, TABLE, Rules(everything=CONFIG))
    conv, mean, cat = (models.find(model, name) for name in ("conv2d", "mean", "cat"))
    specs = read_plan(model).specs
    assert specs[Site(mean, "self")] == SharedQuantizationSpec(conv)
    assert specs[Site(mean)] == SharedQuantizationSpec((conv, mean))
    assert specs[Site(cat, "tensors", 0)] == CONFIG.input_activation
    assert specs[Site(cat, "tensors", 1)] == specs[Site(cat)] == SharedQuantizationSpec((mean, cat))


def test_dynamic_rows():
    rules = Rules(everything=DYNAMIC)
    model = annotated(models.branches, rules)
    linear = models.find(model, "linear")
    assert set(read_plan(model).specs) >= {Site(linear, "input"), Site(linear, "weight")}
    assert Site(linear) not in read_plan(model).specs
    refusal = decision(annotated(models.conv_relu, rules), "conv2d").refusal
    assert refusal == "activations quantized at run time: the backend has no such kernel for this operator"


def test_the_channel_axis_is_that_of_the_row():
    transposed = Table("t", (Pattern("linear", ((aten.linear.default,),), {"input": ACT, "weight": Weight(1)}),))
    model = models.exported(models.linear)
    annotate_by_table(model, transposed, Rules(everything=CONFIG))
    assert read_plan(model).specs[Site(models.find(model, "linear"), "weight")].ch_axis == 1


def test_a_weight_that_is_computed():
    class Computed(nn.Module):
        def forward(self, x, w):
            return torch.nn.functional.linear(x, w)

    model = models.export(Computed(), torch.randn(2, 3), torch.randn(4, 3))
    annotate_by_table(model, TABLE, Rules(everything=CONFIG))
    assert decision(model, "linear").refusal == "its weight is no constant"


class TestTableQuantizer:
    def test_every_setter_returns_the_quantizer(self):
        quantizer = Tiny()
        assert quantizer.set_global(CONFIG) is quantizer
        assert quantizer.set_node_name("a", None) is quantizer
        assert quantizer.set_module_name("a", None) is quantizer
        assert quantizer.set_module_type(nn.Linear, CONFIG) is quantizer
        assert quantizer.set_operator_type(aten.linear.default, CONFIG) is quantizer
        assert quantizer.set_filter_function(lambda node: True) is quantizer

    def test_of_two_patterns_the_one_that_is_set_last_wins_also_when_it_is_set_again(self):
        quantizer = Tiny().set_module_name("*.conv", CONFIG).set_module_name("blocks.1.*", None)
        node = models.find(models.exported(models.net), "conv2d", 1)
        assert quantizer.rules.choose(node)[0] is None
        assert quantizer.set_module_name("*.conv", CONFIG).rules.choose(node)[0] is CONFIG

    @pytest.mark.parametrize("setter", ["set_global", "set_module_name"])
    def test_something_else_is_no_configuration(self, setter):
        arguments = ("int8",) if setter == "set_global" else ("layer", "int8")
        with pytest.raises(RuleError, match=rf"{setter}: str is no configuration"):
            getattr(Tiny(), setter)(*arguments)

    @pytest.mark.parametrize(
        ("setter", "arguments", "words"),
        [
            ("set_node_name", (3, CONFIG), "3 is no node name. Give the node's name"),
            ("set_module_name", (3, CONFIG), "3 is no module name. Give the path of a module"),
            ("set_module_type", (3, CONFIG), "3 is no module type. Give a class"),
            ("set_operator_type", ("add", CONFIG), "'add' is no operator. Give the operator itself"),
            ("set_operator_type", ([aten.add.Tensor], CONFIG), "is no operator"),
            ("set_operator_type", (nn.Linear, CONFIG), "Linear'> is no operator"),
            ("set_filter_function", (3,), "3 is no function. Give a function that takes a node"),
        ],
    )
    def test_a_rule_that_no_model_could_match_is_refused_at_once(self, setter, arguments, words):
        with pytest.raises(RuleError, match=f"{setter}: .*{words}"):
            getattr(Tiny(), setter)(*arguments)

    def test_a_packet_of_operators_and_a_python_function_are_operators(self):
        Tiny().set_operator_type(aten.linear, CONFIG).set_operator_type(operator.mul, CONFIG)

    def test_a_rule_that_matches_nothing_is_an_error(self):
        with pytest.raises(RuleError, match="set_module_name\\('nope'\\)"):
            prepare_pt2e(models.exported(models.net), Tiny().set_global(CONFIG).set_module_name("nope", None))

    def test_nothing_quantized_is_an_error_with_the_reasons(self):
        words = r"Tiny: no node is quantized: linear: no rule selects it; relu: .*Call set_global"
        with pytest.raises(NothingQuantizedError, match=words):
            prepare_pt2e(models.exported(models.mlp), Tiny())

    def test_bodies_of_control_flow_count(self):
        class Branches(nn.Module):
            def forward(self, x, w):
                return torch.cond(x.sum() > 0, lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x * 2]), (x,))

        model = models.export(Branches(), torch.randn(2, 4), torch.randn(1))
        _, plan = prepare_with_plan(model, Tiny().set_global(CONFIG))
        assert {str(site) for site in plan.specs} >= {"cat.tensors[0]", "cat.tensors[1]", "cat"}

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_second_quantizer_decides_what_the_first_left_float(self, order):
        conv = Tiny().set_operator_type(aten.conv2d.default, CONFIG)
        mean = Tiny().set_operator_type(aten.linear.default, CONFIG).set_operator_type(aten.mean.dim, CONFIG)
        model = models.exported(models.net)
        _, plan = prepare_with_plan(model, ComposableQuantizer([conv, mean][::order]))
        assert plan.decisions[models.find(model, "conv2d")].refusal is None
        assert plan.decisions[models.find(model, "linear")].refusal == "5 features; this device has 4 at most"

    def test_the_reason_of_a_batch_norm_that_was_not_folded_is_kept(self):
        module = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)).eval()
        model = models.export(module, torch.randn(1, 1, 2, 2))
        _, plan = prepare_with_plan(model, Tiny().set_global(CONFIG))
        assert "no convolution or linear layer" in plan.decisions[models.find(model, "batch_norm")].refusal


# Integer biases.


def annotated_with_int32_bias(config):
    row = Pattern(
        "linear",
        ((aten.linear.default,),),
        {"input": ACT, "weight": Weight(axis=0), "bias": BIAS_INT32},
        dynamic=(),
    )
    model = models.exported(models.mlp)
    annotate_by_table(model, Table("device", (row,)), Rules(everything=config))
    node = models.find(model, "linear")
    return node, annotation_of(node).input_qspec_map[argument(node, "bias")]


def test_int32_bias_is_derived_from_activation_and_weight():
    node, spec = annotated_with_int32_bias(CONFIG)
    assert tuple(spec.derived_from) == ((node.args[0], node), (node.args[1], node))
    assert spec.dtype == torch.int32
    observers = [MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine) for _ in range(2)]
    for observer, high in zip(observers, (2.55, 5.1), strict=True):
        observer(torch.tensor([0.0, high]))
    scale, zero_point = spec.derive_qparams_fn(observers)
    assert float(scale) == pytest.approx(0.01 * 0.02, rel=1e-6)
    assert int(zero_point) == 0


def test_int32_bias_gives_way_to_the_configuration():
    _, spec = annotated_with_int32_bias(replace(CONFIG, bias=CONFIG.input_activation))
    assert spec == CONFIG.input_activation


def test_bias_stays_float_where_the_scale_is_chosen_at_run_time():
    assert annotated_with_int32_bias(DYNAMIC)[1] is None
