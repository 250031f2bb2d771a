"""Reports refuse a model that keeps its state as integers, in words."""

import copy

import models
import pytest
import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import ComparisonError

WORDS = r"{}: the converted model keeps its state as integers: buf\. Convert a copy without fold_quantize_into"


class State(nn.Module):
    """A running mean of what a layer gives; read before it is written, or afterwards."""

    def __init__(self, reads_written):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("buf", torch.zeros(1, 4))
        self.reads_written = reads_written

    def forward(self, x):
        new = self.layer(x) if self.reads_written else self.buf * 0.5 + self.layer(x)
        self.buf.copy_(new)
        return (self.buf if self.reads_written else new) * 2.0


def prepared(model, x, prepare, **options):
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))
    found = prepare(models.export(model, x), quantizer)
    with torch.no_grad():
        for _ in range(3):
            found(x)
    return found


@pytest.mark.parametrize("reads_written", [True, False])
def test_comparing(reads_written):
    model, x = State(reads_written).eval(), torch.randn(1, 4)
    found = prepared(model, x, zp.prepare_pt2e)
    float_state = zp.convert_pt2e(copy.deepcopy(found))
    assert zp.compare(model, float_state, [(x,)], measure=0).sites
    integers = zp.convert_pt2e(found, fold_quantize_into_mutable_buffers=True)
    assert integers.buf.dtype == torch.int8
    with pytest.raises(ComparisonError, match=WORDS.format("compare")):
        zp.compare(model, integers, [(x,)])


def test_checking_what_was_trained():
    x = torch.randn(1, 4)
    found = prepared(State(reads_written=False).train(), x, zp.prepare_qat_pt2e, is_qat=True)
    assert zp.check_convert(found, zp.convert_pt2e(copy.deepcopy(found)), (x,))
    integers = zp.convert_pt2e(copy.deepcopy(found), fold_quantize_into_mutable_buffers=True)
    with pytest.raises(ComparisonError, match=WORDS.format("check_convert")):
        zp.check_convert(found, integers, (x,))
