"""Batch norm disappears into the layer before it, or stays with a reason."""

import copy
import itertools
import operator

import models
import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter

from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.finish import finish
from zeropoint.passes.fold_batch_norm import fold_batch_norm

aten = torch.ops.aten
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def built(module, *inputs):
    """Returns an export, with random statistics and in eval mode."""
    torch.manual_seed(0)
    models.randomize_norms(module)
    return models.export(module.eval(), *inputs)


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


def folded(model, *inputs, tolerance=1e-5):
    """Folds, and compares with the model as it was."""
    before = copy.deepcopy(model)
    fold_batch_norm(model)
    after = finish(model)
    for x in (inputs, [torch.randn_like(x) for x in inputs]):
        assert torch.allclose(after(*x), before(*x), atol=tolerance, rtol=tolerance)
    return after


def reason(model, index=0):
    return norms(model)[index].meta[DECISION_KEY].refusal


def sizes(dims):
    return (2, 4, *[5] * dims)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
class TestConvolutions:
    def test_convolution(self, dims, groups, bias):
        layer = CONV[dims](4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias)
        x = torch.randn(sizes(dims))
        assert not norms(folded(built(nn.Sequential(layer, NORM[dims](6)), x), x))

    def test_transposed_convolution(self, dims, groups, bias):
        layer = TRANSPOSED[dims](4, 6, 3, stride=2, output_padding=1, padding=1, groups=groups, bias=bias)
        x = torch.randn(sizes(dims))
        assert not norms(folded(built(nn.Sequential(layer, NORM[dims](6)), x), x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_same(dims, bias):
    x = torch.randn(sizes(dims))
    layer = CONV[dims](4, 6, 3, padding="same", bias=bias)
    assert not norms(folded(built(nn.Sequential(layer, NORM[dims](6)), x), x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    x = torch.randn(5, 4)
    assert not norms(folded(built(nn.Sequential(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6)), x), x))


@pytest.mark.parametrize(
    "settings",
    [{"affine": False}, {"eps": 0.7}, {"momentum": 0.9}, {"momentum": None}, {"affine": False, "eps": 1e-12}],
)
def test_settings_of_batch_norm(settings):
    x = torch.randn(sizes(2))
    assert not norms(folded(built(nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, **settings)), x), x))


def test_other_dtypes_keep_theirs():
    module = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)).double()
    x = torch.randn(sizes(2)).double()
    model = folded(built(module, x), x, tolerance=1e-12)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_users_module_is_not_changed():
    module, inputs = models.net()
    before = copy.deepcopy(module.state_dict())
    model = models.export(module, *inputs)
    folded(model, *inputs)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batch_norms_tensors_are_gone():
    _, inputs = models.net()
    model = folded(models.exported(models.net), *inputs)
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert names == {
        "blocks.0.conv.weight", "blocks.1.conv.weight", "head.weight", "head.bias",
        "blocks_0_conv_weight_bias_0", "blocks_1_conv_weight_bias_0",
    }  # fmt: skip


def test_new_nodes_have_a_value_and_a_place():
    model = models.exported(models.net)
    fold_batch_norm(model)
    for node in model.graph.nodes:
        if node.op == "get_attr" and "bias_0" in node.target:
            assert node.meta["val"].shape == (4,)
            assert node.meta["nn_module_stack"]


# Shared modules.


