"""Recurrent layers, step by step: equal to ``torch.nn``'s, with one scale for what is the same at each step."""

import itertools

import models
import pytest
import torch
from quantizers import STATIC
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import GraphError
from zeropoint.graph.bind import argument
from zeropoint.numerics import ops
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.recurrent import RECURRENT, take_apart
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning"),  # Of torch.export.
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),  # Of torch's own kernel.
]
aten = torch.ops.aten
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
INT8 = get_symmetric_quantization_config(is_per_channel=True)
BATCH, LENGTH, INPUTS, WIDTH = 3, 4, 5, 6


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def exported(module, *inputs, **settings) -> GraphModule:
    return torch.export.export(module, inputs, **settings).module()


def apart(model: GraphModule) -> GraphModule:
    canonicalize(model)
    model.recompile()
    assert not any(node.target in RECURRENT for node in model.graph.nodes)
    return model


def check_equal(module, *inputs):
    """Compares what is taken apart with torch's own kernel."""
    model = apart(exported(module.eval(), *inputs))
    found, expected = (pytree.tree_leaves(each(*inputs)) for each in (model, module))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for node in model.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta, node
    return model


def state_of(module, *sizes):
    count = module.num_layers * (2 if module.bidirectional else 1)
    width = getattr(module, "proj_size", 0) or module.hidden_size
    hidden = torch.randn(count, *sizes, width)
    return (hidden, torch.randn(count, *sizes, module.hidden_size)) if isinstance(module, nn.LSTM) else hidden


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_layers_equal_torch(kind, layers, length):
    for bidirectional, batch_first, bias in itertools.product([False, True], repeat=3):
        options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
        module = KINDS[kind](INPUTS, WIDTH, layers, dropout=0.3 if layers > 1 else 0.0, **options)
        sizes = (BATCH, length) if batch_first else (length, BATCH)
        check_equal(module, torch.randn(*sizes, INPUTS))
        check_equal(module, torch.randn(*sizes, INPUTS), state_of(module, BATCH))


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch(kind):
    module = KINDS[kind](INPUTS, WIDTH, 2, bidirectional=True)
    check_equal(module, torch.randn(LENGTH, INPUTS))
    check_equal(module, torch.randn(LENGTH, INPUTS), state_of(module))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projection(bidirectional):
    module = nn.LSTM(INPUTS, WIDTH, 2, proj_size=3, bidirectional=bidirectional)
    check_equal(module, torch.randn(LENGTH, BATCH, INPUTS))
    check_equal(module, torch.randn(LENGTH, BATCH, INPUTS), state_of(module, BATCH))


def test_relu_and_double_precision():
    check_equal(nn.RNN(INPUTS, WIDTH, nonlinearity="relu"), torch.randn(LENGTH, BATCH, INPUTS))
    check_equal(nn.RNNCell(INPUTS, WIDTH, nonlinearity="relu"), torch.randn(BATCH, INPUTS))
    check_equal(nn.GRU(INPUTS, WIDTH).double(), torch.randn(LENGTH, BATCH, INPUTS).double())


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(BATCH,), ()])
def test_cells_equal_torch(kind, bias, sizes):
    module = kind(INPUTS, WIDTH, bias=bias)
    check_equal(module, torch.randn(*sizes, INPUTS))
    hidden = torch.randn(*sizes, WIDTH)
    check_equal(module, torch.randn(*sizes, INPUTS), (hidden, hidden + 1) if kind is nn.LSTMCell else hidden)


def test_a_loop_of_the_users_own_over_a_cell():
    def forward(m, x):
        hidden, carried = torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, WIDTH)
        hidden[0] = 1.0  # Zeros that are written to are none.
        for step in x.unbind(1):
            hidden, carried = m.cell(step, (hidden, carried))
        return hidden

    check_equal(models.Applied(forward, cell=nn.LSTMCell(INPUTS, WIDTH)), torch.randn(BATCH, LENGTH, INPUTS))


