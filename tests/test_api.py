"""``quantize``: what it makes, and what it says of input that it cannot use."""

import os
import sys
import warnings

import pytest
import torch
from torch import nn

import zeropoint as zp
from zeropoint import api
from zeropoint.backends.xnnpack import (
    XNNPACKQuantizer,
    get_default_quantization_config,
    get_symmetric_quantization_config,
)
from zeropoint.core.errors import (
    CalibrationError,
    CaptureError,
    FileError,
    GraphError,
    MissingExtraError,
    NonFiniteError,
    NothingQuantizedError,
    RuleError,
    SpecError,
)
from zeropoint.report.accuracy import AccuracyWork
from zeropoint.runtime.executorch import Program


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


def batches(count=4, batch=2):
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(batch, 3, 8, 8, generator=random),) for _ in range(count)]


@pytest.fixture(scope="module")
def result():
    return zp.quantize(small(), batches()[0], batches())


def quantize_without_runtime(monkeypatch, *args, **kwargs):
    """Runs ``quantize`` up to lowering, which costs seconds and is not what these tests are about."""
    program = api.xnnpack.LoweredProgram(b"....ET12", 1, ())
    monkeypatch.setattr(api.xnnpack, "lower_program", lambda *_, **__: program)
    return zp.quantize(*args, verify=False, **kwargs)


def test_the_summary_says_what_happened(result):
    text = str(result)
    assert "integer   4 of 4 operators: conv2d 1, relu 1, flatten 1, linear 1" in text
    assert "weights   " in text
    assert "1 delegate(s); left outside: nothing" in text
    for stage in ("export", "equalize", "prepare", "calibrate", "convert", "correct biases", "lower", "verify"):
        assert f"{stage} " in text
        assert result.stages_s[stage] >= 0


def test_the_summary_says_what_was_done_for_accuracy(monkeypatch):
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-7, weight_qmax=7)
    quantizer = XNNPACKQuantizer().set_global(config)
    data = batches(count=16)
    found = quantize_without_runtime(monkeypatch, small(), data[0], data, quantizer=quantizer)
    assert found.accuracy.corrected == ("conv2d", "linear")
    why = "no two have only relu, pooling or zero padding between them"
    assert f"\naccuracy  equalized no layers: {why}; corrected the biases of 2 layers\n" in str(found)


def pair() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def test_pairs_that_were_equalized_are_named(monkeypatch):
    found = quantize_without_runtime(monkeypatch, pair(), batches()[0], batches(), accuracy=("equalize",))
    assert found.accuracy == AccuracyWork((("conv2d", "conv2d_1"),), (), "", "not asked for")
    assert "\naccuracy  equalized 1 pair of layers; corrected no biases: not asked for\n" in str(found)
    assert {"correct biases", "float means", "verify"}.isdisjoint(found.stages_s)
    stages = "export, read data, canonicalize, equalize, prepare, calibrate, convert, lower, compare"
    assert ", ".join(found.stages_s) == stages


def test_what_was_not_asked_for_is_no_stage(monkeypatch):
    found = quantize_without_runtime(monkeypatch, pair(), batches()[0], batches(), accuracy=())
    assert "accuracy  equalized no layers: not asked for; corrected no biases: not asked for" in str(found)
    assert "equalize" not in found.stages_s


def test_biases_that_cannot_be_corrected_have_a_reason(monkeypatch):
    one = batches(count=1, batch=1)
    found = quantize_without_runtime(monkeypatch, pair(), one[0], one)
    assert "equalized 1 pair of layers; corrected no biases: only 1 sample was used, and it takes 2" in str(found)
    data = [(torch.randn(2, 4),) for _ in range(3)]
    found = quantize_without_runtime(monkeypatch, Counts(), data[0], data)
    assert "; corrected no biases: the model writes to buffers\n" in str(found)


