"""Activations quantized at run time by XNNPACK: one scale per token, no calibration, and the file does the same."""

import models
import pytest
import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends import xnnpack
from zeropoint.core.errors import CalibrationError
from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db

DYNAMIC = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


def dynamic() -> xnnpack.XNNPACKQuantizer:
    return xnnpack.XNNPACKQuantizer().set_global(DYNAMIC)


def targets(model: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in model.graph.nodes]


def tokens_of_all_sizes(*shape: int) -> torch.Tensor:
    """Returns tokens ``(..., 64)`` whose ranges are far apart: one scale for all would leave most of them 0."""
    size = 10.0 ** torch.linspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * size


@pytest.mark.parametrize("shape", [(8, 64), (3, 5, 64), (2, 2, 3, 64)])
def test_each_token_of_a_linear_layer_has_its_scale(shape):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 16).eval(), tokens_of_all_sizes(*shape)
    result = zp.quantize(model, (x,), quantizer=dynamic())
    assert targets(result.model).count(ops.CHOOSE_QPARAMS_PER_TOKEN_ASYMMETRIC) == 1
    assert ops.CHOOSE_QPARAMS not in targets(result.model)
    assert result.delegates == 1
    assert result.runtime_sqnr_db > 100
    for row, reference in zip(result.model(x), model(x), strict=True):
        assert sqnr_db(reference, row) > 30


def test_readers_of_one_tensor_share_its_scales():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.query(x) * self.key(x)

    torch.manual_seed(0)
    result = zp.quantize(Heads().eval(), (tokens_of_all_sizes(8, 64),), quantizer=dynamic())
    assert targets(result.model).count(ops.QUANTIZE_PER_TOKEN) == 1
    assert result.runtime_sqnr_db > 100


def test_one_vector_has_one_scale():
    model = nn.Linear(64, 16).eval()
    result = zp.quantize(model, (torch.randn(64),), quantizer=dynamic(), verify=False)
    assert targets(result.model).count(ops.CHOOSE_QPARAMS) == 1


def test_a_convolution_has_one_scale():
    module, inputs = models.conv_relu()
    result = zp.quantize(module, inputs, quantizer=dynamic())
    assert targets(result.model).count(ops.CHOOSE_QPARAMS) == 1
    assert result.runtime_sqnr_db > 60


def test_a_table_that_stays_float_says_how_it_would_not():
    module = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 8)).eval()
    inputs = (torch.randint(0, 500, (2, 7)),)
    result = zp.quantize(module, inputs, quantizer=dynamic(), verify=False)
    (row,) = (row for row in result.coverage if not row.is_quantized)
    assert row.reason.endswith("EmbeddingQuantizer, composed with this quantizer, keeps it in bytes")
    assert "on the example inputs" in str(result)
    smaller = zp.quantize(
        module, inputs, quantizer=zp.ComposableQuantizer([dynamic(), zp.EmbeddingQuantizer()]), verify=False
    )
    assert 500 * 64 * 2 < len(result.pte) < 500 * 64 * 2.3  # float16
    assert len(smaller.pte) < len(result.pte) - 500 * 64 * 0.8  # int8, and a scale for each row


def test_a_static_configuration_without_data_is_refused_where_it_measures():
    module, inputs = models.mlp()
    with pytest.raises(CalibrationError, match=r"measures activations, and there is no calibration_data. Give batches"):
        zp.quantize(module, inputs)


def test_weights_alone_need_no_data():
    module, inputs = models.mlp()
    config = zp.QuantizationConfig(None, None, DYNAMIC.weight, None)
    result = zp.quantize(module, inputs, quantizer=xnnpack.XNNPACKQuantizer().set_global(config))
    assert "no calibration data" in str(result)
    assert result.runtime_sqnr_db > 60


def test_calibration_data_that_is_given_is_still_used_to_compare():
    module, inputs = models.mlp()
    result = zp.quantize(module, inputs, [inputs], quantizer=dynamic())
    assert result.verification.batches == 1
    assert "calibrate" in result.stages_s
