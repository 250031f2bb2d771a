"""torchao's lowering to Inductor on x86 takes our converted graphs as it takes torchao's own."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import quantize_pt2e as theirs

    from zeropoint.pt2e import quantize_pt2e as ours
    from zeropoint.pt2e.lowering import lower_pt2e_quantized_to_x86
    from zeropoint.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # Of Inductor.


def lowered(package, model, inputs):
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(reduce_range=False))
    with torch.no_grad():
        prepared = package.prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        prepared(*inputs)
        return lower_pt2e_quantized_to_x86(package.convert_pt2e(prepared), inputs)


def operators(model):
    return [str(node.target) for node in model.graph.nodes if node.op == "call_function"]


def test_it_fuses_the_same_kernels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(4)).eval()
    inputs = (torch.randn(2, 3, 16, 16),)
    one, other = lowered(ours, model, inputs), lowered(theirs, model, inputs)
    assert operators(one) == operators(other)
    assert sum("onednn.qconv" in name and "prepack" not in name for name in operators(one)) == 2
    torch.testing.assert_close(one(*inputs), other(*inputs), rtol=0, atol=1e-3)
    torch.testing.assert_close(one(*inputs), model(*inputs), rtol=0, atol=0.02)