def test_the_file_does_not_hold_the_float_weights(result):
    assert result.record.converted_bytes < 0.4 * result.record.float_bytes
    assert not [n for n, t in result.model.state_dict().items() if t.is_floating_point() and t.numel() > 8]


def test_convolutions_of_one_sample_stay_float_and_the_file_is_right():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    data = [(torch.randn(3, 16, 16),) for _ in range(4)]
    result = zp.quantize(nn.Sequential(first, nn.ReLU(), second, nn.Linear(16, 5)), data[0], data)
    assert [row.operator for row in result.coverage if row.is_quantized] == ["linear"]
    assert "no batch; the kernel has 4" in next(row.reason for row in result.coverage if row.operator == "conv2d")
    assert result.verification is not None
    assert result.float_sqnr_db > 30


def test_what_torch_warns_of_itself_is_not_shown():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        zp.quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), (torch.randn(2, 4),), [(torch.randn(2, 4),)])
    assert not [each for each in seen if "treespec" in str(each.message)]


def test_the_users_model_is_left_alone(monkeypatch):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_without_runtime(monkeypatch, model, batches()[0], batches())
    assert model.training
    assert model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_exported_program_and_its_module_are_left_alone(monkeypatch):
    exported = torch.export.export(small(), batches()[0])
    module = exported.module()
    nodes = [node.name for node in module.graph.nodes]
    first = quantize_without_runtime(monkeypatch, exported, batches()[0], batches())
    second = quantize_without_runtime(monkeypatch, module, batches()[0], batches())
    assert [node.name for node in module.graph.nodes] == nodes
    inputs = batches()[1]
    assert torch.equal(first.model(*inputs), second.model(*inputs))


def test_a_generator_of_single_tensors_is_data_too(monkeypatch):
    listed = quantize_without_runtime(monkeypatch, small(), batches()[0], batches())
    streamed = quantize_without_runtime(monkeypatch, small(), batches()[0], (x for (x,) in batches()))
    assert torch.equal(listed.model(*batches()[0]), streamed.model(*batches()[0]))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (x for (x,) in batches(batch=1, count=8))


def test_a_loader_of_a_stream_does_not_know_its_length(monkeypatch):
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(TypeError):
        len(loader)
    listed = quantize_without_runtime(monkeypatch, small(), batches(batch=1)[0], list(loader))
    streamed = quantize_without_runtime(monkeypatch, small(), batches(batch=1)[0], loader)
    assert torch.equal(listed.model(*batches(batch=1)[0]), streamed.model(*batches(batch=1)[0]))


def test_progress_is_written_when_asked_for(monkeypatch, capsys):
    quantize_without_runtime(monkeypatch, small(), batches()[0], batches(), progress=True)
    assert "calibrate ..." in capsys.readouterr().err
    quantize_without_runtime(monkeypatch, small(), batches()[0], batches())
    assert capsys.readouterr().err == ""


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], CalibrationError, "calibration_data is empty. Give some batches of real data"),
        (3, CalibrationError, "calibration_data is int, not an iterable of batches"),
        ("folder", CalibrationError, "calibration_data is str"),
        (torch.zeros(4, 3, 8, 8), CalibrationError, "calibration_data is one tensor"),
        ([{"x": 1}], CalibrationError, "calibration batch 0: is dict, not a tuple of inputs"),
        ([(torch.zeros(2, 3, 8, 8), 1)], CalibrationError, "calibration batch 0: has 2 inputs, the model takes 1"),
        ([(torch.zeros(2, 3, 9, 8),)], CalibrationError, r"has shape \(2, 3, 9, 8\); the model was exported for"),
        ([(torch.zeros(2, 3, 8, 8).double(),)], CalibrationError, "is torch.float64; the model was exported for"),
        ([(1.0,)], CalibrationError, "is float, not a tensor"),
        ([*batches(2), (torch.full((2, 3, 8, 8), torch.nan),)], NonFiniteError, "calibration batch 2, input 'input'"),
    ],
)
def test_bad_calibration_data(monkeypatch, data, error, words):
    with pytest.raises(error, match=words):
        quantize_without_runtime(monkeypatch, small(), batches()[0], data)


