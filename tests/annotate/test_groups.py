"""Sites that share a scale, whatever the order of annotations."""

import itertools
import random
import time

import models
import pytest
import quantizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import KEY, annotate
from torch.fx import Graph

from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.annotate.groups import resolve, shared_site
from zeropoint.annotate.plan import Plan
from zeropoint.annotate.read import read_plan
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import SharedQuantizationSpec
from zeropoint.graph.bind import Site
from zeropoint.numerics.observers import HistogramObserver

aten = torch.ops.aten
ACT, OTHER = quantizers.activation(), quantizers.activation(quant_min=-127)


def partition(plan: Plan) -> set[frozenset[Site]]:
    return {frozenset(group.sites) for group in resolve(plan).values()}


def shuffled(plan: Plan, seed: int) -> Plan:
    items = list(plan.specs.items())
    random.Random(seed).shuffle(items)
    return Plan(dict(items), plan.decisions, plan.unshared)


def chain(length: int):
    """Returns the nodes of ``x -> relu -> relu -> ...``."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(length):
        nodes.append(graph.call_function(aten.relu.default, (nodes[-1],)))
    return nodes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["own", "previous", "next", "input"]), min_size=2, max_size=24), st.integers(0, 10**6))
def test_the_order_of_annotations_does_not_matter(kinds, seed):
    nodes = chain(len(kinds))[1:]
    specs = {}
    for i, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
        specs[Site(node, "self")] = ACT if i % 3 else OTHER
        match kind:
            case "previous" if i > 0:
                specs[Site(node)] = SharedQuantizationSpec(nodes[i - 1])
            case "next" if i + 1 < len(nodes) and kinds[i + 1] in ("own", "next", "input"):
                specs[Site(node)] = SharedQuantizationSpec(nodes[i + 1])
            case "input":
                specs[Site(node)] = SharedQuantizationSpec((node.args[0], node))
            case _:
                specs[Site(node)] = ACT
    plan = Plan(specs)
    expected = partition(plan)
    for k in range(3):
        assert partition(shuffled(plan, seed + k)) == expected


def test_groups_take_the_spec_of_their_only_root():
    nodes = chain(3)
    plan = Plan(
        {
            Site(nodes[1]): SharedQuantizationSpec(nodes[2]),
            Site(nodes[2]): SharedQuantizationSpec((nodes[2], nodes[3])),
            Site(nodes[3], "self"): OTHER,
        }
    )
    (group,) = set(resolve(plan).values())
    assert group.spec == OTHER
    assert group.sites == tuple(plan.specs)


def timed_resolve(length: int) -> float:
    nodes = chain(length)
    specs = {Site(node): SharedQuantizationSpec(following) for node, following in itertools.pairwise(nodes)}
    plan = Plan({**specs, Site(nodes[-1]): ACT})
    start = time.process_time()
    (group,) = set(resolve(plan).values())
    seconds = time.process_time() - start
    assert len(group.sites) == length + 1
    return seconds


def test_a_chain_of_10000_shared_specs_needs_no_recursion_and_near_linear_time():
    short = min(timed_resolve(1000) for _ in range(3))
    assert timed_resolve(10_000) < 40 * short  # quadratic would be 100 times


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_circle_is_an_error(length):
    nodes = chain(length)[1:]
    plan = Plan({Site(a): SharedQuantizationSpec(b) for a, b in zip(nodes, nodes[1:] + nodes[:1], strict=True)})
    with pytest.raises(AnnotationError, match=r"shared specs form a circle: relu.* Give one of them a spec of its own"):
        resolve(plan)


def test_a_circle_beside_a_group_that_is_right():
    nodes = chain(4)
    specs = {Site(nodes[1]): ACT, Site(nodes[2]): SharedQuantizationSpec(nodes[1])}
    circle = {Site(nodes[3]): SharedQuantizationSpec(nodes[4]), Site(nodes[4]): SharedQuantizationSpec(nodes[3])}
    with pytest.raises(AnnotationError, match="circle: relu_default_2, relu_default_3"):
        resolve(Plan({**specs, **circle}))


@pytest.mark.parametrize("edge", [False, True])
def test_a_reference_to_what_is_not_quantized(edge):
    x, relu, following = chain(2)
    place = (x, relu) if edge else relu
    plan = Plan({Site(following): SharedQuantizationSpec(place)})
    name = "x -> relu_default" if edge else "relu_default"
    with pytest.raises(AnnotationError, match=f"relu_default_1: its spec refers to {name}, which is not quantized"):
        resolve(plan)


def test_an_edge_that_does_not_exist():
    x, relu, following = chain(2)
    with pytest.raises(AnnotationError, match="x -> relu_default_1, which is not quantized"):
        shared_site(Plan({Site(relu): ACT}), Site(relu), (x, following))


def branched():
    """Returns a plan-maker's nodes: x, and three readers of it."""
    graph = Graph()
    x = graph.placeholder("x")
    return x, [graph.call_function(aten.relu.default, (x,)) for _ in range(3)]


