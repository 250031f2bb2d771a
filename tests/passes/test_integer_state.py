"""Buffers that a model reads and writes quantized, kept as integers."""

import models
import pytest
import quantizers
import torch
from quantizers import annotate
from torch import nn

from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower
from zeropoint.core.errors import SpecError
from zeropoint.graph.copies import deep_copy
from zeropoint.numerics import ops
from zeropoint.runtime.child import run_in_child
from zeropoint.workflow import convert_pt2e, prepare_pt2e


class State(nn.Module):
    """A running sum, halved each time; read by one operator or by two, written at the end or in place."""

    def __init__(self, shape=(2, 3), *, readers=1, in_place=False, persistent=True):
        super().__init__()
        state = torch.linspace(-0.2, 0.2, 2 * 3).reshape(2, 3).expand(*shape).clone()
        self.register_buffer("buf", state, persistent=persistent)
        self.readers, self.in_place = readers, in_place

    def forward(self, x):
        if self.in_place:
            self.buf.add_(x)
            return self.buf * 0.5
        new = self.buf + x
        if self.readers > 1:
            new = new + self.buf * 0.25
        self.buf.copy_(new * 0.5)
        return new


def annotated(model):
    for node in model.graph.nodes:
        if node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor):
            tensors = [name for name, arg in zip(("self", "other"), node.args, strict=True) if hasattr(arg, "meta")]
            annotate(node, dict.fromkeys(tensors, quantizers.activation()), quantizers.activation())


def prepared(module, function=annotated, batches=6):
    shape = module.buf.shape
    model = prepare_pt2e(models.export(module.eval(), torch.randn(shape)), quantizers.ByHand(function))
    random = torch.Generator().manual_seed(0)
    start = model.buf.clone()
    for _ in range(batches):
        model(torch.randn(shape, generator=random))
    model.buf.copy_(start)
    return model


def converted(module, function=annotated, **options):
    return convert_pt2e(prepared(module, function), fold_quantize_into_mutable_buffers=True, **options)


def ends(model):
    """Returns the quantize operator of what ``copy_`` writes, and the dequantize operators of the buffer."""
    (copy,) = (node for node in model.graph.nodes if node.target is torch.ops.aten.copy_.default)
    return copy.args[1], [user for user in copy.args[0].users if user is not copy]


@pytest.mark.parametrize("readers", [1, 2])
def test_a_buffer_is_stored_in_the_scale_that_is_written(readers):
    model = converted(State(readers=readers))
    written, reads = ends(model)
    assert model.buf.dtype == torch.int8
    assert written.target is ops.QUANTIZE_PER_TENSOR
    assert len(reads) == readers
    assert {read.target for read in reads} == {ops.DEQUANTIZE_PER_TENSOR}
    assert {read.args[1:] for read in reads} == {written.args[1:]}
    assert torch.equal(model.buf, ops.QUANTIZE_PER_TENSOR(State().buf, *written.args[1:]))
    assert "buf" in model.state_dict()
    (get,) = (node for node in model.graph.nodes if node.op == "get_attr" and node.target == "buf")
    assert get.meta["val"].dtype == torch.int8


def test_it_stays_float_unless_asked_for():
    model = convert_pt2e(prepared(State()))
    assert model.buf.dtype == torch.float32
    assert ends(model)[1][0].target is ops.QUANTIZE_PER_TENSOR


def test_it_computes_what_the_float_buffer_does_within_steps_of_the_state():
    """Stored in the scale that is written, the state moves by half a step at most, and is halved each time."""
    before = prepared(State())
    plain = convert_pt2e(deep_copy(before))
    stored = convert_pt2e(before, fold_quantize_into_mutable_buffers=True)
    step = ends(stored)[0].args[1]
    random = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(2, 3, generator=random)
        assert (plain(x) - stored(x)).abs().max() <= 6 * step
        integers = stored.buf.float()
        assert torch.equal(integers, integers.round())
        assert stored.buf.dtype == torch.int8


def test_values_that_begin_clipped_are_told():
    module = State()
    module.buf[0, 0] = 100.0
    model = prepared(module)
    with pytest.warns(UserWarning, match=r"1 of 6 values of buffer 'buf' lie outside .* begin clipped"):
        state = convert_pt2e(model, fold_quantize_into_mutable_buffers=True).buf
    assert state[0, 0] == 127


def reading_as_float(model):
    annotated(model)
    models.find(model, "add").meta.pop(quantizers.KEY)


@pytest.mark.parametrize(
    ("module", "function"), [(State(in_place=True), annotated), (State(), reading_as_float)], ids=["in place", "float"]
)
def test_other_buffers_stay_float(module, function):
    assert converted(module, function).buf.dtype == torch.float32


def test_memory_layout_and_what_is_not_saved_are_kept():
    module = State((4, 2, 3), persistent=False)
    module.buf = module.buf.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    stride = module.buf.stride()
    model = converted(module)
    assert model.buf.dtype == torch.int8
    assert model.buf.stride() == stride
    assert "buf" not in model.state_dict()


def test_memory_under_two_names_is_refused():
    model = prepared(State())
    model.register_buffer("other", model.buf)
    with model.graph.inserting_before(next(iter(model.graph.nodes))):
        read = model.graph.get_attr("other")
    (out,) = (node for node in model.graph.nodes if node.op == "output")
    read.meta["val"] = models.find(model, "add").meta["val"]
    out.args = ((*out.args[0], read),)
    with pytest.raises(SpecError, match=r"buf: .*aliases registered buffers \['other'\]") as raised:
        convert_pt2e(model, fold_quantize_into_mutable_buffers=True)
    assert isinstance(raised.value, ValueError)


def test_it_needs_folded_constants():
    with pytest.raises(ValueError, match="fold_quantize_into_mutable_buffers=True requires fold_quantize=True"):
        convert_pt2e(prepared(State()), fold_quantize=False, fold_quantize_into_mutable_buffers=True)


def test_reference_integers_are_those_of_the_graph():
    before = prepared(State())
    plain = convert_pt2e(deep_copy(before), fold_quantize_into_mutable_buffers=True)
    integers = convert_pt2e(before, use_reference_representation=True, fold_quantize_into_mutable_buffers=True)
    for x in torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2)):
        assert torch.allclose(plain(x), integers(x), atol=1e-6)
        assert torch.equal(plain.buf, integers.buf)


class WithLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("buf", torch.linspace(-0.2, 0.2, 4)[None])
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        new = self.buf * 0.5 + x
        self.buf.copy_(new)
        return self.layer(new)


def test_a_file_keeps_its_state_as_integers():
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))
    model = prepare_pt2e(models.export(WithLayer().eval(), x), quantizer)
    start = model.buf.clone()
    for scale in (0.5, 1.0, -1.0):
        model(x * scale)
    model.buf.copy_(start)
    model = convert_pt2e(model, fold_quantize_into_mutable_buffers=True)
    batches = [(x * scale,) for scale in (1.0, -0.5, 0.25, 1.0)]
    assert model.buf.dtype == torch.int8
    outputs = run_in_child(lower(deep_copy(model), batches[0]), batches)
    for batch, found in zip(batches, outputs, strict=True):
        assert torch.equal(found[0], model(*batch))