class Explodes(nn.Module):
    """Makes infinity of large inputs: the data is clean, the model is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.exp(self.first(x)))


def test_infinity_in_the_model_names_site_batch_and_operator():
    torch.manual_seed(0)
    model = torch.export.export(Explodes(), (torch.zeros(1, 4),)).module()
    config = get_default_quantization_config()
    prepared = zp.prepare_pt2e(model, XNNPACKQuantizer().set_global(config))
    prepared(torch.ones(1, 4))
    with pytest.raises(NonFiniteError) as caught:
        prepared(torch.full((1, 4), 1e4))
    assert "exp (exp)" in str(caught.value)
    assert "linear_1.input" in str(caught.value)
    assert "batch 1" in str(caught.value)


def test_convert_without_data_names_the_tensor():
    model = torch.export.export(small(), batches()[0]).module()
    prepared = zp.prepare_pt2e(model, XNNPACKQuantizer().set_global(get_default_quantization_config()))
    with pytest.raises(CalibrationError, match="input"):
        zp.convert_pt2e(prepared)


class BranchesOnData(nn.Module):
    def forward(self, x):
        return x + 1 if bool(x.sum() > 0) else x - 1


def test_a_model_that_does_not_export(monkeypatch):
    with pytest.raises(CaptureError, match=r"BranchesOnData: torch.export could not export the model"):
        quantize_without_runtime(monkeypatch, BranchesOnData(), (torch.zeros(2),), [(torch.zeros(2),)])


def test_a_rule_that_matches_nothing(monkeypatch):
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config()).set_module_name("hed", None)
    with pytest.raises(RuleError, match=r"set_module_name\('hed'\): the rule matches no node.*modules: 0, 1, 2, 3, 4"):
        quantize_without_runtime(monkeypatch, small(), batches()[0], batches(), quantizer=quantizer)


def test_nothing_to_quantize(monkeypatch):
    data = [(torch.randn(2, 4),)]
    with pytest.raises(NothingQuantizedError, match="softmax"):
        quantize_without_runtime(monkeypatch, nn.Softmax(-1), data[0], data)


def test_a_prepared_model_is_not_quantized():
    exported = torch.export.export(small(), batches()[0]).module()
    prepared = zp.prepare_pt2e(exported, XNNPACKQuantizer().set_global(get_default_quantization_config()))
    with pytest.raises(GraphError, match="quantize: the model is prepared already"):
        zp.quantize(prepared, batches()[0], batches())


def test_unknown_choices(monkeypatch):
    with pytest.raises(SpecError, match=r"backend='tpu' is unknown. Use one of: 'xnnpack'"):
        zp.quantize(small(), batches()[0], batches(), backend="tpu")
    with pytest.raises(SpecError, match="Give a tuple of 'equalize', 'correct_biases'"):
        zp.quantize(small(), batches()[0], batches(), accuracy=("magic",))
    with pytest.raises(SpecError, match=r"verify='yes' is no bool"):
        zp.quantize(small(), batches()[0], batches(), verify="yes")
    with pytest.raises(SpecError, match=r"progress=1 is no bool"):
        zp.quantize(small(), batches()[0], batches(), progress=1)
    with pytest.raises(NothingQuantizedError, match=r"the model has no operator that computes anything"):
        zp.quantize(nn.Identity(), batches()[0], batches())
    with pytest.raises(CaptureError, match="got list, not a model"):
        zp.quantize([1], batches()[0], batches())


def test_a_missing_extra_is_found_before_any_data_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    read = []
    data = (read.append(batch) or batch for batch in batches())
    with pytest.raises(
        MissingExtraError, match=r"'executorch' is not installed.*pip install 'zeropoint\[executorch\]'"
    ):
        zp.quantize(small(), batches()[0], data)
    assert not read


def test_an_extra_that_is_installed_in_part(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.kernels.quantized", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zeropoint\[executorch\]'"):
        zp.quantize(small(), batches()[0], batches())


# -- saving --------------------------------------------------------------------------------------------------------


def test_save_is_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "model.pte"
    assert result.save(path) == path
    assert path.read_bytes() == result.pte
    path.write_bytes(b"the old one")

    def interrupted(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                result.save(path)
        assert path.read_bytes() == b"the old one"
        assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]


def test_save_where_it_cannot_be(result, tmp_path):
    with pytest.raises(FileError, match=r"cannot be written.*Create the folder"):
        result.save(tmp_path / "nowhere" / "model.pte")


def test_tied_weights_stay_one_tensor(monkeypatch):
    inputs = (torch.randn(2, 8),)
    result = quantize_without_runtime(monkeypatch, Tied(), inputs, [inputs])
    frozen = [tensor for name, tensor in result.model.state_dict().items() if "_frozen_param" in name]
    assert len(frozen) == 1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


# -- what came out -------------------------------------------------------------------------------------------------


def test_tensors_by_their_float_path(result):
    tensors = result.tensors()
    assert set(tensors) == {"0.weight", "4.weight"}
    weight = small()[4].weight.detach()
    error = (tensors["4.weight"].dequantize() - weight).abs().amax(1)
    assert bool((error <= 0.51 * tensors["4.weight"].scale).all())
    assert tensors["4.weight"].nbytes < 0.4 * weight.numel() * 4


def test_a_model_that_does_not_shrink_is_warned_about(monkeypatch):
    model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 4))
    data = [(torch.randint(0, 1000, (2, 3)),) for _ in range(2)]
    text = str(quantize_without_runtime(monkeypatch, model, data[0], data))
    assert "of the weights' bytes are float: 0.weight (64,000 bytes)" in text


class Counts(nn.Module):
    """Writes to a buffer at every call."""

    def __init__(self, inputs=4, outputs=4):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.register_buffer("seen", torch.zeros(outputs))

    def forward(self, x):
        y = self.layer(x + self.seen.mean())
        self.seen.add_(y.mean(0))
        return y


def test_buffers_of_the_users_model_are_not_written_to(monkeypatch):
    model = Counts()
    data = [(torch.randn(2, 4),) for _ in range(3)]
    quantize_without_runtime(monkeypatch, model, data[0], data)
    exported = torch.export.export(model, data[0])
    quantize_without_runtime(monkeypatch, exported, data[0], data)
    assert not model.seen.any()


def test_buffers_of_the_result_begin_as_the_users(monkeypatch):
    model = Counts()
    model.seen.fill_(3.0)
    data = [(torch.randn(2, 4),) for _ in range(3)]
    result = quantize_without_runtime(monkeypatch, model, data[0], data)
    assert torch.equal(result.model.seen, torch.full((4,), 3.0))
    result.model(*data[0])
    assert not torch.equal(result.model.seen, torch.full((4,), 3.0))


def test_a_model_that_writes_to_buffers_is_prepared_from_its_beginning(monkeypatch):
    """Its biases are left: what it computes of a batch depends on those before, and they were 10 dB worse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), Counts(16, 4)).eval()
    data = [(torch.randn(2, 4),) for _ in range(16)]
    corrected = quantize_without_runtime(monkeypatch, model, data[0], data, accuracy=("correct_biases",))
    plain = quantize_without_runtime(monkeypatch, model, data[0], data, accuracy=())
    for _ in range(2):
        assert torch.equal(corrected.model(*data[0]), plain.model(*data[0]))


