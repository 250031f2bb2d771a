"""The mode of an exported model changes as that of the module it was exported from."""

import copy
import io
import itertools
import operator
import time

import models
import pytest
import quantizers
import torch
from torch import nn
from torch.fx import GraphModule

from zeropoint.core.errors import CaptureError
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.graph.bind import argument, argument_names
from zeropoint.graph.capture import capture
from zeropoint.graph.explained import ExplainedModule
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.train_eval import (
    SwitchedModule,
    allow_exported_model_train_eval,
    mode_of,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from zeropoint.workflow import convert_pt2e, prepare_pt2e

theirs = pytest.importorskip("torchao.quantization.pt2e.export_utils")
aten = torch.ops.aten
X = torch.randn(4, 3, 6, 6)
MOVES = {True: move_exported_model_to_train, False: move_exported_model_to_eval}


def norms():
    """Batch norm with numbers of its own, without factors, and without running statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=0.1, momentum=0.5),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False, momentum=0.3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True, eps=0.2),
        nn.InstanceNorm2d(4),
    )


def dropouts():
    """Dropout of each kind, and RReLU."""
    return nn.Sequential(
        nn.Dropout(0.3),
        nn.Dropout2d(0.2),
        nn.AlphaDropout(0.1),
        nn.FeatureAlphaDropout(0.4),
        nn.Conv2d(3, 3, 1),
        nn.Dropout(0.3, inplace=True),
        nn.Dropout2d(0.6, inplace=True),
        nn.AlphaDropout(0.25, inplace=True),
        nn.RReLU(0.1, 0.4),
    )


def recurrent():
    """Dropout between the layers of recurrent networks."""

    def forward(m, x):
        x = x.flatten(1, 2)
        for layer in (m.lstm, m.gru, m.rnn):
            x, _ = layer(x)
        return x

    options = {"dropout": 0.5, "batch_first": True}
    layers = {"lstm": nn.LSTM(6, 6, 2, **options), "gru": nn.GRU(6, 6, 2, **options)}
    return models.Applied(forward, **layers, rnn=nn.RNN(6, 6, 2, **options))


def called_twice():
    return models.Applied(lambda m, x: m.norm(m.norm(x)), norm=nn.BatchNorm2d(3))


def reads_counter():
    norm = nn.BatchNorm2d(3)
    return models.Applied(lambda m, x: m.norm(x) + m.norm.num_batches_tracked.to(x.dtype), norm=norm)


def exported(module, x=X, decompose=False):
    program = torch.export.export(module, (x,))
    return (program.run_decompositions({}) if decompose else program).module()


def of_norms(model):
    """Returns a state dictionary without what only eager modules hold."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(("5.num", "6."))}


def assert_same(eager, graph, x=X):
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = eager(x.clone())
        torch.manual_seed(seed)
        assert torch.allclose(graph(x.clone()), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # Of recurrent layers.
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("build", "decompose"),
    [
        (norms, False),
        (norms, True),
        (dropouts, False),
        (recurrent, False),
        (called_twice, False),
        (called_twice, True),
        (reads_counter, False),
        (reads_counter, True),
    ],
)
def test_modes_are_those_of_the_module(build, decompose, start):
    eager = build().train(start)
    graph = exported(copy.deepcopy(eager), decompose=decompose)
    if build is reads_counter and not start:
        eager.norm.num_batches_tracked.fill_(3)
        graph.norm.num_batches_tracked.fill_(3)
    for mode in (start, True, False, False, True, True, False, True):
        eager.train(mode)
        assert MOVES[mode](graph) is graph
        assert_same(eager, graph)
        assert graph.training == mode
        expected = of_norms(eager)
        for name, tensor in graph.state_dict().items():
            if name in expected:
                assert torch.allclose(tensor, expected[name], atol=1e-6), name
    graph.graph.lint()


def test_gradients_are_those_of_the_module():
    for decompose in (False, True):
        eager = norms().eval()
        graph = move_exported_model_to_train(exported(copy.deepcopy(eager), decompose=decompose))
        eager.train()
        for model in (eager, graph):
            model(X).square().sum().backward()
        for name, parameter in graph.named_parameters():
            assert torch.allclose(parameter.grad, eager.get_parameter(name).grad, atol=1e-5), name


def calls(model):
    """Returns the nodes with all arguments, those left to their defaults too."""
    return [(node.target, *(argument(node, name) for name in argument_names(node))) for node in model.graph.nodes]


def test_a_switch_back_gives_the_same_graph():
    for build, start, decompose in itertools.product((norms, dropouts), (True, False), (False, True)):
        if decompose and start:  # A functional graph in train mode comes back as one that writes.
            continue
        graph = exported(build().train(start), decompose=decompose)
        before = calls(graph)
        MOVES[start](MOVES[not start](graph))
        assert calls(graph) == before


def test_each_spelling_of_batch_norm():
    x, weight, bias, mean, variance = X, torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(3) + 0.5
    expected = {
        mode: nn.functional.batch_norm(x, mean.clone(), variance.clone(), weight, bias, mode, 0.3, 0.01)
        for mode in (True, False)
    }
    for target in BATCH_NORMS:
        names = [each.name for each in target._schema.arguments]
        if "running_mean" not in names or "cudnn" in str(target) or "miopen" in str(target):
            continue
        values = {"momentum": 0.3, "eps": 0.01, "training": True, "cudnn_enabled": False}
        for by_name in (False, True):
            graph = torch.fx.Graph()
            read = [graph.placeholder("x"), *(graph.get_attr(n) for n in ("w", "b", "mean", "var"))]
            others = {name: values[name] for name in names[5:]}
            node = graph.call_function(target, (*read,) if by_name else (*read, *others.values()))
            node.kwargs = others if by_name else {}
            is_tuple = len(target._schema.returns) > 1
            graph.output(graph.call_function(operator.getitem, (node, 0)) if is_tuple else node)
            root = nn.Module()
            for name, value in zip(("w", "b", "mean", "var"), (weight, bias, mean, variance), strict=True):
                root.register_buffer(name, value.clone())
            model = GraphModule(root, graph)
            for mode in (False, True, False, True):
                MOVES[mode](model)
                start = {name: t.clone() for name, t in model.named_buffers()}
                assert torch.allclose(model(x), expected[mode], atol=1e-5), (target, mode)
                assert torch.equal(start["mean"], model.mean) == (not mode)
                model.load_state_dict(start)


def operators(model):
    """Returns the operators of a graph and their numbers, without the counters of batches."""
    calls = [node for node in model.graph.nodes if node.op == "call_function" and node.target is not aten.add_.Tensor]
    return [(node.target, *(a for a in node.args if not isinstance(a, torch.fx.Node))) for node in calls]


@pytest.mark.parametrize("start", [True, False])
def test_torchao_gives_the_same_where_it_keeps_the_numbers(start):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Dropout(inplace=True))
    ours = exported(module.train(start))
    other = copy.deepcopy(ours)
    for mode in (not start, start):
        MOVES[mode](ours)
        {True: theirs._move_exported_model_to_train, False: theirs._move_exported_model_to_eval}[mode](other)
        assert operators(ours) == operators(other)
        assert_same(ours, other)


