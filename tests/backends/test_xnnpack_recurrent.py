"""Recurrent layers on the runtime: what of them is integer, and that their parameters are in the file once."""

import math

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.backends.xnn_graph import delegates, float_nodes, integer_kinds, operators_outside
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.runtime.executorch import Program

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # Of torch.export.
IN_FLOAT = {"Sigmoid(fp32->fp32)", "Tanh(fp32->fp32)"}
INTEGER = {"lstm": {"FullyConnected", "Add", "Multiply", "StaticSlice", "StaticReshape"}}
INTEGER["gru"] = INTEGER["lstm"] | {"Subtract"}
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Last(nn.Module):
    """A recurrent layer, and what a linear layer makes of its last output."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def last(kind: str, width: int = 16) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Last(KINDS[kind](8, width, batch_first=True)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_sigmoid_and_tanh_is_integer_in_one_delegate(kind):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    result = zp.quantize(last(kind), (x,), [x, -x])
    assert result.runtime_sqnr_db == math.inf
    (delegate,) = delegates(result.pte)
    assert operators_outside(result.pte) == []
    assert set(integer_kinds(delegate.nodes)) == INTEGER[kind]
    assert set(float_nodes(delegate.nodes)) == IN_FLOAT
    assert result.float_sqnr_db > 25


def converted(module, x, config, *floats, **settings):
    quantizer = XNNPACKQuantizer().set_global(config)
    for kind in floats:
        quantizer.set_module_type(kind, None)
    prepared = zp.prepare_pt2e(torch.export.export(module, (x,), **settings).module(), quantizer)
    prepared(x)
    return zp.convert_pt2e(prepared)


INT8 = get_symmetric_quantization_config(is_per_channel=True)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_cost_no_parameters(kind):
    """Each weight is in the file once, in bytes; a second copy of the one that steps share would be 49 kB and more."""
    module, x = last(kind, 128), torch.randn(1, 3, 8)
    weights = sum(parameter.numel() for parameter in module.parameters())
    assert weights < len(lower(converted(module, x, INT8), (x,))) < weights + 30_000


def test_dynamic_activations():
    x = torch.randn(2, 3, 8)
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    model = converted(last("lstm"), x, config)
    pte = lower(model, (x,))
    layers = [str(node) for graph in delegates(pte) for node in graph.nodes if node.kind == "FullyConnected"]
    assert set(layers) == {"FullyConnected(qd8,qc8c,fp32c->fp32)"}
    torch.testing.assert_close(Program(pte)(x)[0], model(x), rtol=0, atol=0.01)


def test_a_layer_left_float_lowers_as_float():
    x = torch.randn(2, 3, 8)
    model = converted(last("gru"), x, INT8, nn.GRU)
    pte = lower(model, (x,))
    nodes = [node for graph in delegates(pte) for node in graph.nodes]
    assert integer_kinds(nodes) == ["FullyConnected"]
    assert operators_outside(pte) == []
    torch.testing.assert_close(Program(pte)(x)[0], model(x), rtol=0, atol=1e-2)


def test_a_free_batch_on_the_runtime():
    x = torch.randn(2, 2, 8)
    model = converted(last("lstm"), x, INT8, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    program = Program(lower(model, (x,)))
    for batch in (2, 5):
        x = torch.randn(batch, 2, 8)
        assert torch.equal(program(x)[0], model(x))
