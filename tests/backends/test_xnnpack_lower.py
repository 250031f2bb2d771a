"""What of a model comes into the file."""

import torch
from torch import nn

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