class Shared(nn.Module):
    """One convolution and two batch norms, used as ``forward`` says."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


X = torch.randn(sizes(2))


def shared(function):
    return built(Shared(function), X)


def test_a_convolution_with_two_batch_norms():
    assert not norms(folded(shared(lambda m, x: m.one(m.conv(x)) + m.two(m.conv(x))), X))


@pytest.mark.parametrize("bare_first", [False, True])
def test_a_convolution_with_a_batch_norm_and_bare(bare_first):
    model = shared(
        (lambda m, x: m.conv(x) + m.one(m.conv(x))) if bare_first else (lambda m, x: m.one(m.conv(x)) + m.conv(x))
    )
    assert not norms(folded(model, X))


def test_the_same_modules_twice_share_the_folded_weight():
    model = folded(shared(lambda m, x: m.one(m.conv(m.one(m.conv(x))))), X)
    assert not norms(model)
    first, second = (models.find(model, "conv2d", i) for i in (0, 1))
    assert first.args[1] is second.args[1]
    assert first.args[2] is second.args[2]


def test_a_batch_norm_after_another():
    model = built(nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), X)
    assert not norms(folded(model, X))


def test_four_uses_in_every_combination():
    uses = list(itertools.product((0, 1), (0, 1)))
    model = shared(lambda m, x: sum([m.one, m.two][n]([m.conv, m.other][c](x)) for c, n in uses))
    assert not norms(folded(model, X))


def test_tied_weights_of_two_layers():
    def tied():
        module = Shared(lambda m, x: m.one(m.conv(x)) + m.other(x))
        module.other.weight = module.conv.weight
        return module

    assert not norms(folded(built(tied(), X), X))


def test_two_reads_of_one_weight_in_a_graph_made_by_hand():
    torch.manual_seed(0)
    root, graph = Shared(None), Graph()
    models.randomize_norms(root)
    x = graph.placeholder("x")
    bias = graph.get_attr("conv.bias")
    first, second = graph.get_attr("conv.weight"), graph.get_attr("conv.weight")
    one = graph.call_function(aten.conv2d.default, (x, first, bias, [1, 1], [1, 1]))
    two = graph.call_function(aten.conv2d.default, (x, second, None, [1, 1], [1, 1]))
    statistics = [graph.get_attr(f"one.{n}") for n in ("weight", "bias", "running_mean", "running_var")]
    norm = graph.call_function(aten.batch_norm.default, (one, *statistics, False, 0.1, 1e-5, False))
    graph.output(graph.call_function(aten.add.Tensor, (norm, two)))
    model = with_values(GraphModule(root, graph), X)
    assert not norms(folded(model, X))


# What lies between, and layers in other spellings.


def applied(function, *inputs, **modules):
    return built(models.Applied(function, **modules), *inputs)


ROWS, SAMPLES = torch.randn(3, 4), torch.randn(2, 7, 4)
NOTHING = {
    "dropout": nn.Dropout(),
    "dropout of channels": nn.Dropout2d(),
    "identity": nn.Identity(),
    "detach": models.Applied(lambda m, x: x.detach()),
    "clone": models.Applied(lambda m, x: x.clone()),
    "float": models.Applied(lambda m, x: x.float().to(torch.float32)),
    "several": nn.Sequential(nn.Dropout(), models.Applied(lambda m, x: x.detach()), nn.Dropout()),
}


@pytest.mark.parametrize("between", NOTHING.values(), ids=NOTHING)
def test_operators_that_do_nothing(between):
    model = built(nn.Sequential(nn.Conv2d(4, 3, 3), between, nn.BatchNorm2d(3), nn.ReLU()), X)
    canonicalize(model)
    assert not norms(folded(model, X))


def test_dropout_in_train_mode_stays_between():
    model = applied(
        lambda m, x: m.norm(torch.dropout(m.conv(x), 0.5, True)), X, conv=nn.Conv2d(4, 3, 1), norm=NORM[2](3)
    )
    fold_batch_norm(model)
    assert "its input dropout (dropout)" in reason(model)


CHANNELS = {
    "squeeze": (lambda m, x: m.norm(m.conv1d(x).squeeze(-1)), torch.randn(3, 4, 3)),
    "flatten of one pixel": (lambda m, x: m.norm(m.conv(x).flatten(1)), torch.randn(2, 4, 3, 3)),
    "flatten of space": (lambda m, x: m.norm(m.conv(x).flatten(2)), X),
    "view of pixels": (lambda m, x: m.norm2(m.conv(x).view(2, 6, 9, 1)), X),
    "unsqueeze": (lambda m, x: m.norm(m.linear(x).unsqueeze(-1)), ROWS),
    "all rows": (lambda m, x: m.norm(m.linear(x).view(-1, 6)), SAMPLES),
    "transpose": (lambda m, x: m.norm(m.linear(x).transpose(1, 2)), SAMPLES),
    "permute": (lambda m, x: m.norm(m.linear(x).permute(0, -1, 1).contiguous()), SAMPLES),
    "t": (lambda m, x: m.norm(m.linear(x).t().t()), ROWS),
    "several": (lambda m, x: m.norm2(m.linear(x).transpose(1, 2).unsqueeze(2).detach()), SAMPLES),
}  # fmt: skip


@pytest.mark.parametrize(("function", "x"), CHANNELS.values(), ids=CHANNELS)
def test_moves_that_keep_channels_together(function, x):
    modules = {"conv": nn.Conv2d(4, 6, 3), "conv1d": nn.Conv1d(4, 6, 3), "linear": nn.Linear(4, 6)}
    model = applied(function, x, **modules, norm=nn.BatchNorm1d(6), norm2=nn.BatchNorm2d(6))
    assert not norms(folded(model, x))


def test_moves_that_part_channels_stay():
    flat = applied(lambda m, x: m.norm(m.conv(x).flatten(1)), X, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm1d(54))
    assert "flatten (flatten)" in reason(folded(flat, X))
    rows = applied(lambda m, x: m.norm(m.linear(x)[:, :, None]), SAMPLES, linear=nn.Linear(4, 6), norm=NORM[2](7))
    assert "linear, whose channels are along axis 2" in reason(folded(rows, SAMPLES))
    seen = applied(
        lambda m, x: (lambda y: m.norm(y.transpose(1, 2)).sum() + y)(m.linear(x)),
        SAMPLES, linear=nn.Linear(4, 6), norm=NORM[1](6),
    )  # fmt: skip
    assert reason(folded(seen, SAMPLES)) == "batch norm is not folded: linear is read by add too"


def test_a_free_batch_stays_free():
    module = models.Applied(
        lambda m, x: m.norm(m.linear(x).view(-1, 6)), linear=nn.Linear(4, 6), norm=NORM[1](6)
    ).eval()
    models.randomize_norms(module)
    with torch.no_grad():
        model = torch.export.export(module, (SAMPLES,), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),)).module()
    fold_batch_norm(model)
    assert not norms(model)
    x = torch.randn(5, 7, 4)
    assert torch.allclose(finish(model)(x), module(x), atol=1e-5)


PRODUCTS = {
    "matmul": lambda m, x: m.norm(x @ m.matrix),
    "mm": lambda m, x: m.norm(torch.mm(x, m.matrix)),
    "addmm": lambda m, x: m.norm(torch.addmm(m.bias, x, m.matrix)),
    "two batch norms": lambda m, x: m.other(m.norm(x @ m.matrix).clone()),
    "shared": lambda m, x: m.norm(x @ m.matrix) + m.other(x @ m.matrix) + x @ m.matrix,
}


@pytest.mark.parametrize("function", PRODUCTS.values(), ids=PRODUCTS)
def test_products_with_a_constant_matrix(function):
    module = models.Applied(function, norm=NORM[1](6), other=NORM[1](6))
    module.matrix, module.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
    assert not norms(folded(built(module, ROWS), ROWS))


def test_a_product_of_two_activations_stays():
    other = torch.randn(4, 6)
    model = applied(lambda m, x, y: m.norm(x @ y), ROWS, other, norm=NORM[1](6))
    assert "matmul (matmul)" in reason(folded(model, ROWS, other))


WEIGHT_NORM = torch.nn.utils.parametrizations.weight_norm


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv2d(4, 6, 3), NORM[2](6), X),
        (nn.ConvTranspose2d(4, 6, 3), NORM[2](6), X),
        (nn.Linear(4, 6), NORM[1](6), ROWS),
    ],
)
@pytest.mark.parametrize("parametrize", [WEIGHT_NORM, torch.nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_computed_from_parameters(layer, norm, x, parametrize):
    module = nn.Sequential(parametrize(copy.deepcopy(layer)), norm)
    for decompose in (False, True):
        model = built(module, x)
        if decompose:
            model = torch.export.export(module, (x,)).run_decompositions().module()
            canonicalize(model)
        assert not norms(folded(model, x))


def test_a_computed_weight_of_two_batch_norms():
    module = models.Applied(
        lambda m, x: m.one(m.conv(x)) + m.two(m.conv(x)) + m.conv(x),
        conv=WEIGHT_NORM(nn.Conv2d(4, 4, 3)), one=NORM[2](4), two=NORM[2](4),
    )  # fmt: skip
    assert not norms(folded(built(module, X), X))


def test_a_weight_that_is_written_to_stays():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("kernel", torch.randn(3, 4, 1, 1))

        def forward(self, x):
            y = self.norm(torch.conv2d(x, self.kernel))
            self.kernel.mul_(0.5)
            return y

    model = built(Written(), X)
    fold_batch_norm(model)
    assert reason(model) == "batch norm is not folded: kernel is written to at run time"


# What stays.


def test_a_convolution_with_another_reader():
    model = folded(built(Shared(lambda m, x: (lambda y: m.one(y) + y)(m.conv(x))), X), X)
    assert reason(model) == "batch norm is not folded: conv2d is read by add too"


def test_batch_norm_without_a_layer():
    model = folded(built(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), X), X)
    assert "its input relu (relu) [0, " in reason(model) or "relu (relu)" in reason(model)
    assert "is no convolution or linear layer" in reason(model)


def test_batch_norm_of_an_input():
    model = folded(built(nn.BatchNorm2d(4), X), X)
    assert "is no convolution or linear layer" in reason(model)


def test_train_mode():
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = torch.export.export(module.train(), (X,)).module()
    fold_batch_norm(model)
    assert "exported in train mode" in reason(model)
    assert "export model.eval()" in reason(model)


def test_no_running_statistics():
    model = built(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), X)
    fold_batch_norm(model)
    assert reason(model) == "batch norm is not folded: it keeps no running statistics and normalizes by each batch"


def test_train_mode_after_decomposition():
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    model = torch.export.export(module, (X,)).run_decompositions().module()
    fold_batch_norm(model)
    assert "exported in train mode" in reason(model)


def test_a_linear_layer_of_three_dimensions():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.linear(x))

    x = torch.randn(2, 3, 4)
    model = folded(built(Rows(), x), x)
    words = "it is along axis 1 of linear, whose channels are along axis 2"
    assert reason(model) == f"batch norm is not folded: {words}"


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_of_one_sample_is_normalized_along_another_axis(dims):
    """Without a batch axis, batch norm takes the second axis, a spatial one, for the channels."""
    x = torch.randn(sizes(dims)[1:])
    module = nn.Sequential(CONV[dims](4, 5, 1), nn.BatchNorm1d(5))
    model = built(module, x)
    assert "has no batch axis" in reason(folded(model, x))


def test_a_weight_that_is_computed():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x, w):
            return self.norm(torch.conv2d(x, w * 2))

    w = torch.randn(3, 4, 1, 1)
    model = folded(built(Computed(), X, w), X, w)
    assert reason(model) == "batch norm is not folded: mul is computed at run time"


# Spellings with several results, which exports of other devices and decompositions give.


class Values(Interpreter):
    """Gives each node of a graph made by hand its value."""

    def run_node(self, n):
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def with_values(model, *inputs):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Values(model).run(*inputs)
    model.load_state_dict(before)
    return model


def with_shapes(model):
    """Gives each node of a graph made by hand a value of four dimensions, for operators that do not run here."""
    for node in model.graph.nodes:
        node.meta["val"] = torch.zeros(1, 1, 1, 1)
    return model


def by_hand(target, *, take=(0,), training=None, names=("weight", "bias", "running_mean", "running_var"), epsilon=0.3):
    """Returns convolution and a batch norm operator of several results, of which ``take`` are returned."""
    torch.manual_seed(0)
    root, graph = Shared(None), Graph()
    models.randomize_norms(root)
    x = graph.placeholder("x")
    weight, bias = graph.get_attr("conv.weight"), graph.get_attr("conv.bias")
    conv = graph.call_function(aten.conv2d.default, (x, weight, bias, [1, 1], [1, 1]))
    given = {a.name for a in target._schema.arguments}
    last = [training] if given & {"training", "train"} else []
    read = [graph.get_attr(f"one.{n}") for n in names]
    norm = graph.call_function(target, (conv, *read, *last, 0.1, epsilon))
    graph.output([graph.call_function(operator.getitem, (norm, i)) for i in take])
    return GraphModule(root, graph)


RUNNABLE = [
    (aten._native_batch_norm_legit_no_training.default, None),
    (aten._batch_norm_no_update.default, None),
    (aten._native_batch_norm_legit.default, False),
    (aten.native_batch_norm.default, False),
]


@pytest.mark.parametrize(("target", "training"), RUNNABLE, ids=lambda v: str(v))
def test_operators_with_several_results(target, training):
    model = with_values(by_hand(target, training=training), X)
    (expected,) = model(X)
    fold_batch_norm(model)
    assert not norms(model)
    assert torch.allclose(finish(model)(X)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", [aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default])
def test_operators_of_other_devices(target):
    """They do not run here: the CPU's operator with the same numbers says what they give."""
    model = with_values(by_hand(aten.native_batch_norm.default, training=False), X)
    (expected,) = model(X)
    model = with_shapes(by_hand(target, training=False))
    fold_batch_norm(model)
    assert not norms(model)
    assert torch.allclose(finish(model)(X)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("target", "training"), RUNNABLE[2:], ids=lambda v: str(v))