def test_the_batch_may_be_free():
    module = nn.LSTM(INPUTS, WIDTH, 2, batch_first=True, bidirectional=True).eval()
    free = ({0: torch.export.Dim.DYNAMIC},)
    model = apart(exported(module, torch.randn(BATCH, LENGTH, INPUTS), dynamic_shapes=free))
    x = torch.randn(7, LENGTH, INPUTS)
    for one, other in zip(pytree.tree_leaves(model(x)), pytree.tree_leaves(module(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pick", [lambda y: y[:, -1], lambda y: y.select(1, 0), lambda y: y[:, -1, :] + y[:, 1]])
def test_one_step_of_the_output_needs_no_sequence(pick):
    module = models.Applied(lambda m, x: pick(m.rnn(x)[0]), rnn=nn.GRU(INPUTS, WIDTH, batch_first=True))
    model = check_equal(module, torch.randn(BATCH, LENGTH, INPUTS))
    assert not {aten.cat.default, aten.select.int} & {node.target for node in model.graph.nodes}


def test_dropout_between_layers_follows_the_mode():
    module = nn.LSTM(INPUTS, WIDTH, 3, dropout=0.5).train()
    x = torch.randn(LENGTH, BATCH, INPUTS)
    model = apart(exported(module, x))
    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)
    assert [argument(n, "train") for n in model.graph.nodes if n.target is aten.dropout.default] == [True, True]


def test_a_packed_sequence_is_refused():
    graph = Graph()
    data, sizes = graph.placeholder("data"), graph.placeholder("sizes")
    packed = graph.call_function(aten.gru.data, (data, sizes, data, [data], False, 1, 0.0, False, False))
    with pytest.raises(GraphError, match=r"gru_data \(gru\): it reads a packed sequence.*without pack_padded_sequence"):
        take_apart(packed, {})


def test_a_free_length_is_refused():
    free = ({1: torch.export.Dim.DYNAMIC},)
    model = exported(nn.ReLU(), torch.randn(BATCH, LENGTH, INPUTS), dynamic_shapes=free)
    relu = next(node for node in model.graph.nodes if node.target is aten.relu.default)
    with model.graph.inserting_after(relu):
        gru = model.graph.call_function(aten.gru.input, (relu, relu, [relu] * 4, True, 1, 0.0, False, False, True))
    words = (
        r"gru.*the length of its sequences is free \(s.*\), and a layer is taken apart step by step. Export it for one"
    )
    with pytest.raises(GraphError, match=words):
        take_apart(gru, {})


# -- quantized -------------------------------------------------------------------------------------------------------


def prepared_and_calibrated(module, *inputs):
    quantizer = XNNPACKQuantizer().set_global(INT8)
    prepared = prepare_pt2e(exported(module.eval(), *inputs), quantizer)
    for scale in (1.0, 0.5):
        prepared(*(scale * x for x in inputs))
    return prepared


def scales_of_outputs(model, target):
    """Returns the scale that the output of each node of an operator is quantized by."""
    return [
        user.args[1] for n in model.graph.nodes if n.target is target for user in n.users
        if user.target is ops.QUANTIZE_PER_TENSOR
    ]  # fmt: skip


def test_steps_share_scales_and_parameters():
    module = nn.LSTM(INPUTS, WIDTH, batch_first=True)
    model = convert_pt2e(prepared_and_calibrated(module, torch.randn(BATCH, 5, INPUTS)))
    layers = [node for node in model.graph.nodes if node.target is aten.linear.default]
    assert len(layers) == 1 + 4  # All inputs at once, and the state after each step but the last.
    hidden = layers[1:]
    assert len({argument(node, "weight").args[0] for node in hidden}) == 1
    assert len({argument(node, "bias") for node in hidden}) == 1
    assert len({argument(node, "input").args[1] for node in hidden}) == 1
    assert len(set(scales_of_outputs(model, aten.linear.default))) == 2
    integers = [t for t in model.state_dict().values() if t.dtype == torch.int8 and t.dim() == 2]
    assert sorted(map(tuple, (t.shape for t in integers))) == [(4 * WIDTH, INPUTS), (4 * WIDTH, WIDTH)]


def test_each_layer_and_direction_has_scales_of_its_own():
    module = nn.LSTM(INPUTS, WIDTH, 2, bidirectional=True)
    model = convert_pt2e(prepared_and_calibrated(module, torch.randn(LENGTH, BATCH, INPUTS)))
    carried = [node for node in model.graph.nodes if node.target is aten.add.Tensor and node.meta.get("zeropoint_step")]
    assert len({node.meta["zeropoint_step"] for node in carried}) == 2 * 4  # Gates and c of each.
    by_place = {}
    for node in carried:
        quantize = next(user for user in node.users if user.target is ops.QUANTIZE_PER_TENSOR)
        by_place.setdefault(node.meta["zeropoint_step"], set()).add(quantize.args[1])
    assert all(len(scales) == 1 for scales in by_place.values())
    assert len(set.union(*by_place.values())) == 2 * 4


def test_a_state_that_is_carried_over_has_the_scale_of_the_rest():
    module = nn.LSTMCell(INPUTS, WIDTH)
    zeros = (torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, WIDTH))
    model = prepare_pt2e(exported(module, torch.randn(BATCH, INPUTS), zeros), XNNPACKQuantizer().set_global(INT8))
    model(torch.randn(BATCH, INPUTS), zeros)  # As careless calibration does; each would have scale 0 of its own.
    converted = convert_pt2e(model)
    result = converted(torch.randn(BATCH, INPUTS), tuple(torch.full_like(each, 0.1) for each in zeros))
    assert result[0].abs().max() > 0.01
    inputs = [n for n in converted.graph.nodes if n.op == "placeholder"][1:]
    scale_in = {user.args[1] for user in inputs[0].users if user.target is ops.QUANTIZE_PER_TENSOR}
    outputs = converted.graph.output_node().args[0]
    assert scale_in == {outputs[0].args[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_is_close_to_float(kind):
    module = KINDS[kind](INPUTS, 16, 2, bidirectional=True, batch_first=True).eval()
    x = torch.randn(BATCH, 8, INPUTS)
    model = convert_pt2e(prepared_and_calibrated(module, x))
    expected, found = module(x)[0], model(x)[0]
    assert 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()) > 25


def test_a_rule_for_the_module_or_the_operator_leaves_it_float():
    def forward(m, x):
        return m.head(m.rnn(x)[0])

    for rule in (("set_module_type", nn.LSTM), ("set_module_name", "rnn"), ("set_operator_type", aten.lstm.input)):
        module = models.Applied(forward, rnn=nn.LSTM(INPUTS, WIDTH), head=nn.Linear(WIDTH, 2)).eval()
        quantizer = XNNPACKQuantizer().set_global(INT8)
        getattr(quantizer, rule[0])(rule[1], None)
        x = torch.randn(LENGTH, BATCH, INPUTS)
        prepared = prepare_pt2e(exported(module, x), quantizer)
        prepared(x)
        model = convert_pt2e(prepared)
        layers = [node for node in model.graph.nodes if node.target is aten.linear.default]
        assert [argument(node, "weight").op for node in layers] == ["get_attr"] * LENGTH + ["call_function"], rule


def test_training_trains_the_parameters_that_all_steps_share():
    module = nn.LSTM(INPUTS, WIDTH, 2, dropout=0.5).train()
    x = torch.randn(LENGTH, BATCH, INPUTS)
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    prepared = prepare_qat_pt2e(exported(module, x), XNNPACKQuantizer().set_global(config))
    before = {name: value.clone() for name, value in prepared.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared(x)[0].square().sum().backward()
    optimizer.step()
    named = dict(prepared.named_parameters())
    assert all(not torch.equal(named[name], before[name]) for name in dict(module.named_parameters()))
    prepared.eval()
    expected = prepared(x)[0]
    found = convert_pt2e(prepared)(x)[0]  # Biases are on a grid now, so some values are a step away.
    assert 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()) > 30


def test_quantizers_of_others_share_scales_too():
    gm = exported(nn.GRU(INPUTS, WIDTH).eval(), torch.randn(LENGTH, BATCH, INPUTS))
    prepared = prepare_pt2e(gm, STATIC)
    prepared(torch.randn(LENGTH, BATCH, INPUTS))
    scales = scales_of_outputs(convert_pt2e(prepared), aten.linear.default)
    assert len(scales) == LENGTH
    assert len(set(scales)) == 2