def test_torchao_loses_numbers_and_kinds_of_dropout():
    module = nn.Sequential(nn.BatchNorm2d(3, eps=0.1, momentum=0.5), nn.Dropout(0.3), nn.Dropout2d(0.2)).train()
    ours = exported(module)
    other = theirs._move_exported_model_to_eval(copy.deepcopy(ours))
    before = operators(ours)
    move_exported_model_to_eval(ours)
    for (target, *numbers), (_, *was) in zip(operators(ours), before, strict=True):
        assert [n for n in numbers if not isinstance(n, bool)] == [n for n in was if not isinstance(n, bool)], target
    assert_same(module.eval(), ours)
    numbers = {target: rest for target, *rest in operators(other)}
    assert numbers[aten.batch_norm.default][1:3] == [0.1, 1e-05]
    assert numbers[aten.dropout.default] == [0.5, False]
    assert numbers[aten.feature_dropout.default] == [0.2, True]


def test_bodies_of_control_flow_change():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.dropout(x) + 1, lambda x: x * 2, (x,))

    x = torch.ones(100)
    eager = Conditional().eval()
    graph = exported(copy.deepcopy(eager), x)
    for mode in (True, False, True):
        MOVES[mode](graph)
        assert_same(eager.train(mode), graph, x)
        assert mode_of(graph) == mode


