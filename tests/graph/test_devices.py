"""Exported, prepared and converted models on another device: tensors, devices written in the graph, metadata."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests.models import Applied
from zeropoint import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import GraphError
from zeropoint.graph.compat import FakeTensor
from zeropoint.graph.devices import destination, write_device
from zeropoint.pt2e import allow_exported_model_train_eval

X = (torch.randn(4, 8),)
CUDA = torch.device("cuda:0")


def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Makes tensors in each way that writes a device into the graph."""
    constant = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    y = m.layer(x) + torch.zeros(x.shape[0], 8) + constant
    return y.to("cpu")[:, torch.arange(8)] + torch.ones_like(y)


def exported() -> GraphModule:
    torch.manual_seed(0)
    module = Applied(forward, layer=nn.Linear(8, 8)).eval()
    return torch.export.export(module, X, dynamic_shapes=((({0: torch.export.Dim.AUTO},)),)).module()


def prepared(**settings: bool) -> GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True, **settings)
    prepare = prepare_qat_pt2e if settings else prepare_pt2e
    model = prepare(exported(), XNNPACKQuantizer().set_global(config))
    model(*X)
    return model


def converted(**settings: bool) -> GraphModule:
    return convert_pt2e(prepared(), **settings)


def reference() -> GraphModule:
    return converted(use_reference_representation=True)


MADE = (lambda: allow_exported_model_train_eval(exported()), converted, reference)


@pytest.mark.parametrize("make", MADE)
def test_runs_where_it_was_moved(make):
    model = make().to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(X[0].to("meta")).device.type == "meta"


@pytest.mark.parametrize("make", MADE[1:])
def test_comes_back(make):
    model = make()
    expected = model(*X)
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert torch.equal(moved(*X), expected)


@pytest.mark.parametrize("settings", [{}, {"is_qat": True}])
def test_observers_move(settings: dict[str, bool]):
    model = prepared(**settings).to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert devices_in(model) == {"meta"}


def test_moves_with_the_module_that_holds_it():
    whole = nn.Sequential(converted(), nn.ReLU()).to("meta")
    assert whole(X[0].to("meta")).device.type == "meta"


def test_a_graph_without_tensors():
    module = Applied(lambda m, x: x + torch.zeros(8)).eval()
    model = allow_exported_model_train_eval(torch.export.export(module, X).module())
    assert model.to("meta")(X[0].to("meta")).device.type == "meta"
    assert model.to("cpu")(*X).device.type == "cpu"


def test_bodies_of_control_flow():
    def branches(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        def grown(x):
            return x + torch.ones(8)

        return torch.cond(x.sum() > 0, grown, lambda x: x * 2, (x,)) + m.layer(x)

    module = Applied(branches, layer=nn.Linear(8, 8)).eval()
    model = allow_exported_model_train_eval(torch.export.export(module, X).module()).to("meta")
    assert set.union(*(devices_in(m) for m in model.modules() if isinstance(m, GraphModule))) == {"meta"}


def devices_in(model: GraphModule) -> set[str]:
    values = [value for node in model.graph.nodes for value in (*node.args, *node.kwargs.values())]
    return {value.type for value in values if isinstance(value, torch.device)}


def test_metadata_of_another_device():
    """Needs no such device: fake tensors have no memory."""
    model = converted()
    before = [node.meta["val"] for node in model.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
    write_device(model, CUDA)
    after = [node.meta["val"] for node in model.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
    assert {value.device for value in after} == {CUDA}
    assert [(v.shape, v.stride(), v.dtype) for v in after] == [(v.shape, v.stride(), v.dtype) for v in before]
    assert f"device = {CUDA!r}" in model.code
    assert "cpu" not in model.code


@pytest.mark.parametrize("name", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("make", [prepared, converted, reference])
def test_other_float_types_are_refused_at_once(make, name: str):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        GraphError, match=r"the graph is quantized.*float32; it cannot be torch\..*before it is exported"
    ):
        getattr(model, name)()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.float().to(torch.float32).share_memory()


def test_a_float_graph_may_be_of_another_type():
    model = allow_exported_model_train_eval(torch.export.export(nn.Linear(8, 8).eval(), X).module())
    assert model.double()(X[0].double()).dtype == torch.float64


def test_destination():
    assert destination(lambda t: t.to(torch.float64)) is None
    assert destination(lambda t: t.to("cpu")) == torch.device("cpu")
    assert destination(lambda t: t.to("meta")) == torch.device("meta")
    assert destination(lambda t: torch.empty_like(t, device="cpu")) == torch.device("cpu")
