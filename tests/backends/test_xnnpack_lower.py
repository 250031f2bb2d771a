"""What of a model comes into the file, and how."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropoint as zp
from tests.models import Applied
from zeropoint.backends.xnnpack import lower_float
from zeropoint.runtime.child import run_in_child


class Counting(nn.Module):
    """Writes to two buffers at every call; one begins above 0, and is in no ``state_dict``."""

    def __init__(self):
        super().__init__()
        self.register_buffer("from_zero", torch.zeros(1, 4))
        self.register_buffer("from_five", torch.full((1, 4), 5.0), persistent=False)

    def forward(self, x):
        self.from_zero.add_(2)
        self.from_five.add_(x)
        return x * self.from_zero + self.from_five


@torch.no_grad()
def test_written_buffers_begin_as_they_are():
    model, inputs = Counting(), (torch.randn(1, 4),)
    pte = lower_float(model, inputs).pte
    assert not model.from_zero.any()
    for (actual,) in run_in_child(pte, [inputs, inputs, inputs]):
        torch.testing.assert_close(actual, model(*inputs))


def one(kind, *sizes):
    return Applied(lambda m, x: m.layer(F.relu(m.layer(x))), layer=kind(*sizes))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (one(nn.Conv1d, 4, 4, 3), (2, 4, 9)),
        (one(nn.ConvTranspose1d, 4, 4, 3), (2, 4, 9)),
        (nn.Sequential(nn.Conv1d(4, 4, 3), nn.PReLU(4), nn.Conv1d(4, 4, 1)), (2, 4, 9)),
        (Applied(lambda m, x: torch.cat(m.layer(x).split([2, 4], 1)[::-1], 1), layer=nn.Conv2d(4, 6, 1)), (2, 4, 5, 5)),
        (Applied(lambda m, x: m.layer(torch.add(*x.relu().chunk(2, -1))), layer=nn.Conv2d(4, 6, 1)), (2, 4, 5, 6)),
    ],
    ids=["conv1d twice", "conv_transpose1d twice", "prelu of one dimension", "split", "chunk of floats"],
)
@torch.no_grad()
def test_one_piece_equal_to_the_converted_model(module, shape):
    torch.manual_seed(0)
    data = [(torch.randn(shape),) for _ in range(4)]
    result = zp.quantize(module.eval(), data[0], data, verify=False)
    assert (result.delegates, result.outside) == (1, ())
    ((actual,),) = run_in_child(result.pte, data[:1])
    torch.testing.assert_close(actual, result.model(*data[0]))
