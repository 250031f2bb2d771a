"""Which operators do nothing."""

import models
import pytest
import torch
from torch.nn import functional as F

from zeropoint.graph.memory import Memory
from zeropoint.graph.no_ops import erase_no_ops, is_no_op
from zeropoint.graph.source import WRITTEN_KEY
from zeropoint.passes.canonicalize import canonicalize

X = torch.randn(2, 3)


def added(x):
    y = x + 1
    z = y.clone()
    y.add_(1)
    return y * z


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (lambda x: F.dropout(x + 1, training=False) * 2, "dropout", True),
        (lambda x: F.dropout(x + 1, training=True) * 2, "dropout", False),
        (lambda x: F.dropout1d(x + 1, training=False) * 2, "feature_dropout", True),
        (lambda x: F.alpha_dropout(x + 1, training=False) * 2, "alpha_dropout", True),
        (lambda x: F.feature_alpha_dropout(x + 1, training=True) * 2, "feature_alpha_dropout", False),
        (lambda x: (x + 1).clone() * 2, "clone", True),
        (added, "clone", False),
        (lambda x: (x + 1).detach() * 2, "detach", True),
        (lambda x: (x + 1).float() * 2, "to", True),
        (lambda x: (x + 1).double() * 2, "to", False),
        (lambda x: (x + 1).to(torch.float32, copy=True) * 2, "to", False),
        (lambda x: (x + 1).expand(2, 3) * 2, "expand", True),
        (lambda x: (x + 1).expand(2, 2, 3) * 2, "expand", False),
        (lambda x: torch.relu(x + 1) * 2, "relu", False),
    ],
)
def test_is_no_op(function, name, expected):
    model = models.export(models.Applied(lambda m, x: function(x)), X)
    node = models.find(model, name)
    assert is_no_op(node, Memory(model.graph)) == expected


def test_what_does_nothing_is_erased():
    model = models.export(models.Applied(lambda m, x: F.dropout((x + 1).float().detach(), 0.5, False) * 2), X)
    canonicalize(model)
    assert [models.name_of(node) for node in erase_no_ops(model)] == ["to", "detach", "dropout"]
    model.recompile()
    assert [models.name_of(node) for node in model.graph.nodes] == ["placeholder", "add", "mul", "output"]
    assert torch.equal(model(X), (X + 1) * 2)


ORDER = torch.contiguous_format


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1).t().contiguous().view(-1) * 2,
        lambda x: ((x + 1).t().clone(memory_format=ORDER) * 2).view(2, 3),
        lambda x: (x.t().contiguous(memory_format=ORDER) + 1).relu()[None].view(6),
    ],
)
def test_copies_in_order_are_erased_and_views_after_them_take_any_strides(function):
    model = models.export(models.Applied(lambda m, x: function(x)), X)
    canonicalize(model)
    view = models.find(model, "view")
    erase_no_ops(model)
    model.recompile()
    assert not models.count(model, "contiguous") + models.count(model, "clone")
    assert (models.name_of(view), view.meta[WRITTEN_KEY]) == ("reshape", torch.ops.aten.view.default)
    assert torch.equal(model(X), function(X))


def written(x):
    y = (x.t().contiguous() * 2).relu()
    y.view(6).add_(1)
    return y


def copied(x):
    y = (x + 1).contiguous().t().contiguous()
    y.add_(1)
    return y * 2


@pytest.mark.parametrize(
    "function",
    [
        written,
        copied,
        lambda x: (x + 1).t().contiguous(),
        lambda x: torch.as_strided((x + 1).t().contiguous() * 2, (2,), (1,)),
        lambda x: (x + 1)[None, None].repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last) * 2,
    ],
)
def test_copies_in_order_that_something_needs_stay(function):
    model = models.export(models.Applied(lambda m, x: function(x)), X)
    canonicalize(model)
    erase_no_ops(model)
    model.recompile()
    assert models.count(model, "contiguous") >= 1
    assert torch.equal(model(X), function(X))
    assert model(X).stride() == function(X).stride()


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: x.clone(), 1),
        (lambda x: x.clone().view(6), 1),
        (lambda y, *_: ((y := y + 1), y.clone()), 1),
        (lambda y: ((y := y + 1).clone(), y.clone().view(6)), 2),
        (lambda x: ((x + 1).clone(), (x + 2).clone()), 0),
        (lambda x: ((y := x + 1).relu(), y.clone()), 0),
    ],
)
def test_results_that_are_copies_stay_apart(function, kept):
    model = models.export(models.Applied(lambda m, x: function(x)), X)
    canonicalize(model)
    erase_no_ops(model)
    model.recompile()
    assert models.count(model, "clone") == kept
    results, wanted = ([x] if isinstance(x, torch.Tensor) else x for x in (model(X), function(X)))
    assert all(torch.equal(*each) for each in zip(results, wanted, strict=True))
    assert len({each.data_ptr() for each in results} | {X.data_ptr()}) == len(results) + 1
