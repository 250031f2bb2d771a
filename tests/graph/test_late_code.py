"""A prepared or converted model has no code until it is called or looked at, and behaves like one that has."""

import copy
import gc
import inspect
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
from torch.fx import Interpreter, symbolic_trace

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def has_code(model):
    return "forward" in vars(type(model))


def converted():
    """Returns a converted model that was not called yet, and its input."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    prepared = zp.prepare_pt2e(models.export(net, x), quantizer)
    assert not has_code(prepared)
    prepared(x)
    model = zp.convert_pt2e(prepared)
    assert not has_code(model)
    return model, x


@pytest.fixture(scope="module")
def wanted():
    """What another model of the kind gives."""
    model, x = converted()
    return model(x)


USES = {
    "called": lambda model, x: model(x),
    "forward": lambda model, x: model.forward(x),
    "exported": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "exported strictly": lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
    "compiled": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "traced by fx": lambda model, x: symbolic_trace(model)(x),
    "traced by jit": lambda model, x: torch.jit.trace(model, (x,))(x),
    "pickled": lambda model, x: pickle.loads(pickle.dumps(model))(x),
    "deep copy": lambda model, x: copy.deepcopy(model)(x),
    "copy": lambda model, x: copy.copy(model)(x),
    "functional_call": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    "its code read": lambda model, x: (model.code, model(x))[1],
    "printed": lambda model, x: (str(model), model(x))[1],
    "recompiled": lambda model, x: (model.recompile(), model(x))[1],
    "another graph": lambda model, x: (setattr(model, "graph", copy.deepcopy(model.graph)), model(x))[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_model_without_code_gives_what_a_call_gives(wanted, use):
    model, x = converted()
    assert torch.equal(USES[use](model, x), wanted)


def test_what_is_not_run_generates_no_code():
    model, x = converted()
    copied = copy.deepcopy(model)
    assert [node.name for node in copied.graph.nodes] == [node.name for node in model.graph.nodes]
    Interpreter(model).run(x)
    assert not has_code(model)
    assert not has_code(copied)


def test_its_signature_is_that_of_the_graph():
    model, _ = converted()
    assert list(inspect.signature(model.forward).parameters) == ["input"]


def test_hooks_run_once_in_the_first_call():
    model, x = converted()
    seen = []
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model(x)
    assert seen == ["before", "after"]


def test_a_changed_graph_is_what_runs(wanted):
    model, x = converted()
    (relu,) = (node for node in model.graph.nodes if node.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.neg.default
    assert not torch.equal(model(x), wanted)


def test_a_deleted_model_is_freed_with_its_class():
    model, x = converted()
    model(x)
    left = weakref.ref(model), weakref.ref(type(model))
    del model
    gc.collect()
    assert [each() for each in left] == [None, None]


def test_a_model_prepared_for_training_has_its_code_late_too():
    net, (x,) = models.net()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True))
    prepared = zp.prepare_qat_pt2e(models.export(net.train(), x), quantizer)
    assert not has_code(prepared)
    prepared(x).sum().backward()
    assert has_code(prepared)


def test_first_calls_from_several_threads(wanted):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            model, x = converted()
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(model, [x] * 4))
            assert all(torch.equal(result, wanted) for result in (*results, model(x)))
    finally:
        sys.setswitchinterval(before)