@pytest.mark.parametrize("wrong", [XNNPACKQuantizer, get_default_quantization_config(), 3])
def test_what_is_no_quantizer(monkeypatch, wrong):
    with pytest.raises(SpecError, match=r"no quantizer object.*XNNPACKQuantizer\(\)\.set_global\(config\)"):
        quantize_without_runtime(monkeypatch, small(), batches()[0], batches(), quantizer=wrong)


def test_tied_weights_under_different_rules(monkeypatch):
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config()).set_module_name("second", None)
    data = [(torch.randn(2, 8),)]
    with pytest.raises(
        zp.ZeropointError, match=r"weight is tied: linear.* is quantized to .* and linear_1.* left float"
    ):
        quantize_without_runtime(monkeypatch, Tied(), data[0], data, quantizer=quantizer)


class MaskedAttention(nn.Module):
    def forward(self, q, mask):
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_a_float_mask_is_never_quantized():
    graph = torch.export.export(MaskedAttention(), (torch.randn(1, 2, 4, 8), torch.zeros(1, 1, 4, 4))).module()
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config())
    with pytest.raises(NothingQuantizedError, match="a softmax reads it"):
        zp.prepare_pt2e(graph, quantizer)


BATCH = torch.export.Dim("batch", min=1, max=16)


@pytest.mark.parametrize(("free", "end"), [(torch.export.Dim.DYNAMIC, 64), (torch.export.Dim.AUTO, 64), (BATCH, 16)])
def test_a_batch_that_is_free_in_the_program_is_free_in_the_file(free, end):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    exported = torch.export.export(model, batches(batch=4)[0], dynamic_shapes=({0: free},))
    result = zp.quantize(exported, batches(batch=1)[0], batches())
    assert result.free == (("input[0]", end),)
    assert f"sizes     free up to input[0] {end}" in str(result)
    program = Program(result.pte)
    for batch in (1, 5, end):
        (inputs,) = batches(1, batch)
        assert torch.equal(program(*inputs)[0], result.model(*inputs))


