"""``explain``: nodes, reasons, groups of shared scales and who widened them, strict modules, other forms of a model."""

import copy
import json

import models
import pytest
import quantizers
import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_default_quantization_config
from zeropoint.core.errors import CaptureError, RuleError, SpecError, StaysFloatError, UnknownNameError
from zeropoint.graph.show import show


def quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_default_quantization_config())


class Branches(nn.Module):
    """Two convolutions whose outputs share one scale, the second a hundred times as wide; then what stays float."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Conv2d(3, 4, 1)
        self.wide = nn.Conv2d(3, 4, 1)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        both = torch.cat([self.narrow(x), 100 * self.wide(x)], 1)
        return self.drop(self.norm(torch.nn.functional.max_pool2d(both, 1)))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    return Branches().eval(), (torch.randn(2, 3, 6, 6),)


def test_nodes_are_those_that_prepare_covers():
    module, inputs = models.net()
    explanation = zp.explain(module, quantizer(), inputs)
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    rows = prepared.meta["zeropoint"].coverage
    found = [(n.name, n.operator, n.module, n.source, n.pattern, n.reason) for n in explanation]
    assert found == [(r.node, r.operator, r.module, r.source, r.pattern, r.reason) for r in rows]
    assert len(explanation) == len(rows)


def test_one_node_in_depth():
    module, inputs = models.net()
    explanation = zp.explain(module, quantizer(), inputs)
    conv = explanation["conv2d"]
    assert conv.computed_with == ("relu",)
    assert [(t.site, t.tensor, t.dtype) for t in conv.inputs[:2]] == [
        ("conv2d.input", "x", "float32"),
        ("conv2d.weight", "blocks.0.conv.weight", "float32"),
    ]
    assert conv.inputs[0].spec == "int8 [-128, 127] per_tensor_affine by MinMaxObserver"
    assert conv.inputs[1].spec == "int8 [-127, 127] per_channel_symmetric axis 0 by PerChannelMinMaxObserver"
    assert conv.output.spec == ""
    assert explanation["relu"].output.group == explanation["conv2d_1"].inputs[0].group
    assert "computed with relu" in str(conv)


def test_a_folded_norm_is_found_by_its_name():
    module, inputs = models.net()
    explanation = zp.explain(module, quantizer(), inputs)
    gone = explanation["batch_norm_1"]
    assert gone.became == ("conv2d_1",)
    assert str(gone).endswith("it is folded into conv2d_1, which computes both")
    assert len(explanation["blocks.1"].nodes) == 2
    assert [node.name for node in explanation["blocks.1.norm"].gone] == ["batch_norm_1"]
    with pytest.raises(UnknownNameError, match=r"called 'conv2'.*Did you mean .*conv2d"):
        explanation["conv2"]
    with pytest.raises(KeyError):
        explanation["blocks.7"]


def test_attention_is_found_by_what_export_called_it():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = tuple(torch.randn(1, 2, 4, 8) for _ in range(3))
    found = zp.explain(Attention(), quantizer(), inputs)["scaled_dot_product_attention"]
    assert {"matmul", "softmax"} <= {node.operator for node in found}


def test_who_widened_a_shared_scale(branches):
    module, inputs = branches
    data = [inputs, (3 * inputs[0],)]
    explanation = zp.explain(module, quantizer(), inputs, calibration_data=data)
    group = explanation.group(explanation["cat"].output.group)
    ranges = {member.tensor: (member.low, member.high) for member in group.members}
    assert {"conv2d", "mul", "cat", "max_pool2d"} <= set(ranges)
    with torch.no_grad():
        outputs = [module.narrow(x) for (x,) in data], [100 * module.wide(x) for (x,) in data]
    for name, values in zip(("conv2d", "mul"), outputs, strict=True):
        assert ranges[name] == pytest.approx((min(float(v.min()) for v in values), max(float(v.max()) for v in values)))
    assert group.widened_by() == ("mul",)
    assert "range by mul" in str(explanation)
    assert zp.explain(module, quantizer(), inputs).group(group.number).widened_by() == ()


def test_a_calibrated_model_has_the_ranges_of_its_observers(branches):
    module, inputs = branches
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    prepared(*inputs)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    explanation = zp.explain(prepared, calibration_data=[(2 * inputs[0],)])
    group = explanation.group(explanation["cat"].inputs[0].group)
    wide = 100 * module.wide(inputs[0]).detach()
    assert (group.low, group.high) == pytest.approx((float(wide.min()), float(wide.max())))
    assert group.widened_by() == ("mul",)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert explanation["conv2d"].pattern == "conv"
    assert explanation["layer_norm"].reason == zp.explain(module, quantizer(), inputs)["layer_norm"].reason


def test_data_that_does_not_fit_is_refused(branches):
    module, inputs = branches
    with pytest.raises(zp.ZeropointError, match=r"calibration batch 0.*has shape"):
        zp.explain(module, quantizer(), inputs, calibration_data=[(torch.randn(2, 4, 6, 6),)])
    with pytest.raises(zp.ZeropointError, match="calibration_data is empty"):
        zp.explain(module, quantizer(), inputs, calibration_data=[])


def test_strict_names_what_stays_float(branches):
    module, inputs = branches
    zp.explain(module, quantizer(), inputs, strict=["narrow", "wide"])
    with pytest.raises(
        StaysFloatError, match=r"1 operators stay float:\n  layer_norm \(layer_norm\) \[norm, .*\]: the"
    ):
        zp.explain(module, quantizer(), inputs, strict=["narrow", "no*"])
    with pytest.raises(RuleError, match=r"strict='head\.\*': it matches no module of the model.*narrow, norm"):
        zp.explain(module, quantizer(), inputs, strict=["head.*"])


def test_strict_is_not_about_integers():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(4, 4)

        def forward(self, x, i):
            return self.table(x), i + 1

    explanation = zp.explain(Positions(), quantizer(), (torch.randn(1, 4), torch.zeros(1, dtype=torch.long)))
    assert not explanation["add"].is_quantized
    explanation.require_quantized(["*"])


@pytest.mark.parametrize("build", [models.net, models.conditional, models.counter])
def test_the_model_is_left_as_it_was(build):
    module, inputs = build()
    graph = torch.export.export(module, inputs).module()
    texts = [show(each) for each in graph.modules() if isinstance(each, torch.fx.GraphModule)]
    metas = [set(node.meta) for node in graph.graph.nodes]
    state = copy.deepcopy(graph.state_dict())
    zp.explain(graph, quantizer(), calibration_data=[inputs])
    assert [show(each) for each in graph.modules() if isinstance(each, torch.fx.GraphModule)] == texts
    assert [set(node.meta) for node in graph.graph.nodes] == metas
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_nothing_quantized_is_explained_too():
    module, inputs = models.net()
    explanation = zp.explain(module, XNNPACKQuantizer(), inputs)
    assert explanation.quantized == ()
    assert {node.reason for node in explanation} == {"no rule selects it"}


def test_rules_say_what_they_match():
    module, inputs = models.net()
    chosen = quantizer().set_module_name("blocks.*", None).set_operator_type(torch.ops.aten.relu.default, None)
    rules = {each.rule: each for each in zp.explain(module, chosen, inputs).rules}
    assert rules["set_module_name('blocks.*', None)"].matched == 6  # Two convolutions, norms and relus.
    relu = rules["set_operator_type(aten.relu.default, None)"]
    assert (relu.matched, relu.decided) == (2, 0)
    with pytest.raises(RuleError, match="matches no node"):
        zp.explain(module, quantizer().set_module_name("bloks", None), inputs)


@pytest.mark.filterwarnings("ignore")
def test_a_foreign_quantizer(branches):
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    module, inputs = branches
    config = theirs.get_symmetric_quantization_config()
    graph = torch.export.export(module, inputs).module()
    explanation = zp.explain(graph, theirs.XNNPACKQuantizer().set_global(config))
    assert explanation["conv2d"].is_quantized
    assert explanation["layer_norm"].reason == "the quantizer did not annotate it"
    prepared = prepare_pt2e(graph, theirs.XNNPACKQuantizer().set_global(config))
    prepared(*inputs)
    of_torchao = zp.explain(prepared)
    assert {node.operator for node in of_torchao.quantized} == {node.operator for node in explanation.quantized}
    assert of_torchao.group(of_torchao["cat"].inputs[0].group).high is not None


def test_json_has_all_of_it(branches):
    module, inputs = branches
    explanation = zp.explain(module, quantizer(), inputs, calibration_data=[inputs])
    found = json.loads(explanation.to_json())
    assert [node["name"] for node in found["nodes"]] == [node.name for node in explanation]
    assert (found["quantized"], found["float"]) == (len(explanation.quantized), len(explanation.stays_float))
    assert [group["members"][0]["tensor"] for group in found["groups"]] == [
        group.members[0].tensor for group in explanation.groups
    ]


def test_what_cannot_be_explained():
    module, inputs = models.net()
    with pytest.raises(CaptureError, match=r"Net is not exported\. Give example_inputs"):
        zp.explain(module, quantizer())
    with pytest.raises(SpecError, match="no quantizer is given"):
        zp.explain(module, None, inputs)
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    with pytest.raises(SpecError, match="prepared already"):
        zp.explain(prepared, quantizer())
    prepared(*inputs)
    with pytest.raises(zp.ZeropointError, match="converted already"):
        zp.explain(zp.convert_pt2e(prepared), quantizer())


def test_annotations_by_hand():
    model = models.exported(models.net)

    explanation = zp.explain(model, quantizers.ByHand(quantizers.static))
    assert len(explanation.quantized) == 4
    assert explanation["relu"].reason == "the quantizer did not annotate it"


def test_many_layers_are_few_lines():
    layers = [nn.Linear(4, 4) for _ in range(60)]
    text = str(zp.explain(nn.Sequential(*layers), quantizer(), (torch.randn(1, 4),)))
    assert len(text.splitlines()) < 12
    assert "in {0..59}" in text


def test_a_part_has_the_groups_of_its_nodes_by_their_numbers(branches):
    module, inputs = branches
    explanation = zp.explain(module, quantizer(), inputs)
    part = explanation["wide"]
    numbers = {tensor.group for node in part for tensor in (*node.inputs, node.output)} - {None}
    assert numbers
    assert all(part.group(number) == explanation.group(number) for number in numbers)
    (other, *_) = {group.number for group in explanation.groups} - numbers
    with pytest.raises(UnknownNameError, match=f"there is no group {other}"):
        part.group(other)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.cat([self.first(x).masked_fill(x > 0, -torch.inf), self.second(x)], -1).reshape(-1, 16)


def test_a_range_without_end_is_none_in_json():
    torch.manual_seed(0)
    inputs = (torch.randn(4, 8),)
    explanation = zp.explain(Masked().eval(), quantizer(), inputs, calibration_data=[inputs])
    members = [member for group in json.loads(explanation.to_json())["groups"] for member in group["members"]]
    (low,) = [member["low"] for member in members if member["tensor"] == "masked_fill"]
    assert low is None


class Branching(nn.Module):
    """Both branches and the model have operators of the same names; the model's alone can be measured."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        def same(h):
            return torch.cat([self.second(h), h], 1).relu()

        def other(h):
            return torch.cat([self.second(h), -h], 1).relu()

        chosen = torch.cond(x.sum() > 0, same, other, (x,))
        return torch.cat([self.first(x), x], 1).relu() + chosen


def test_ranges_are_of_the_model_and_not_of_bodies_with_the_same_names():
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 4, 4),)
    explanation = zp.explain(Branching().eval(), quantizer(), inputs, calibration_data=[inputs])
    lows = [member.low for group in explanation.groups for member in group.members if member.tensor == "cat"]
    assert len(lows) == 3
    assert [low is None for low in lows].count(True) == 2
