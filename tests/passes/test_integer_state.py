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


def test_a_state_that_is_no_number_is_told():
    model = prepared(State())
    model.buf[1, 2] = torch.nan
    with pytest.warns(UserWarning, match="1 of 6 values of buffer 'buf' lie outside"):
        convert_pt2e(model, fold_quantize_into_mutable_buffers=True)


def reading_as_float(model):
    annotated(model)
    models.find(model, "add").meta.pop(quantizers.KEY)


class OnlyWritten(State):
    def forward(self, x):
        self.buf.copy_(x * 0.5)
        return x + 1.0


def writing_floats(model):
    annotated(model)
    models.find(model, "mul").meta.pop(quantizers.KEY)


@pytest.mark.parametrize(
    ("module", "function", "reason"),
    [
        (State(in_place=True), annotated, r"add_ .*does not read it quantized per tensor"),
        (State(), reading_as_float, r"add .*does not read it quantized per tensor"),
        (State(), writing_floats, r"copy_ .*writes what is not quantized per tensor"),
        (OnlyWritten(), annotated, r"1 copy_ write to it and 0 operators read it"),
    ],
    ids=["in place", "read as float", "written as float", "only written"],
)
def test_other_buffers_stay_float_and_are_told(module, function, reason):
    model = prepared(module, function)
    with pytest.warns(UserWarning, match=f"buffer 'buf' stays float: {reason}"):
        state = convert_pt2e(model, fold_quantize_into_mutable_buffers=True).buf
    assert state.dtype == torch.float32


class ReadAfterwards(State):
    """Read before it is written and after, or after only."""

    def __init__(self, *, before):
        super().__init__()
        self.before = before

    def forward(self, x):
        self.buf.copy_((self.buf + x) * 0.5 if self.before else x * 0.5)
        return self.buf * 2.0


@pytest.mark.parametrize("before", [True, False])
def test_what_reads_the_written_buffer_reads_integers(before):
    start = prepared(ReadAfterwards(before=before))
    plain = convert_pt2e(deep_copy(start))
    model = convert_pt2e(start, fold_quantize_into_mutable_buffers=True)
    (copy,) = (node for node in model.graph.nodes if node.target is torch.ops.aten.copy_.default)
    assert model.buf.dtype == torch.int8
    assert [user.target for user in copy.users] == [ops.DEQUANTIZE_PER_TENSOR]
    assert {user.args[1:] for user in (*copy.users, *copy.args[0].users) if user is not copy} == {copy.args[1].args[1:]}
    qparams = copy.args[1].args[1:]
    for x in torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)):
        y = model(x)
        assert (plain(x) - y).abs().max() <= 4 * qparams[0]
        assert (y - 2 * ops.DEQUANTIZE_PER_TENSOR(model.buf, *qparams)).abs().max() <= 2 * qparams[0]


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
    def __init__(self, *, reads_written=False):
        super().__init__()
        self.register_buffer("buf", torch.linspace(-0.2, 0.2, 4)[None])
        self.layer = nn.Linear(4, 4)
        self.reads_written = reads_written

    def forward(self, x):
        new = self.buf * 0.5 + x
        self.buf.copy_(new)
        return self.layer(self.buf if self.reads_written else new)


@pytest.mark.parametrize("reads_written", [True, False])
def test_a_file_keeps_its_state_as_integers(reads_written):
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))
    model = prepare_pt2e(models.export(WithLayer(reads_written=reads_written).eval(), x), quantizer)
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
