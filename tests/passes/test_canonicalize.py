"""The form that quantizers expect."""

import models
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from zeropoint.graph.graph_pass import remove_dead_code
from zeropoint.graph.show import show
from zeropoint.graph.source import WRITTEN_KEY
from zeropoint.passes.canonicalize import canonicalize


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v, *mask):
        return F.scaled_dot_product_attention(q, k, v, *mask, **self.settings)


def tensors(heads=2, key_heads=2, rows=3, columns=4, *, value_width=6):
    torch.manual_seed(0)
    return (
        torch.randn(1, heads, rows, 5),
        torch.randn(1, key_heads, columns, 5),
        torch.randn(1, key_heads, columns, value_width),
    )


def compare(settings, *inputs):
    model = models.export(Attention(**settings), *inputs)
    expected = model(*inputs)
    canonicalize(model)
    model.recompile()
    assert torch.allclose(model(*inputs), expected, atol=1e-5)
    return model


def test_guards_are_removed():
    model = models.exported(models.mlp)
    canonicalize(model)
    assert not [n for n in model.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_without_a_mask(scale):
    model = compare({"scale": scale}, *tensors())
    assert models.count(model, "matmul") == 2
    assert models.count(model, "scaled_dot_product_attention") == 0
    assert show(model).splitlines()[2] == f"mul_tensor = mul(matmul_default, {scale if scale else 5**-0.5:.4g})"


def test_attention_with_a_boolean_mask():
    mask = torch.rand(3, 4) > 0.4
    mask[:, 0] = True
    model = compare({}, *tensors(), mask)
    assert models.count(model, "masked_fill") == 2


def test_a_row_that_is_hidden_as_a_whole_gives_zeros():
    mask = torch.rand(3, 4) > 0.4
    mask[1] = False
    model = compare({}, *tensors(), mask)
    assert not model(*tensors(), mask)[..., 1, :].any()


def test_attention_with_a_float_mask():
    model = compare({}, *tensors(), torch.randn(1, 1, 3, 4))
    assert models.count(model, "add") == 1


@pytest.mark.parametrize("columns", [3, 5])
def test_causal_attention(columns):
    compare({"is_causal": True}, *tensors(columns=columns))


def test_grouped_query_attention():
    compare({"enable_gqa": True}, *tensors(heads=4, key_heads=2))


def test_three_dimensions():
    compare({}, *(t[0] for t in tensors()))


def test_attention_with_dropout_is_left():
    model = models.export(Attention(dropout_p=0.5), *tensors())
    canonicalize(model)
    assert models.count(model, "scaled_dot_product_attention") == 1


@pytest.mark.parametrize("causal", [False, True])
def test_free_sizes_stay_free(causal):
    class Self(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=causal)

    shapes = ({2: Dim("length", min=2, max=64)},)
    model = torch.export.export(Self(), (torch.randn(1, 2, 3, 5),), dynamic_shapes=shapes).module()
    canonicalize(model)
    model.recompile()
    longer = torch.randn(1, 2, 7, 5)
    assert torch.allclose(model(longer), Self()(longer), atol=1e-5)


def test_new_nodes_know_where_they_come_from():
    model = models.export(Attention(), *tensors())
    stack = models.find(model, "scaled_dot_product_attention").meta["stack_trace"]
    canonicalize(model)
    for node in model.graph.nodes:
        if node.op == "call_function":
            assert node.meta["stack_trace"] == stack
            assert node.meta["val"] is not None
            assert node.meta["from_node"]


def test_a_view_of_attention_reads_any_strides():
    """The operator's result lies in memory as the query does, the product's does not: ``view`` took one of them."""

    class Viewed(nn.Module):
        def forward(self, x):
            q = x.view(2, 3, 4, 5).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(2, 3, 20)

    x = torch.randn(2, 3, 20)
    model = models.export(Viewed(), x)
    canonicalize(model)
    model.recompile()
    assert torch.allclose(model(x), Viewed()(x), atol=1e-5)


def test_checks_of_a_type_are_removed():
    model = models.export(models.Applied(lambda m, x: (x * 2).float() + 1), torch.randn(2))
    assert models.count(model, "_assert_tensor_metadata")
    canonicalize(model)
    assert not models.count(model, "_assert_tensor_metadata")


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x, y: (x * 2).reshape_as(y), "reshape"),
        (lambda x, y: (x * 2).view_as(y), "view"),
        (lambda x, y: (x * 2)[:1, :2, None].expand_as(y), "expand"),
    ],
)
def test_sizes_of_another_tensor_become_numbers(function, operator):
    inputs = torch.randn(2, 12), torch.randn(2, 2, 6)
    if operator == "expand":
        inputs = torch.randn(2, 3), torch.randn(4, 2, 5)
    model = models.export(models.Applied(lambda m, x, y: function(x, y + 1)), *inputs)
    written = models.find(model, f"{operator}_as").target
    canonicalize(model)
    node = models.find(model, operator)
    assert list(node.args[1]) == list(inputs[1].shape)
    assert node.meta[WRITTEN_KEY] is written
    remove_dead_code(model.graph)
    assert models.count(model, "add") == 0
    model.recompile()
    assert torch.equal(model(*inputs), function(inputs[0], inputs[1] + 1))


@pytest.mark.parametrize(
    ("function", "operator", "free", "taken"),
    [
        (lambda x: (x * 2).flatten(0, 1).reshape_as(x), "reshape", {0}, True),
        (lambda x: (x * 2).view_as(x.transpose(1, 2)), "view", {0, 2}, False),
        (lambda x: (x[:, :1] * 2).expand_as(x), "expand", {0}, True),
        (lambda x: (x[:, :1] * 2).expand_as(x), "expand", {0, 2}, True),
        (lambda x: (x[:, :1] * 2).expand_as(x), "expand", {1}, False),
        (lambda x: (x[0] * 2).expand_as(x), "expand", {0}, False),
    ],
)
def test_a_free_size_is_given_where_it_follows_from_the_others(function, operator, free, taken):
    shapes = ((dict.fromkeys(free, Dim.DYNAMIC),),)
    module = models.Applied(lambda m, x: function(x))
    model = torch.export.export(module, (torch.randn(2, 3, 4),), dynamic_shapes=shapes).module()
    canonicalize(model)
    model.recompile()
    assert models.count(model, operator if taken else f"{operator}_as") == 1
    x = torch.randn(*(size + 2 if axis in free else size for axis, size in enumerate((2, 3, 4))))
    assert torch.equal(model(x), function(x))