def test_attention_gets_its_dropout_back():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x, None, 0.4 if self.training else 0.0)

    x = torch.randn(1, 2, 8, 4)
    eager = Attention().train()
    graph = exported(copy.deepcopy(eager), x)
    for mode in (False, True, False, True):
        MOVES[mode](graph)
        assert_same(eager.train(mode), graph, x)
    copied = copy.deepcopy(move_exported_model_to_eval(graph))
    assert models.find(move_exported_model_to_train(copied), "scaled_dot_product_attention").args[4] == 0.4


def test_a_frozen_norm_keeps_its_statistics():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    module[0].eval()
    graph = exported(copy.deepcopy(module))
    for mode in (True, False, True, False, True):
        MOVES[mode](graph)
        module.train(mode)[0].eval()
        assert_same(module, graph)
    assert torch.equal(graph.state_dict()["0.running_mean"], torch.zeros(3))
    models.find(graph, "batch_norm").update_arg(5, True)  # Thawed by hand.
    move_exported_model_to_train(move_exported_model_to_eval(graph))
    assert models.find(graph, "batch_norm").args[5] is True


def test_norms_that_are_all_frozen_stay_so_beside_dropout_in_train_mode():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.3)).train()
    for norm in (module[0], module[2]):
        norm.eval()
    graph = exported(copy.deepcopy(module))
    assert mode_of(graph) is True
    for mode in (False, True, True, False, True):
        MOVES[mode](graph)
        module.train(mode)
        for norm in (module[0], module[2]):
            norm.eval()
        assert_same(module, graph)
    assert torch.equal(graph.state_dict()["0.running_mean"], torch.zeros(3))


def test_dropout_in_eval_mode_freezes_no_norm():
    module = models.Applied(lambda m, x: nn.functional.dropout(m.norm(x), 0.3), norm=nn.BatchNorm2d(3)).eval()
    graph = exported(module)
    assert mode_of(graph) is False
    assert models.find(move_exported_model_to_train(graph), "batch_norm").args[5] is True


def test_counters_that_the_graph_no_longer_holds_are_not_made():
    graph = exported(nn.BatchNorm2d(3).train())
    move_exported_model_to_eval(graph)
    del graph.num_batches_tracked
    for node in [n for n in graph.graph.nodes if n.target == "num_batches_tracked"]:
        graph.graph.erase_node(node)
    move_exported_model_to_train(graph)(X)
    assert not models.count(graph, "add_")


def test_a_counter_without_a_node_is_found():
    graph = exported(nn.BatchNorm2d(3).eval())
    graph.graph.eliminate_dead_code()
    for count in (1, 2):
        move_exported_model_to_train(graph)(X)
        assert graph.num_batches_tracked == count
    assert "val" in models.find(graph, "add_").meta


def test_nothing_is_done_twice():
    graph = exported(norms().train())
    recompiled = []
    with pytest.MonkeyPatch.context() as patch:
        original = GraphModule.recompile
        patch.setattr(GraphModule, "recompile", lambda self: (recompiled.append(self), original(self))[1])
        for mode, times in ((True, 0), (False, 1), (False, 1), (True, 2), (True, 2)):
            MOVES[mode](graph)
            assert len(recompiled) == times


def test_time_is_linear():
    layers = [m for _ in range(300) for m in (nn.BatchNorm1d(2), nn.Dropout(0.3))]
    graph = exported(nn.Sequential(*layers).eval(), torch.randn(3, 2))
    start = time.perf_counter()
    move_exported_model_to_train(graph)
    assert time.perf_counter() - start < 3


