"""The operators that the XNNPACK delegate of ExecuTorch 1.4 computes in int8, and under which conditions.

Source of each row and condition: ``executorch/backends/xnnpack/partition/config/{gemm,generic_node}_configs.py``, and
running the row's examples and counter-examples (tests/backends: test_xnnpack_rows.py, test_xnnpack_refusals.py).
"""

from __future__ import annotations

import torch

from zeropoint.annotate.patterns import ACT, BIAS, FOLLOW, SHARED, Pattern, Table, Weight
from zeropoint.backends.xnnpack import conditions as c
from zeropoint.graph.layers import CLAMPS, LINEAR, PADS, VIEWS
from zeropoint.numerics.granularity import PerToken

aten = torch.ops.aten

CONV = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
CONV_TRANSPOSE = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)
CONV3D = (aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input)
RELU = (aten.relu.default, aten.relu_.default)
CLAMP = (*CLAMPS, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
ADD = (aten.add.Tensor, aten.add_.Tensor)
SUB = (aten.sub.Tensor, aten.sub_.Tensor)
MUL = (aten.mul.Tensor, aten.mul_.Tensor)
CAT = (aten.cat.default,)
MAX_POOL = (aten.max_pool2d.default,)
MEAN = (aten.mean.dim,)
GLOBAL_POOL = (aten.adaptive_avg_pool2d.default,)
PERMUTE = (aten.permute.default, aten.transpose.int, aten.t.default)
SLICE = (aten.slice.Tensor, aten.narrow.default)

GEMM = {"input": ACT, "weight": Weight(axis=0), "bias": BIAS}
TRANSPOSED_GEMM = {"input": ACT, "weight": Weight(axis=1), "bias": BIAS}
TWO = {"self": ACT, "other": ACT}

PATTERNS = (
    Pattern(
        "linear", (LINEAR, CLAMPS), GEMM, when=(c.weight_is_constant, c.bias_is_constant),
        dynamic=(c.per_channel,), dynamic_granularity=PerToken(),
    ),
    Pattern(
        "conv", (CONV, CLAMPS), GEMM, when=(c.weight_is_constant, c.bias_is_constant, c.has_a_batch),
        before=PADS, before_when=(c.pads_space_with_zero,), dynamic=(c.per_channel, c.two_dimensional, c.not_depthwise),
    ),
    Pattern(
        "conv_transpose", (CONV_TRANSPOSE, CLAMPS), TRANSPOSED_GEMM,
        when=(c.weight_is_constant, c.bias_is_constant, c.has_a_batch, c.one_group_or_per_tensor),
    ),
    Pattern("add", (ADD, RELU), TWO, when=(c.both_are_tensors, c.alpha_is_one, c.not_a_mask, c.not_attention_scores)),
    Pattern("sub", (SUB,), TWO, when=(c.both_are_tensors, c.alpha_is_one, c.not_a_mask, c.not_attention_scores)),
    Pattern("mul", (MUL,), TWO, when=(c.both_are_tensors, c.not_a_mask, c.not_attention_scores)),
    Pattern("cat", (CAT,), {"tensors": SHARED}, output=SHARED, when=(c.two_different_tensors,)),
    Pattern("max_pool2d", (MAX_POOL,), {"self": FOLLOW}, output=SHARED, when=(c.pool_has_a_kernel,)),
    Pattern("mean", (MEAN,), {"self": FOLLOW}, when=(c.mean_of_each_picture, c.batch_is_known)),
    Pattern(
        "adaptive_avg_pool2d", (GLOBAL_POOL,), {"self": FOLLOW}, when=(c.output_is_one_pixel, c.batch_is_known)
    ),
    Pattern("clamp", (CLAMP,), {"self": FOLLOW}, output=SHARED),
    Pattern("view", (VIEWS,), {"self": FOLLOW}, output=SHARED, when=(c.at_most_six_dimensions,)),
    Pattern("permute", (PERMUTE,), {"self": FOLLOW}, output=SHARED, when=(c.at_most_six_dimensions,)),
    Pattern("slice", (SLICE,), {"self": FOLLOW}, output=SHARED, when=(c.slice_has_a_kernel,)),
)  # fmt: skip

FLOAT_ONLY = (
    (
        (
            aten.sigmoid.default, aten.tanh.default, aten.gelu.default, aten.leaky_relu.default,
            aten.leaky_relu_.default, aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default,
            aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.div.Tensor,
            aten.prelu.default, aten.abs.default, aten.neg.default, aten.square.default,
            aten.batch_norm.default, aten.silu.default, aten.silu_.default,
            aten.minimum.default, aten.maximum.default, aten.stack.default,
        ),
        c.IN_FLOAT,
    ),
    ((aten.softmax.int, aten._softmax.default), c.softmax_in_float),
    ((aten.upsample_bilinear2d.vec, aten.pixel_shuffle.default), c.known_sizes_in_float),
    ((aten.pow.Tensor_Scalar,), c.power_in_float),
    ((aten.avg_pool2d.default,), c.average_in_float),
    ((aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default), c.product_in_float),
    (PADS, c.padding_in_float),
    ((aten.embedding.default,), c.OF_A_TABLE),
    (CONV3D, "the XNNPACK delegate has no three-dimensional convolution"),
    (
        (
            aten.elu.default, aten.selu.default, aten.softplus.default, aten.layer_norm.default,
            aten.group_norm.default, aten.sum.dim_IntList,
            aten.amax.default, aten.max_pool1d.default, aten.upsample_nearest2d.vec, aten.split.Tensor,
            aten.chunk.default, aten.select.int, aten.unbind.int, aten.expand.default, aten.repeat.default,
            aten.native_layer_norm.default, aten.log_softmax.int,
            aten.mul.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.div.Scalar, aten.reciprocal.default,
        ),
        c.OUTSIDE,
    ),
)  # fmt: skip

TABLE = Table("XNNPACK", PATTERNS, FLOAT_ONLY)
