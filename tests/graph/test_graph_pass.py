"""What every pass does besides its own work."""

import logging

import models
import pytest
import torch
from torch.fx import GraphModule

from zeropoint.core.errors import GraphError, SpecError
from zeropoint.graph.graph_pass import bodies, graph_pass, remove_dead_code

aten = torch.ops.aten


@graph_pass
def triple(model: GraphModule) -> int:
    """Turns each linear layer's result into three times of it."""
    changed = 0
    for node in [n for n in model.graph.nodes if n.target is aten.linear.default]:
        with model.graph.inserting_after(node):
            product = model.graph.call_function(aten.mul.Tensor, (node, 3))
        node.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
        changed += 1
    return changed


def test_dead_code_is_removed():
    @graph_pass
    def add_dead(model):
        with model.graph.inserting_before(models.find(model, "output")):
            model.graph.call_function(aten.relu.default, (models.find(model, "linear"),))

    model = models.exported(models.linear)
    add_dead(model)
    assert not models.count(model, "relu")


def test_an_error_names_the_pass():
    @graph_pass
    def divide(model):
        return 1 / 0

    with pytest.raises(GraphError, match=r"divide: the pass failed: ZeroDivisionError: division by zero") as error:
        divide(models.exported(models.linear))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_error_of_this_package_is_left_as_it_is():
    @graph_pass
    def refuse(model):
        raise SpecError("no")

    with pytest.raises(SpecError, match="no"):
        refuse(models.exported(models.linear))


def test_a_graph_that_a_pass_breaks_is_an_error():
    @graph_pass
    def shuffle(model):
        output = models.find(model, "output")
        models.find(model, "placeholder").prepend(output)

    with pytest.raises(GraphError, match="shuffle: the pass failed: RuntimeError: output reads linear before"):
        shuffle(models.exported(models.linear))


def test_what_dead_code_reads_is_dead_too():
    model = models.exported(models.linear)
    linear = models.find(model, "linear")
    nodes = [node.name for node in model.graph.nodes]
    with model.graph.inserting_after(linear):
        first = model.graph.call_function(aten.relu.default, (linear,))
        second = model.graph.call_function(aten.relu.default, (first,))
    first.append(second)
    remove_dead_code(model.graph)
    assert [node.name for node in model.graph.nodes] == nodes


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.conditional, ["true_graph_0", "false_graph_0"]),
        (models.looped, ["while_loop_cond_graph_0", "while_loop_body_graph_0"]),
        (models.scanned, ["scan_combine_graph_0"]),
        (models.net, []),
    ],
)
def test_bodies_of_control_flow(build, names):
    assert [path for path, _ in bodies(models.exported(build))] == names


@pytest.mark.parametrize("build", [models.conditional, models.looped, models.scanned])
def test_bodies_of_control_flow_are_treated_too(build):
    model = models.exported(build)
    assert triple(model) == 0
    assert sum(models.count(body, "mul") for _, body in bodies(model)) >= 1
    for _, body in bodies(model):
        assert models.count(body, "linear") == 0 or models.find(body, "mul").args[1] == 3


def test_name_and_docstring_stay():
    assert (triple.__name__, triple.__doc__.split()[0]) == ("triple", "Turns")


def test_debug_1_logs_time_and_changes_of_operators(monkeypatch, caplog):
    monkeypatch.setenv("ZEROPOINT_DEBUG", "1")
    with caplog.at_level(logging.WARNING, "zeropoint"):
        assert triple(models.exported(models.linear)) == 1
    (record,) = [r for r in caplog.records if r.name == "zeropoint"]
    assert record.getMessage().startswith("triple: ")
    assert record.getMessage().endswith(" ms; mul +1")


def test_debug_3_shows_the_graph(monkeypatch, caplog):
    monkeypatch.setenv("ZEROPOINT_DEBUG", "3")
    with caplog.at_level(logging.WARNING, "zeropoint"):
        triple(models.exported(models.linear))
    assert "mul_tensor = mul(linear, 3)" in caplog.text


def test_without_debug_nothing_is_logged(caplog):
    triple(models.exported(models.linear))
    assert not [r for r in caplog.records if r.name == "zeropoint"]
