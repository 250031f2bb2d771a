"""torchao's steps around batch norm by their names: they can be called one by one, on an annotated graph."""

import models
import qat_quantizers
import torch
from torch import nn

from zeropoint.graph.batch_norms import BATCH_NORMS
from zeropoint.pt2e import qat_utils


def annotated():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())
    torch.manual_seed(0)
    models.randomize_norms(module)
    x = torch.randn(2, 3, 6, 6)
    model = torch.export.export(module.train(), (x,)).module()
    qat_quantizers.qat(model)
    return module, model, x


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


def test_a_fused_layer_trains_the_weight_that_it_folds_to():
    module, model, x = annotated()
    (norm,) = norms(model)
    assert norm.args[0].target is torch.ops.aten.conv2d.default
    fused = qat_utils._fuse_conv_bn_qat(model)
    assert norms(fused)[0].args[0].target is torch.ops.aten.add.Tensor
    torch.manual_seed(1)
    result = fused(x)
    torch.manual_seed(1)
    assert torch.allclose(result, module(x), atol=1e-5)


def test_what_was_fused_is_folded_into_the_layer():
    module, model, x = annotated()
    folded = qat_utils._fold_conv_bn_qat(qat_utils._fuse_conv_bn_qat(model))
    assert not norms(folded)
    assert torch.allclose(folded(x), module.eval()(x), atol=1e-5)
