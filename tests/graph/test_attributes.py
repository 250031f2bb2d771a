"""Tensors by dotted path, and unused names."""

import models
import pytest
import torch
from torch import nn

from zeropoint.core.errors import GraphError
from zeropoint.graph.attributes import (
    Names,
    attribute_reads,
    get_attribute,
    give_attributes,
    set_parameter,
    tensors_of,
)


def test_get_attribute_by_dotted_path():
    model = models.exported(models.net)
    assert get_attribute(model, "blocks.0.conv.weight").shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("path", "words"),
    [("blocks.7.conv", "no attribute 'blocks.7.conv'"), ("nope", "'nope'"), ("blocks", "not a tensor")],
)
def test_get_attribute_names_the_path_that_has_no_tensor(path, words):
    with pytest.raises(GraphError, match=words):
        get_attribute(models.exported(models.net), path)


def test_set_parameter_keeps_the_kind():
    model = models.Applied(None, layer=nn.BatchNorm1d(3))
    model.plain = torch.zeros(1)
    set_parameter(model, "layer.weight", torch.full((3,), 2.0))
    set_parameter(model, "layer.running_mean", torch.full((3,), 3.0))
    set_parameter(model, "layer.num_batches_tracked", torch.tensor(4))
    set_parameter(model, "plain", torch.ones(1))
    assert isinstance(model.layer.weight, nn.Parameter)
    assert model.layer.weight.requires_grad
    assert not isinstance(model.layer.running_mean, nn.Parameter)
    assert set(model.state_dict()) == {f"layer.{n}" for n in nn.BatchNorm1d(3).state_dict()}
    assert model.plain.item() == 1


def test_names_are_unused_and_cost_no_search_from_zero():
    model = nn.Module()
    model.obs_1 = torch.zeros(1)
    names = Names(model)
    assert [names.new("obs_") for _ in range(3)] == ["obs_0", "obs_2", "obs_3"]
    assert names.new("other") == "other0"


def test_tensors_of_lists_each_path_of_a_tied_tensor():
    model = models.exported(models.linear)
    model.register_parameter("tied", model.get_parameter("weight"))
    assert set(tensors_of(model)) == {"weight", "bias", "tied"}


def test_attribute_reads():
    assert [node.target for node in attribute_reads(models.exported(models.linear).graph)] == ["weight", "bias"]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.BatchNorm1d(3)
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.plain = torch.zeros(1)
        self.number = 3


def test_give_attributes_as_what_they_are():
    origin, model = Holder(), nn.Module()
    give_attributes(model, origin, ["layer.weight", "layer.running_mean", "unsaved", "plain", "number", "layer.weight"])
    assert model.layer is not origin.layer
    assert model.layer.weight is origin.layer.weight
    assert list(model.state_dict()) == ["plain", "layer.weight", "layer.running_mean"]
    assert dict(model.named_buffers())["unsaved"] is origin.unsaved
    assert model.number == 3
    assert not hasattr(model.layer, "bias")


@pytest.mark.parametrize("paths", [("inner.0", "inner.0.weight"), ("inner.0.weight", "inner.0", "inner.0.bias")])
def test_give_attributes_gives_a_module_whole_whatever_comes_first(paths):
    origin, model = Holder(), nn.Module()
    give_attributes(model, origin, paths)
    assert model.get_submodule("inner.0") is origin.inner[0]
    assert model.inner is not origin.inner
    assert list(origin.inner[0].state_dict()) == ["weight", "bias"]


def test_give_attributes_of_what_is_not_there():
    with pytest.raises(AttributeError, match="nope"):
        give_attributes(nn.Module(), Holder(), ["layer.nope"])