class TestImplicitSharing:
    def test_readers_of_one_tensor_with_equal_specs_share(self):
        _, readers = branched()
        plan = Plan({Site(r, "self"): quantizers.activation() for r in readers})
        assert partition(plan) == {frozenset(plan.specs)}

    def test_the_tensor_itself_shares_too(self):
        x, readers = branched()
        plan = Plan({Site(x): ACT} | {Site(r, "self"): ACT for r in readers})
        assert partition(plan) == {frozenset(plan.specs)}

    def test_different_specs_do_not(self):
        x, (a, b, c) = branched()
        plan = Plan({Site(x): OTHER, Site(a, "self"): ACT, Site(b, "self"): OTHER, Site(c, "self"): ACT})
        assert partition(plan) == {
            frozenset({Site(x), Site(b, "self")}),
            frozenset({Site(a, "self"), Site(c, "self")}),
        }

    def test_a_different_observer_is_a_different_spec(self):
        _, (a, b, _) = branched()
        plan = Plan(
            {Site(a, "self"): ACT, Site(b, "self"): quantizers.activation(observer_or_fake_quant_ctr=HistogramObserver)}
        )
        assert len(partition(plan)) == 2

    def test_the_observer_of_the_tensor_counts_before_those_of_its_readers(self):
        # As in torchao. ExecuTorch's QnnQuantizer gives what cat returns an observer of its own, ExampleQuantizer add.
        x, (a, b, c) = branched()
        other = quantizers.activation(observer_or_fake_quant_ctr=HistogramObserver)
        narrow = quantizers.activation(observer_or_fake_quant_ctr=HistogramObserver, quant_min=-8, quant_max=7)
        plan = Plan({Site(x): ACT, Site(a, "self"): other, Site(b, "self"): ACT, Site(c, "self"): narrow})
        group = resolve(plan)[Site(a, "self")]
        assert set(group.sites) == {Site(x), Site(a, "self"), Site(b, "self")}
        assert group.spec == ACT

    def test_readers_that_forbid_it_measure_with_their_own_observer(self):
        x, (a, _, _) = branched()
        other = quantizers.activation(observer_or_fake_quant_ctr=HistogramObserver)
        assert len(partition(Plan({Site(x): ACT, Site(a, "self"): other}, unshared={a}))) == 2

    def test_readers_that_forbid_it_have_their_own(self):
        x, readers = branched()
        plan = Plan({Site(x): ACT} | {Site(r, "self"): ACT for r in readers}, unshared=set(readers))
        assert len(partition(plan)) == 4

    def test_a_reader_that_allows_it_shares_with_all(self):
        # As in torchao: each reader that allows sharing joins every other reader of the tensor.
        x, readers = branched()
        plan = Plan({Site(x): ACT} | {Site(r, "self"): ACT for r in readers}, unshared=set(readers[:2]))
        assert partition(plan) == {frozenset(plan.specs)}

    def test_equal_by_way_of_shared_specs(self):
        _, (a, b, c) = branched()
        plan = Plan({Site(c): ACT, Site(a, "self"): SharedQuantizationSpec(c), Site(b, "self"): ACT})
        assert partition(plan) == {frozenset(plan.specs)}

    def test_outputs_of_different_nodes_do_not_share(self):
        _, (a, b, _) = branched()
        assert len(partition(Plan({Site(a): ACT, Site(b): ACT}))) == 2

    @pytest.mark.parametrize("forbidden", [False, True])
    def test_a_tensor_read_twice_by_one_node_is_one_edge(self, forbidden):
        model = models.exported(models.adds)
        add = models.find(model, "add", 1)
        annotate(add, {"self": ACT}, allow_implicit_sharing=not forbidden)
        (group,) = partition(read_plan(model))
        assert group == {Site(add, "self"), Site(add, "other")}


def test_the_shared_inputs_of_cat_point_at_the_first():
    model = models.exported(models.branches)
    quantizers.static(model)
    cat = models.find(model, "cat")
    group = resolve(read_plan(model))[Site(cat)]
    linears = [models.find(model, "linear", i) for i in range(3)]
    assert {Site(cat, "tensors", i) for i in range(3)} | {Site(cat)} <= set(group.sites)
    assert Site(linears[0]) in group.sites  # its output has the spec of the first input
    assert group.spec == ACT


def test_annotation_order_within_a_map_does_not_matter():
    model = models.exported(models.adds)
    add = models.find(model, "add")
    x, y = add.args
    partitions = []
    for first in ((x, y), (y, x)):
        specs = {x: ACT, y: SharedQuantizationSpec((x, add))}
        add.meta[KEY] = QuantizationAnnotation({node: specs[node] for node in first})
        partitions.append(partition(read_plan(model)))
    assert partitions[0] == partitions[1] == {frozenset({Site(add, "self"), Site(add, "other")})}