def test_train_mode_of_operators_with_several_results(target, training):
    model = with_values(by_hand(target, training=True), X)
    fold_batch_norm(model)
    assert "train mode" in reason(model)


def test_the_operator_that_always_updates_its_statistics():
    model = with_values(by_hand(aten._batch_norm_with_update.default), X)
    fold_batch_norm(model)
    assert "train mode" in reason(model)


def test_the_operator_without_statistics():
    # Not run: torch 2.13 crashes on it.
    model = with_shapes(by_hand(aten._native_batch_norm_legit.no_stats, training=False, names=("weight", "bias")))
    fold_batch_norm(model)
    assert "no running statistics" in reason(model)


def test_results_besides_the_first_that_are_read():
    model = with_values(by_hand(aten.native_batch_norm.default, take=(0, 1), training=False), X)
    fold_batch_norm(model)
    assert reason(model) == "batch norm is not folded: its statistics are read too"


def test_a_decomposed_export():
    module, inputs = models.net()
    expected = module(*inputs)
    table = torch.export.default_decompositions()
    table.pop(aten.conv2d.default)
    model = torch.export.export(module, inputs).run_decompositions(table).module()
    assert models.count(model, "_native_batch_norm_legit_no_training") == 2
    fold_batch_norm(model)
    left = [r.meta[DECISION_KEY].refusal for r in norms(model)]
    assert torch.allclose(finish(model)(*inputs), expected, atol=1e-5)
    assert not left
