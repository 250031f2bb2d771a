"""Where a node comes from."""

import models
import pytest
from torch.fx import Graph

from zeropoint.graph.source import describe, module_path, module_stack, operator_name, source_line


@pytest.mark.parametrize("strict", [False, True])
class TestBothKindsOfExport:
    def test_module_paths_are_those_of_named_modules(self, strict):
        model = models.exported(models.net, strict=strict)
        assert module_path(models.find(model, "conv2d", 1)) == "blocks.1.conv"
        assert module_path(models.find(model, "mean")) == ""
        assert [path for path, _ in module_stack(models.find(model, "relu"))][-2:] == ["blocks.0", "blocks.0.act"]

    def test_types_are_qualified_names(self, strict):
        stack = module_stack(models.find(models.exported(models.net, strict=strict), "linear"))
        assert stack[0] == ("", "models.Net")
        assert stack[-1] == ("head", "torch.nn.modules.linear.Linear")

    def test_a_parameter_belongs_to_its_reader(self, strict):
        model = models.exported(models.net, strict=strict)
        weight = next(n for n in model.graph.nodes if n.target == "blocks.1.conv.weight")
        assert not weight.meta.get("nn_module_stack")
        assert module_path(weight) == "blocks.1.conv"

    def test_a_module_called_twice_has_one_path(self, strict):
        model = models.exported(models.called_twice, strict=strict)
        assert {module_path(models.find(model, "linear", i)) for i in (0, 1)} == {"layer"}

    def test_the_source_line_is_the_users(self, strict):
        model = models.exported(models.net, strict=strict)
        assert source_line(models.find(model, "mean")).startswith("models.py:")
        assert source_line(models.find(model, "conv2d")).startswith("models.py:")


def test_the_source_line_of_control_flow_is_no_generated_code():
    model = models.exported(models.conditional)
    assert source_line(models.find(model, "call_function")).startswith("models.py:")


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("L['self']", ""),
        ("L__self__", ""),
        ("L['self'].blocks[0].conv", "blocks.0.conv"),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        ("L__self___blocks", "_blocks"),
        ("blocks.0.conv", "blocks.0.conv"),
    ],
)
def test_spellings_of_older_exports(path, normal):
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (path, "m.Kind")}
    assert module_stack(node) == ((normal, "m.Kind"),)


def test_the_type_may_be_a_class():
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": ("a", models.Net.Block)}
    assert module_stack(node) == (("a", "models.Net.Block"),)


def test_a_node_without_metadata():
    node = Graph().placeholder("x")
    assert (module_stack(node), module_path(node), source_line(node), describe(node)) == ((), "", "", "x")


def test_describe_says_operator_module_and_line():
    text = describe(models.find(models.exported(models.net), "linear"))
    assert text.startswith("linear (linear) [head, models.py:")


def test_operator_names():
    model = models.exported(models.conditional)
    names = [operator_name(node) for node in model.graph.nodes if node.op == "call_function"]
    assert names == ["sum", "gt", "cond", "getitem"]
    assert operator_name(next(iter(model.graph.nodes))) == "get_attr"