@pytest.mark.parametrize("kind", ["ExportedProgram", "GraphModule"])
def test_free_sizes_of_an_exported_model_are_a_matter_of_its_export(kind):
    program = torch.export.export(small(), batches()[0])
    model = {"ExportedProgram": program, "GraphModule": program.module()}[kind]
    words = rf"dynamic_shapes is given, but the model is exported already \({kind}\).* to torch\.export\.export, or"
    with pytest.raises(SpecError, match=words):
        zp.quantize(model, batches()[0], batches(), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_inputs_of_every_kind_run(monkeypatch):
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, pair, factor):
            return {"y": self.layer(pair["x"]) * factor, "none": None}

    x = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    result = zp.quantize(Kinds(), ({"x": x}, 2), [({"x": x}, 2)])
    assert result.runtime_sqnr_db >= 55


class Short(nn.Module):
    """Takes and returns floats of 16 bits, and computes in 32."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.layer(x.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_and_outputs_of_short_floats(dtype):
    data = [(x.to(dtype),) for (x,) in batches()]
    assert zp.quantize(Short(), data[0], data).runtime_sqnr_db >= 55


class Picks(nn.Module):
    """Returns the index of the largest score, and nothing else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, x, offset):
        return self.layer(x if offset is None else x + offset).argmax(1)


def test_a_model_that_returns_integers_of_optional_inputs():
    data = [(torch.randn(32, 8), None) for _ in range(2)]
    result = zp.quantize(Picks(), data[0], data)
    assert result.verification is not None
    assert result.runtime_sqnr_db == result.verification.sqnr_db >= 30
    assert (
        "outputs   against float no float output on calibration data\n          file against converted model: "
        in str(result)
    )


def test_a_decomposed_program_quantizes_as_the_exported_one(result):
    program = torch.export.export(small(), batches()[0]).run_decompositions()
    decomposed = zp.quantize(program, batches()[0], batches())
    assert [row.pattern for row in decomposed.coverage] == [row.pattern for row in result.coverage]
    assert all(row.is_quantized for row in decomposed.coverage)
    assert decomposed.outside == ()
    assert torch.equal(decomposed.model(*batches()[0]), result.model(*batches()[0]))
