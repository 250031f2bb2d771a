"""``check_backend`` before and after calibration, against the nodes that lowering really gives."""

import json

import models
import pytest
import torch
from quantizers import ByHand, activation, annotate
from torch import nn

import zeropoint as zp
from tests.backends.xnn_graph import delegates, integer_kinds
from zeropoint.backends.xnnpack import (
    XNNPACKQuantizer,
    get_default_quantization_config,
    get_symmetric_quantization_config,
    lower,
)
from zeropoint.core.errors import CaptureError, LoweringError, NonFiniteError, SpecError


def quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_default_quantization_config())


class Gelu(nn.Module):
    """A linear layer, an activation that the delegate computes in float, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


def every_operator() -> ByHand:
    """Returns a quantizer that annotates an operator which the delegate has no integer kernel for, as well."""

    def annotated(model):
        annotate(models.find(model, "gelu"), {"self": activation()}, activation())
        quantizer().annotate(model)

    return ByHand(annotated)


@pytest.fixture(scope="module")
def gelu():
    torch.manual_seed(0)
    return Gelu().eval(), (torch.randn(2, 8),)


def test_as_meant():
    module, inputs = models.net()
    found = zp.check_backend(module, quantizer(), inputs)
    assert found.is_as_meant
    assert not found.islands
    assert [str(each) for each in (*found.inputs, *found.outputs)] == [
        "x float32, quantized to int8", "output 0 float32, dequantized from int8",
    ]  # fmt: skip
    assert "not calibrated" in str(found)


def test_integer_operators_are_those_of_the_file(gelu):
    module, inputs = gelu
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    prepared(*inputs)
    converted = zp.convert_pt2e(prepared)
    found = zp.check_backend(converted)
    kinds = [kind for each in delegates(lower(converted, inputs)) for kind in integer_kinds(each.nodes)]
    assert found.integer == len(kinds) == 2
    assert found.is_as_meant
    (island,) = found.islands
    assert (island.nodes, island.dequantized, island.quantized) == (("gelu",), 1, 1)
    assert found.ranges_are_known


def test_what_a_quantizer_wants_and_the_delegate_does_not_do(gelu):
    module, inputs = gelu
    found = zp.check_backend(module, every_operator(), inputs)
    (finding,) = found.unfolded
    assert (finding.node, finding.operator) == ("gelu", "gelu")
    assert "in float" in finding.what
    assert not found.is_as_meant
    with pytest.raises(LoweringError, match=r"1 operators are not computed as meant:\n  gelu \(gelu\)"):
        found.require()
    data = json.loads(json.dumps(found.as_dict()))
    assert data["unfolded"][0]["node"] == "gelu"
    assert data["is_as_meant"] is False


def test_integers_without_kernels_are_refused_before_calibration():
    module, inputs = models.net()
    narrow = get_symmetric_quantization_config(is_per_channel=True, act_qmin=-64, act_qmax=63)
    found = zp.check_backend(module, XNNPACKQuantizer().set_global(narrow), inputs)
    assert found.refused
    assert "int8 in [-64, 63]" in str(found)


def test_a_prepared_model_is_left_as_it_was(gelu):
    module, inputs = gelu
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    assert zp.check_backend(prepared).is_as_meant
    with pytest.raises(zp.ZeropointError, match="no data"):
        zp.convert_pt2e(prepared)


def test_activations_at_run_time(gelu):
    module, inputs = gelu
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    found = zp.check_backend(module, XNNPACKQuantizer().set_global(config), inputs)
    assert (found.is_as_meant, found.integer) == (True, 2)
    assert [str(each) for each in found.inputs] == ["x float32"] or "quantized" in str(found.inputs[0])


def test_what_cannot_be_checked(gelu):
    module, inputs = gelu
    with pytest.raises(SpecError, match="backend='npu' is unknown"):
        zp.check_backend(module, quantizer(), inputs, backend="npu")
    with pytest.raises(SpecError, match="the model is float"):
        zp.check_backend(module, None, inputs)
    with pytest.raises(CaptureError, match="Gelu is not exported"):
        zp.check_backend(module, quantizer())


def test_an_exported_program_that_is_quantized(gelu):
    module, inputs = gelu
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    prepared(*inputs)
    program = torch.export.export(zp.convert_pt2e(prepared), inputs)
    assert zp.check_backend(program).integer == 2
    with pytest.raises(SpecError, match="the model is quantized already"):
        zp.check_backend(program, quantizer())


def test_a_model_that_holds_nan_is_no_model_without_data(gelu):
    module, inputs = gelu
    prepared = zp.prepare_pt2e(torch.export.export(module, inputs).module(), quantizer())
    prepared(*inputs)
    with torch.no_grad():
        next(parameter for parameter in prepared.parameters() if parameter.dim() == 2)[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN in this constant"):
        zp.check_backend(prepared)
