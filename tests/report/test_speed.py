"""What speed to expect: where a model's multiply-accumulates run, and what is said of them."""

import platform

import models
import pytest
import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core import processor
from zeropoint.report.speed.speed import Work, speed_note, work_of

DEPTHWISE = Work(900, 100, 2, 3)


def converted(module, *shape, config=None, rules=None):
    x = torch.randn(shape)
    quantizer = XNNPACKQuantizer().set_global(config or get_symmetric_quantization_config(is_per_channel=True))
    for name in rules or ():
        quantizer.set_module_name(name, None)
    prepared = zp.prepare_pt2e(torch.export.export(module.eval(), (x,)).module(), quantizer)
    prepared(x)
    return zp.convert_pt2e(prepared)


def test_work_by_where_it_runs():
    module = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 2, 2, 2), nn.Conv2d(2, 1, 1),
    )  # fmt: skip
    model = converted(module, 1, 4, 8, 8, rules=["3"])
    integer = 4 * 64 * 9 + 6 * 64 * 4 + 6 * 64 * 2 * 4
    assert work_of(model) == Work(integer, 256 * 2, 1, 4)


def test_padding_before_an_integer_layer_leaves_it_one():
    assert work_of(converted(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)), 1, 3, 8, 8)).floating == 0


def test_a_layer_whose_weight_alone_is_quantized_is_float_work():
    config = get_symmetric_quantization_config(is_per_channel=True)
    model = converted(nn.Linear(4, 3), 2, 4, config=zp.QuantizationConfig(None, None, config.weight, None))
    assert work_of(model) == Work(0, 24, 0, 0)
    assert speed_note(work_of(model)) == ""


def test_a_float_model_has_float_work_only():
    assert work_of(models.exported(models.linear)).integer == 0


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Returns a function that sets what /proc/cpuinfo says; None: there is none."""

    def write(text, machine="x86_64"):
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(processor, "FLAGS", path)
        monkeypatch.setattr(platform, "machine", lambda: machine)

    return write


def test_nothing_speaks_against_int8(flags):
    flags("flags : sse2 avx512_vnni avx2")
    assert speed_note(DEPTHWISE) == ""
    assert speed_note(Work(100, 300, 0, 0)) == "75% of the multiply-accumulates stay float"
    assert processor.integer_dot_product() == "avx512_vnni"


def test_a_processor_without_the_instruction(flags):
    flags("flags : sse2 avx2")
    assert speed_note(DEPTHWISE) == (
        "this processor has no integer dot product instruction, so int8 gains little over float; "
        "without one, XNNPACK's int8 depthwise convolutions (2 here) are slower than float ones"
    )
    assert processor.has_integer_dot_product() is False


@pytest.mark.parametrize(("machine", "known"), [("AMD64", None), ("x86_64", None), ("arm64", True)])
def test_a_system_that_does_not_list_instructions(flags, machine, known):
    flags(None, machine)
    assert processor.has_integer_dot_product() is known
    words = "it is not known whether this processor has an integer dot product instruction; without one int8 gains"
    assert speed_note(DEPTHWISE).startswith(words) is (known is None)
    assert "this processor has no" not in speed_note(DEPTHWISE)
