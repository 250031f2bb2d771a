"""Plans: printed, saved, merged."""

import json

import models
import pytest
import quantizers
import torch

from zeropoint.annotate.plan import DECISION_KEY, Decision, Plan, decisions_of, describe_spec
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import DerivedQuantizationSpec, FixedQParamsQuantizationSpec, SharedQuantizationSpec
from zeropoint.graph.bind import Site
from zeropoint.numerics.observers import MinMaxObserver

ACT = quantizers.activation()


@pytest.fixture
def linear():
    return models.find(models.exported(models.linear), "linear")


def test_specs_in_words(linear):
    x = linear.args[0]
    assert describe_spec(ACT) == "int8 [-128, 127] per_tensor_affine by MinMaxObserver"
    assert describe_spec(quantizers.weight()) == (
        "int8 [-127, 127] per_channel_symmetric axis 0 by PerChannelMinMaxObserver"
    )
    eps = quantizers.activation(observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=1.0), is_dynamic=True)
    assert describe_spec(eps) == "int8 [-128, 127] per_tensor_affine at run time by MinMaxObserver"
    assert describe_spec(SharedQuantizationSpec((x, linear))) == "as input_1 -> linear"
    assert describe_spec(SharedQuantizationSpec(linear)) == "as linear"
    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0)
    assert describe_spec(fixed) == "uint8 fixed, scale 0.00390625, zero_point 0"
    derived = DerivedQuantizationSpec([(x, linear), linear], lambda o: None, torch.int32)
    assert describe_spec(derived) == "int32 derived from input_1 -> linear, linear"


def test_merge_takes_both(linear):
    one = Plan({Site(linear): ACT}, {}, {linear})
    other = Plan(
        {Site(linear, "input"): ACT, Site(linear): quantizers.activation()}, {linear: Decision("d", (linear,))}
    )
    both = one.merge(other)
    assert set(both.specs) == {Site(linear), Site(linear, "input")}
    assert both.unshared == {linear}
    assert both.decisions[linear].pattern == "d"
    assert len(one.specs) == 1


def test_a_conflict_names_site_and_both_specs(linear):
    one, other = Plan({Site(linear, "input"): ACT}), Plan({Site(linear, "input"): quantizers.weight()})
    with pytest.raises(AnnotationError, match=r"linear\.input: two specs: int8 .*by MinMax.* and int8 .*by PerChannel"):
        one.merge(other)


def test_as_json(linear):
    x = linear.args[0]
    decision = Decision("linear", (linear, x), "groups=2")
    plan = Plan({Site(linear, "input"): ACT}, {linear: decision, x: decision})
    read = json.loads(plan.to_json())
    assert read == {
        "sites": [{"site": "linear.input", "spec": describe_spec(ACT)}],
        "decisions": [{"pattern": "linear", "nodes": ["linear", "input_1"], "refusal": "groups=2"}],
    }


def test_printed(linear):
    plan = Plan({Site(linear, "input"): ACT}, {linear: Decision("linear", (linear,), "groups=2")})
    assert str(plan) == f"linear.input: {describe_spec(ACT)}\nlinear (linear): float: groups=2"


def test_quantized_nodes(linear):
    assert Plan({Site(linear, "input"): ACT}).quantized_nodes() == {linear}


def test_decisions_are_read_from_metadata(linear):
    linear.meta[DECISION_KEY] = Decision("linear", (linear,))
    assert decisions_of(linear.graph.nodes) == {linear: Decision("linear", (linear,))}
