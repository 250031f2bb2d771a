"""Every condition of the XNNPACK table refuses its counter-examples, in a sentence with the value at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.examples import PICTURE, ROWS, Branches, Example
from tests.backends.xnn_graph import operators_outside
from zeropoint.backends.xnnpack import XNNPACKQuantizer, conditions, get_symmetric_quantization_config, lower_float
from zeropoint.backends.xnnpack.conditions import IN_FLOAT, NEEDS_CONSTANT, OUTSIDE
from zeropoint.backends.xnnpack.table import FLOAT_ONLY, TABLE
from zeropoint.core.configs import QuantizationConfig
from zeropoint.report.coverage import CoverageRow
from zeropoint.report.record import record_of
from zeropoint.workflow import prepare_pt2e

c = conditions
aten = torch.ops.aten
STATIC = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
DYNAMIC_PER_TENSOR = get_symmetric_quantization_config(is_dynamic=True)
CLIP = (3, 4, 5, 5)


@dataclass
class Refused:
    """A function whose last operator of this name stays float, by a condition, for a reason with these words."""

    condition: Callable[..., Any] | None
    operator: str
    words: str
    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[nn.Module, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return getattr(self.condition, "__name__", self.operator)

    def example(self) -> Example:
        return Example("", (), self.function, self.shapes, self.layers, self.constants)


ANCHOR = Refused(None, "linear", "", lambda m, x: m(x), (ROWS,), (nn.Linear(8, 6),))
"""Something to be quantized: a model in which nothing is would be an error."""

REFUSED_STATIC = (
    Refused(
        c.weight_is_constant, "linear", "its weight inputs_1 is computed at run time", lambda x, w: F.linear(x, w),
        (ROWS, (6, 8)),
    ),
    Refused(
        c.bias_is_constant, "linear", "its bias inputs_3 is not a parameter but computed",
        lambda w, x, b: F.linear(x, w, b), (ROWS, (6,)), constants=(torch.randn(6, 8),),
    ),
    Refused(
        c.has_a_batch, "conv2d", "its input has 3 dimensions, no batch; the kernel has 4",
        lambda m, x: m(x), ((4, 7, 7),), (nn.Conv2d(4, 6, 3),),
    ),
    Refused(
        c.one_group_or_per_tensor, "conv_transpose2d",
        "groups=2; per-channel weights of a transposed convolution have a kernel for groups=1 only",
        lambda m, x: m(x), (PICTURE,), (nn.ConvTranspose2d(4, 6, 3, groups=2),),
    ),
    Refused(
        c.alpha_is_one, "add", "alpha=2; the kernel has alpha=1 only", lambda x, y: torch.add(x, y, alpha=2),
        (ROWS, ROWS),
    ),
    Refused(
        c.alpha_is_one, "sub", "alpha=0.5; the kernel has alpha=1 only", lambda x, y: torch.sub(x, y, alpha=0.5),
        (ROWS, ROWS),
    ),
    Refused(c.both_are_tensors, "add", "other=1e+20 is a number, not a tensor", lambda x: x + 1e20, (ROWS,)),
    Refused(
        c.both_are_tensors, "mul", "sum_1 has no dimensions; the kernel needs at least one",
        lambda x: x * x.sum(), (ROWS,),
    ),
    Refused(
        c.not_a_mask, "add", "is computed from integers or booleans only: a mask or a position, not data",
        lambda table, ids: F.embedding(ids, table) + (ids > 1).unsqueeze(-1).float(), ((2, 5),),
        constants=(torch.randn(4, 8),), dtype=torch.int64,
    ),
    Refused(
        c.not_a_mask, "mul", "is computed from integers or booleans only: a mask or a position, not data",
        lambda table, ids: (1.0 - (ids > 1).float()) * -10000.0, ((2, 5),),
        constants=(torch.randn(4, 8),), dtype=torch.int64,
    ),
    Refused(
        c.not_a_mask, "add", "holds values up to inf: a mask, not data", lambda mask, x: x + mask, (ROWS,),
        constants=(torch.full((8,), -torch.inf),),
    ),
    Refused(
        c.not_a_mask, "add", "holds values up to 1e+04: a mask, not data", lambda mask, x: x + mask, (ROWS,),
        constants=(torch.tensor([0.0, -1e4] * 4),),
    ),
    Refused(
        c.not_a_mask, "mul", "holds values up to 3.4e+38: a mask, not data", lambda mask, x: x * mask, (ROWS,),
        constants=(torch.full((8,), torch.finfo(torch.float32).min),),
    ),
    *(
        Refused(
            c.not_attention_scores, name,
            "a softmax reads it: attention scores and their masks have no useful common scale", function, (PICTURE,),
        )
        for name, function in (
            ("add", lambda x: (x + x.exp()).softmax(-1)),
            ("sub", lambda x: (x - x.exp()).view(8, 7, 7).softmax(-1)),
            ("mul", lambda x: F.log_softmax((x * x).transpose(2, 3), -1)),
        )
    ),
    Refused(
        c.two_different_tensors, "cat", "it concatenates one tensor; the kernel takes two different ones and more",
        lambda x: torch.cat([x, x]), (ROWS,),
    ),
    Refused(
        c.pool_has_a_kernel, "max_pool2d", "its input has 3 dimensions; the kernel takes 4",
        lambda x: F.max_pool2d(x * x, 2), (CLIP[1:],),
    ),
    Refused(
        c.pool_has_a_kernel, "max_pool2d", "stride=[3, 3] is larger than kernel_size=[2, 2]",
        lambda x: F.max_pool2d(x * x, 2, 3), (PICTURE,),
    ),
    Refused(
        c.mean_of_each_picture, "mean", "dim=[1] of 4 dimensions; the kernel averages dim=(2, 3) of 4",
        lambda x: (x * x).mean(1), (PICTURE,),
    ),
    Refused(
        c.mean_of_each_picture, "mean", "dtype=torch.float32; the kernel takes no dtype",
        lambda x: (x * x).mean((2, 3), dtype=torch.float32), (PICTURE,),
    ),
    Refused(
        c.output_is_one_pixel, "adaptive_avg_pool2d", "output_size=[2, 2]; the kernel has [1, 1] only",
        lambda x: F.adaptive_avg_pool2d(x * x, 2), (PICTURE,),
    ),
    Refused(
        c.output_is_one_pixel, "adaptive_avg_pool2d", "its input has 3 dimensions; the kernel takes 4",
        lambda x: F.adaptive_avg_pool2d(x * x, 1), (CLIP[1:],),
    ),
    Refused(
        c.at_most_six_dimensions, "view", "its output has 7 dimensions; the delegate takes 6",
        lambda x: (x * x).view(2, 1, 4, 1, 7, 1, 7), (PICTURE,),
    ),
    Refused(
        c.slice_has_a_kernel, "slice", "step=2; the kernel has step=1 only", lambda x: (x * x)[:, ::2], (ROWS,)
    ),
    Refused(
        c.pads_space_with_zero, "pad", "only as zero padding right before a convolution",
        lambda m, x: m(F.pad(x, (1, 1), value=1.0)), (PICTURE,), (nn.Conv2d(4, 6, 3),),
    ),
    Refused(
        c.pads_space_with_zero, "pad", "only as zero padding right before a convolution",
        lambda m, x: m(F.pad(x, (1, 1, 1, 1), "reflect")), (PICTURE,), (nn.Conv2d(4, 6, 3),),
    ),
    Refused(
        c.pads_space_with_zero, "pad", "only as zero padding right before a convolution",
        lambda m, x: m(F.pad(x, (0, 0, 0, 0, 0, 1))), (PICTURE,), (nn.Conv2d(5, 6, 3),),
    ),
    Refused(
        None, "pad", "right before a convolution that alone reads it",
        lambda a, b, x: (lambda p: a(p) + b(p))(F.pad(x, (1, 1))), (PICTURE,), (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)),
    ),
    Refused(None, "relu", "is float: quantizing here would only add conversions", lambda x: F.relu(x), (ROWS,)),
    Refused(None, "add", "it returns torch.int64; only float32 arithmetic", lambda x: x.long() + 1, (ROWS,)),
    Refused(None, "mul", "it returns torch.float64; only float32 arithmetic", lambda x: x.double() * 2, (ROWS,)),
    Refused(None, "mul", "is torch.bool, not float32", lambda x: x * (x > 0), (ROWS,)),
)  # fmt: skip

REFUSED_DYNAMIC = (
    Refused(
        c.two_dimensional, "conv1d", "1d; convolution of activations quantized at run time has a 2d kernel only",
        lambda m, x: m(x), ((2, 4, 9),), (nn.Conv1d(4, 6, 3),),
    ),
    Refused(
        c.not_depthwise, "conv2d", "groups=4, depthwise; activations quantized at run time have no such kernel",
        lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 4, 3, groups=4),),
    ),
    Refused(
        None, "add", "activations quantized at run time: the backend has no such kernel for this operator",
        lambda x, y: x + y, (ROWS, ROWS),
    ),
)  # fmt: skip

REFUSED_PER_TENSOR = (
    Refused(
        c.per_channel, "linear", "activations quantized at run time have a kernel for per-channel weights only",
        lambda m, x: m(x), (ROWS,), (nn.Linear(8, 6),),
    ),
)  # fmt: skip

REFUSED_WITH_FREE_SIZES = (
    Refused(
        c.pool_has_a_kernel, "max_pool2d", "ceil_mode=True with a free size has no kernel",
        lambda x: F.max_pool2d(x * x, 2, 2, ceil_mode=True), (PICTURE,),
    ),
    Refused(
        c.at_most_six_dimensions, "permute", "2 of its sizes are free; the delegate takes one",
        lambda x: (x * x).permute(1, 0, 2, 3), (PICTURE,),
    ),
    *(
        Refused(
            c.batch_is_known, name, "its batch is free; the integer kernel is right for a known batch only", function,
            (PICTURE,),
        )
        for name, function in (
            ("mean", lambda x: (x * x).mean((2, 3))),
            ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x * x, 1)),
        )
    ),
    Refused(
        c.pads_space_with_zero, "pad", "its amounts are computed from a free size; a convolution takes numbers along",
        lambda m, x: m(F.pad(x, (0, 0, 0, -x.shape[2] % 8))), (PICTURE,), (nn.Conv2d(4, 6, 3),),
    ),
    Refused(
        c.slice_has_a_kernel, "narrow", "its input has a free size; the kernel slices known sizes only",
        lambda x: torch.ops.aten.narrow(x * x, 1, 1, 2), (PICTURE,),
    ),
)  # fmt: skip

UNSPELLED = (
    Refused(
        c.mean_of_each_picture, "mean", "keepdim=False; the kernel has keepdim=True only",
        lambda x: (x * x).mean((2, 3)), (PICTURE,),
    ),
)  # fmt: skip
"""For a quantizer of other origin that uses the table, without the spelling that comes before annotation."""

EVERY = (*REFUSED_STATIC, *REFUSED_DYNAMIC, *REFUSED_PER_TENSOR, *REFUSED_WITH_FREE_SIZES, *UNSPELLED)


def exported(cases: tuple[Refused, ...], dynamic_shapes: Any = None):
    examples = tuple(case.example() for case in cases)
    inputs = tuple(torch.ones(shape, dtype=case.dtype) for case in cases for shape in case.shapes)
    with torch.no_grad():
        return torch.export.export(Branches(examples).eval(), inputs, dynamic_shapes=dynamic_shapes).module()


def rows_of(cases: tuple[Refused, ...], config: QuantizationConfig, dynamic_shapes: Any = None) -> list[CoverageRow]:
    model = exported(cases, dynamic_shapes)
    return list(record_of(prepare_pt2e(model, XNNPACKQuantizer().set_global(config))).coverage)


def check(rows: list[CoverageRow], cases: tuple[Refused, ...], index: int) -> None:
    case = cases[index]
    own = [row for row in rows if row.module.split(".")[0] == f"example{index}" and row.operator == case.operator]
    assert own
    assert case.words in own[-1].reason
    assert not own[-1].is_quantized


def parametrize(cases: tuple[Refused, ...]) -> Any:
    return pytest.mark.parametrize("index", range(len(cases)), ids=[str(case) for case in cases])


@pytest.fixture(scope="module")
def static() -> list[CoverageRow]:
    return rows_of((*REFUSED_STATIC, ANCHOR), STATIC)


@pytest.fixture(scope="module")
def dynamic() -> list[CoverageRow]:
    return rows_of((*REFUSED_DYNAMIC, ANCHOR), DYNAMIC)


@pytest.fixture(scope="module")
def free() -> list[CoverageRow]:
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    return rows_of(REFUSED_WITH_FREE_SIZES, STATIC, ((free,) * len(REFUSED_WITH_FREE_SIZES),))


@parametrize(REFUSED_STATIC)
def test_refused(static: list[CoverageRow], index: int):
    check(static, REFUSED_STATIC, index)


@parametrize(REFUSED_DYNAMIC)
def test_refused_with_activations_quantized_at_run_time(dynamic: list[CoverageRow], index: int):
    check(dynamic, REFUSED_DYNAMIC, index)


@parametrize(REFUSED_WITH_FREE_SIZES)
def test_refused_with_free_sizes(free: list[CoverageRow], index: int):
    check(free, REFUSED_WITH_FREE_SIZES, index)


def test_refused_per_tensor_at_run_time():
    quantizer = XNNPACKQuantizer().set_global(STATIC).set_module_name("example0", DYNAMIC_PER_TENSOR)
    model = exported((*REFUSED_PER_TENSOR, ANCHOR))
    check(list(record_of(prepare_pt2e(model, quantizer)).coverage), REFUSED_PER_TENSOR, 0)


def test_refused_where_spelling_did_not_run():
    class Unspelled(XNNPACKQuantizer):
        def transform_for_annotation(self, model):
            return model

    model = exported((*UNSPELLED, ANCHOR))
    rows = record_of(prepare_pt2e(model, Unspelled().set_global(STATIC))).coverage
    check(list(rows), UNSPELLED, 0)


def test_every_condition_has_a_counter_example():
    used = {f for p in TABLE.patterns for f in (*p.when, *p.before_when, *(p.dynamic or ()))}
    shown = {case.condition for case in EVERY if case.condition is not None}
    assert {f.__name__ for f in used} == {f.__name__ for f in shown}
    assert {f for f in used if f.__module__ != conditions.__name__} == set()


def test_float_only_operators_have_no_row():
    heads = {operator for pattern in TABLE.patterns for operator in pattern.chain[0]}
    assert heads & {operator for operators, _ in FLOAT_ONLY for operator in operators} == set()


def float_cases(reason: str, cases: tuple[tuple[str, Callable[..., torch.Tensor]], ...]) -> tuple[Refused, ...]:
    return tuple(Refused(None, name, reason, function, (PICTURE,)) for name, function in cases)


INSIDE = float_cases(
    IN_FLOAT,
    (
        ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("softmax", lambda x: x.softmax(-1)), ("gelu", F.gelu),
        ("hardswish", F.hardswish), ("div", lambda x: x / x.exp()), ("silu", F.silu), ("exp", torch.exp),
        ("leaky_relu", F.leaky_relu), ("pow", lambda x: x.pow(2)), ("softmax", lambda x: x.softmax(3)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3))), ("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 1, (0, 1))),
        ("upsample_bilinear2d", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    ),
) + float_cases(NEEDS_CONSTANT, (("matmul", lambda x: x @ x),))  # fmt: skip
LEFT_OUTSIDE = float_cases(
    OUTSIDE,
    (
        ("elu", F.elu), ("layer_norm", lambda x: F.layer_norm(x, (7,))), ("sum", lambda x: x.sum(1)),
        ("select", lambda x: x[:, 0].clone()), ("upsample_nearest2d", lambda x: F.interpolate(x, scale_factor=2)),
        ("mul", lambda x: aten.mul.Scalar(x, 2.0)), ("add", lambda x: aten.add.Scalar(x, 2.0)),
        ("sub", lambda x: aten.sub.Scalar(x, 2.0)), ("div", lambda x: aten.div.Scalar(x, 2.0)),
        ("reciprocal", torch.reciprocal),
    ),
) + tuple(
    Refused(None, name, f"{words}. The portable float kernel computes it", function, (PICTURE,))
    for name, words, function in (
        ("softmax", "dim=1 of 4 dimensions; the delegate takes the last only", lambda x: x.softmax(1)),
        ("softmax", "dim=-2 of 4 dimensions; the delegate takes the last only", lambda x: x.softmax(-2)),
        ("pow", "exponent=0.5; the delegate takes the integer 2 only", lambda x: x.pow(0.5)),
        ("pow", "exponent=2.0; the delegate takes the integer 2 only", lambda x: x.pow(2.0)),
        ("pow", "exponent=3; the delegate takes the integer 2 only", lambda x: x.pow(3)),
        (
            "avg_pool2d", "ceil_mode=True; the delegate takes ceil_mode=False only, in float",
            lambda x: F.avg_pool2d(x, 2, 2, 0, True, False),
        ),
        (
            "avg_pool2d", "divisor_override=3; the delegate takes divisor_override=None only, in float",
            lambda x: F.avg_pool2d(x, 2, 2, 0, False, False, 3),
        ),
    )
)  # fmt: skip
NO_KERNEL = (
    Refused(
        None, "conv3d", "no three-dimensional convolution", lambda m, x: m(x), ((1, 2, 4, 4, 4),), (nn.Conv3d(2, 2, 3),)
    ),
    Refused(
        None,
        "matmul",
        "is its left factor; a linear layer has it on the right only. In float only",
        lambda w, x: w @ x,
        (ROWS,),
        constants=(torch.randn(4, ROWS[0]),),
    ),
    Refused(
        None,
        "addmm",
        "alpha=2, beta=0.5; a linear layer has alpha=1, beta=1 only. In float only",
        lambda b, w, x: torch.addmm(b, x, w, alpha=2, beta=0.5),
        (ROWS,),
        constants=(torch.randn(6), torch.randn(8, 6)),
    ),
    Refused(None, "cos", "XNNPACK has no integer kernel for this operator", torch.cos, (ROWS,)),
)
FREE = (
    Refused(
        None,
        "upsample_bilinear2d",
        "1 of its sizes are free. The portable float kernel computes it",
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (PICTURE,),
    ),
    Refused(
        None,
        "pixel_shuffle",
        "1 of its sizes are free. The portable float kernel computes it",
        lambda x: F.pixel_shuffle(x, 2),
        (PICTURE,),
    ),
)
FLOAT = (*INSIDE, *LEFT_OUTSIDE, *NO_KERNEL)


@pytest.fixture(scope="module")
def in_float() -> list[CoverageRow]:
    return rows_of((*FLOAT, ANCHOR), STATIC)


@parametrize(FLOAT)
def test_operator_without_an_integer_kernel(in_float: list[CoverageRow], index: int):
    check(in_float, FLOAT, index)


def test_operator_that_needs_known_sizes():
    free = {0: torch.export.Dim.DYNAMIC}
    rows = rows_of((*FREE, ANCHOR), STATIC, ((*[free] * len(FREE), None),))
    for index in range(len(FREE)):
        check(rows, FREE, index)


def test_in_float_means_inside_the_delegate():
    lowered = lower_float(exported(INSIDE), tuple(torch.randn(PICTURE) for _ in INSIDE))
    assert (lowered.delegates, lowered.outside) == (1, ())


def test_outside_means_outside():
    lowered = lower_float(exported(LEFT_OUTSIDE), tuple(torch.randn(PICTURE) for _ in LEFT_OUTSIDE))
    outside = Counter(kernel.partition("::")[2].partition(".")[0] for kernel in operators_outside(lowered.pte))
    expected = Counter(case.operator for case in LEFT_OUTSIDE)
    names = {"layer_norm": "native_layer_norm", "softmax": "_softmax", "select": "select_copy"}
    for operator, count in expected.items():
        assert outside[names.get(operator, operator)] == count, outside
