"""``bench`` on real models: both files on the runtime."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests import models
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CalibrationError, CaptureError, GraphError, SpecError
from zeropoint.core.processor import has_integer_dot_product

WIDE = (torch.randn(4, 512),)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 2048)).eval()


@pytest.fixture(scope="module")
def quantized(wide) -> zp.QuantizedModel:
    return zp.quantize(wide, WIDE, [WIDE], verify=False)


def test_wide_layers_gain(wide, quantized):
    found = zp.bench(wide, quantized, runs=9, threads=1)
    assert (found.runs, found.threads, found.warmup) == (9, 1, 5)
    assert found.float_macs == 0
    assert found.integer_macs == 4 * 2048 * (512 + 2048)
    assert found.quantized_file.size == len(quantized.pte)
    assert found.quantized_file.size < 0.27 * found.float_file.size
    assert found.quantized_file.peak_bytes < 0.5 * found.float_file.peak_bytes
    assert found.borders.islands == ()
    assert json.loads(found.to_json())["ratio"] == found.ratio
    if has_integer_dot_product():
        assert found.ratio < 0.8
        assert found.why == ()


def test_a_report_of_a_result(quantized, tmp_path):
    pytest.importorskip("plotly")
    path = quantized.report(tmp_path / "page.html", title="wide layers")
    text = path.read_text()
    assert "<h1>wide layers</h1>" in text
    assert "What is quantized, on the calibration batch," in text
    assert f"file {len(quantized.pte):,} bytes" in text
    for words in ("correct biases", "float on the int32 grid", "int8 -127 to 127 per channel (2)"):
        assert words in text


def test_a_converted_model_with_free_sizes_on_other_inputs():
    """The float module is exported with the sizes free that are free in the converted one."""
    layer = nn.Linear(8, 4).eval()
    exported = torch.export.export(layer, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("n", max=32)},))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = zp.prepare_pt2e(exported.module(), quantizer)
    prepared(torch.randn(3, 8))
    converted = zp.convert_pt2e(prepared)
    with pytest.raises(SpecError, match=r"bench: a converted model has no example inputs\. Give example_inputs"):
        zp.bench(layer, converted)
    found = zp.bench(layer, converted, (torch.randn(20, 8),), runs=1, warmup=0)
    assert (found.runs, found.warmup, found.integer_macs) == (1, 0, 3 * 8 * 4)


def test_what_cannot_be_compared(wide, quantized):
    with pytest.raises(CaptureError, match="got Sequential, not an exported graph module"):
        zp.bench(wide, wide)
    with pytest.raises(GraphError, match="bench: the model is converted already"):
        zp.bench(quantized.model, quantized)
    with pytest.raises(CaptureError, match="got QuantizedModel, not a model"):
        zp.bench(quantized, quantized)
    with pytest.raises(CalibrationError, match="example_inputs, input 'input': has shape"):
        zp.bench(wide, quantized, (torch.randn(4, 5),))


@pytest.mark.parametrize(
    ("given", "words"),
    [({"runs": 0}, "runs=0 is below 1"), ({"warmup": -1}, "warmup=-1 is below 0"),
     ({"threads": 0}, "threads=0 is below 1"), ({"runs": 2.5}, "runs=2.5 is no integer")],
)  # fmt: skip
def test_numbers_that_cannot_be(quantized, given, words):
    with pytest.raises(SpecError, match=words):
        zp.bench(*models.linear()[:1], quantized, **given)
