"""Sites and the binding of arguments."""

import operator

import models
import pytest
import torch
from torch.fx import Graph

from zeropoint.graph.bind import Site, argument, argument_names, bind, reads, replace_read, set_argument

aten = torch.ops.aten


@pytest.fixture
def graph():
    return Graph()


@pytest.fixture
def xyz(graph):
    return [graph.placeholder(name) for name in "xyz"]


def test_arguments_are_named_by_the_schema(graph, xyz):
    x, weight, bias = xyz
    conv = graph.call_function(aten.conv2d.default, (x, weight, bias, [2, 2]), {"groups": 3})
    assert bind(conv) == {"input": x, "weight": weight, "bias": bias, "stride": [2, 2], "groups": 3}


def test_an_argument_left_out_has_the_default_of_the_schema(graph, xyz):
    conv = graph.call_function(aten.conv2d.default, (xyz[0], xyz[1]))
    assert argument(conv, "bias") is None
    assert argument(conv, "stride") == [1, 1]
    assert argument(conv, "groups") == 1
    assert argument(conv, "no such argument", 7) == 7


def test_an_argument_that_is_passed_as_none_is_none_not_the_default(graph, xyz):
    assert argument(graph.call_function(aten.clamp.default, (xyz[0], None, 6)), "min", 5) is None


def test_getitem_has_names_without_a_schema(graph, xyz):
    taken = graph.call_function(operator.getitem, (xyz[0], 1))
    assert bind(taken) == {"sequence": xyz[0], "index": 1}


def test_other_python_functions_have_numbered_arguments(graph, xyz):
    product = graph.call_function(operator.mul, (xyz[0], 4))
    assert bind(product) == {"arg0": xyz[0], "arg1": 4}
    assert argument_names(graph.output((xyz[0],))) == ("arg0",)


def test_reads_follow_the_order_of_arguments_and_enter_lists(graph, xyz):
    x, y, z = xyz
    cat = graph.call_function(aten.cat.default, ([x, y, x], 1))
    assert list(reads(cat)) == [
        (Site(cat, "tensors", 0), x),
        (Site(cat, "tensors", 1), y),
        (Site(cat, "tensors", 2), x),
    ]
    index = graph.call_function(aten.index.Tensor, (x, [None, z]))
    assert list(reads(index)) == [(Site(index, "self"), x), (Site(index, "indices", 1), z)]


def test_reads_include_keyword_arguments(graph, xyz):
    x, weight, bias = xyz
    linear = graph.call_function(aten.linear.default, (x,), {"bias": bias, "weight": weight})
    assert dict(reads(linear)) == {Site(linear, "input"): x, Site(linear, "bias"): bias, Site(linear, "weight"): weight}


def test_reading_one_tensor_twice_is_two_sites(graph, xyz):
    add = graph.call_function(aten.add.Tensor, (xyz[0], xyz[0]))
    assert [site.argument for site, _ in reads(add)] == ["self", "other"]


def test_sites_are_values():
    graph = Graph()
    x = graph.placeholder("x")
    assert Site(x) == Site(x)
    assert len({Site(x), Site(x), Site(x, "a"), Site(x, "a", 0)}) == 3
    assert (str(Site(x)), str(Site(x, "input")), str(Site(x, "tensors", 2))) == ("x", "x.input", "x.tensors[2]")
    assert Site(x).is_output
    assert not Site(x, "input").is_output


@pytest.mark.parametrize(
    ("args", "kwargs", "name", "expected_args", "expected_kwargs"),
    [
        ("xw", {}, "weight", "xy", {}),
        ("xw", {}, "bias", "xwy", {}),
        ("x", {"weight": "w"}, "weight", "x", {"weight": "y"}),
        ("xw", {}, "groups", "xw", {"groups": "y"}),
    ],
)
def test_set_argument_replaces_it_where_it_is_passed(args, kwargs, name, expected_args, expected_kwargs):
    graph = Graph()
    nodes = {letter: graph.placeholder(letter) for letter in "xwy"}
    conv = graph.call_function(
        aten.conv2d.default, tuple(nodes[a] for a in args), {k: nodes[v] for k, v in kwargs.items()}
    )
    set_argument(conv, name, nodes["y"])
    assert conv.args == tuple(nodes[a] for a in expected_args)
    assert conv.kwargs == {k: nodes[v] for k, v in expected_kwargs.items()}


def test_set_argument_of_a_keyword_only_argument_stays_a_keyword(graph, xyz):
    add = graph.call_function(aten.add.Tensor, (xyz[0], xyz[1]))
    set_argument(add, "alpha", 2)
    assert add.args == (xyz[0], xyz[1])
    assert add.kwargs == {"alpha": 2}


def test_replace_read_leaves_other_reads_of_the_same_node(graph, xyz):
    x, y, _ = xyz
    add = graph.call_function(aten.add.Tensor, (x, x))
    replace_read(Site(add, "other"), y)
    assert add.args == (x, y)
    cat = graph.call_function(aten.cat.default, ([x, x],))
    replace_read(Site(cat, "tensors", 0), y)
    assert cat.args == ([y, x],)
    assert set(cat.all_input_nodes) == {x, y}


def test_replace_read_of_the_output_and_of_a_tuple(graph, xyz):
    x, y, z = xyz
    output = graph.output((x, y))
    replace_read(Site(output, "arg0", 1), z)
    assert output.args == ((x, z),)


def test_every_node_of_an_exported_graph_binds():
    for build in (models.net, models.branches, models.conditional, models.looped, models.scanned):
        for node in models.exported(build).graph.nodes:
            read = {source for _, source in reads(node)}
            assert read == set(node.all_input_nodes), node.format_node()