def test_train_and_eval_once_they_are_allowed():
    eager = nn.Sequential(nn.BatchNorm2d(3, momentum=0.4), nn.Dropout(0.3)).eval()
    graph = exported(copy.deepcopy(eager))
    with pytest.raises(NotImplementedError):
        graph.train()
    assert allow_exported_model_train_eval(graph) is graph
    assert graph.training is False  # Export says True.
    for model in (graph, copy.deepcopy(graph), copy.deepcopy(copy.deepcopy(graph))):
        twin = copy.deepcopy(eager)
        for mode in (True, False, True):
            assert model.train(mode) is model
            assert_same(twin.train(mode), model)
            assert model.training == mode
        assert model.eval() is model
        assert mode_of(model) is False


def test_what_torchao_forbade_is_allowed():
    graph = exported(nn.Dropout(0.5).eval())
    from torchao.quantization.pt2e.utils import _disallow_eval_train

    _disallow_eval_train(graph)
    allow_exported_model_train_eval(graph).train()
    assert mode_of(graph)


def leftover():
    """A batch norm that cannot be folded, and dropout."""
    module = models.Applied(
        lambda m, x: m.drop(m.norm(x)) + m.conv(x),
        norm=nn.BatchNorm2d(3),
        drop=nn.Dropout(0.3),
        conv=nn.Conv2d(3, 3, 1),
    )
    models.randomize_norms(module)
    return module


@pytest.mark.parametrize("start", [True, False])
def test_prepared_and_converted_models_switch(start):
    eager = leftover().train(start)
    prepared = prepare_pt2e(exported(copy.deepcopy(eager)), quantizers.STATIC)
    prepared(X)
    assert isinstance(prepared, ExplainedModule)
    converted = convert_pt2e(copy.deepcopy(prepared))
    assert isinstance(converted, SwitchedModule)
    for model in (prepared, copy.deepcopy(prepared), converted, copy.deepcopy(converted)):
        assert model.training == start
        for mode in (not start, start, True, False):
            model.train(mode)
            assert mode_of(model) == mode
            assert models.find(model, "batch_norm").args[5] is mode
            assert models.find(model, "dropout").args[1:] == (0.3, mode)
            model.train(model.training)  # A common way to restore the mode.
            assert mode_of(model) == mode


def test_what_was_saved_whole_switches():
    prepared = prepare_pt2e(exported(leftover().eval()), quantizers.STATIC)
    prepared(X)
    for model in (prepared, convert_pt2e(copy.deepcopy(prepared))):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert isinstance(loaded, ExplainedModule) == isinstance(model, ExplainedModule)
        for each in (loaded, copy.deepcopy(loaded), copy.copy(model)):
            assert torch.equal(each(X), model(X))
            assert models.find(each.train(), "dropout").args[1:] == (0.3, True)
            assert torch.equal(each.eval()(X), model(X))


def test_a_converted_model_counts_no_batches():
    prepared = prepare_pt2e(exported(leftover().train()), quantizers.STATIC)
    prepared(X)
    converted = convert_pt2e(prepared.eval())
    assert not models.count(converted, "add_")
    assert "norm.num_batches_tracked" not in converted.state_dict()


def test_capture_of_a_model_with_a_switched_one_inside_restores_its_mode():
    inner = allow_exported_model_train_eval(exported(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train()))
    outer = nn.Sequential(inner, nn.ReLU()).train()
    captured = capture(outer, (X,))
    assert mode_of(captured) is False
    assert mode_of(inner) is True
    assert all(module.training for module in outer.modules())


def test_other_models_are_refused():
    for function in (*MOVES.values(), allow_exported_model_train_eval):
        with pytest.raises(CaptureError, match=r"got Linear, not a graph module\. Call its own train\(\) or eval\(\)"):
            function(nn.Linear(2, 2))


def test_bodies_are_plain_graph_modules():
    prepared = prepare_pt2e(models.exported(models.conditional), quantizers.STATIC)
    assert [isinstance(body, SwitchedModule) for _, body in bodies(prepared)] == [False, False]
