"""One example for every operator of the XNNPACK table: a small function that the delegate computes in integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten

PICTURE, ROWS, SEQUENCE = (2, 4, 7, 7), (5, 8), (2, 3, 6, 8)


@dataclass
class Example:
    """A function of inputs of the given shapes, an instance of a row of the table by the operators that it shows."""

    row: str
    operators: tuple[Any, ...]
    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[nn.Module, ...] = ()
    constants: tuple[torch.Tensor, ...] = field(default=())

    def __str__(self) -> str:
        names = (str(operator).removeprefix("aten.").removesuffix(".default") for operator in self.operators)
        return f"{self.row}-{'+'.join(names)}"


class Branch(nn.Module):
    """An example as a module."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.function = example.function
        self.layers = nn.ModuleList(example.layers)
        for i, constant in enumerate(example.constants):
            self.register_buffer(f"constant{i}", constant)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*self.layers, *self._buffers.values(), *inputs)


class Branches(nn.Module):
    """Examples side by side: the inputs of all, one output of each."""

    def __init__(self, examples: tuple[Example, ...]) -> None:
        super().__init__()
        self.counts = [len(example.shapes) for example in examples]
        for i, example in enumerate(examples):
            setattr(self, f"example{i}", Branch(example))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, position = [], 0
        for i, count in enumerate(self.counts):
            outputs.append(getattr(self, f"example{i}")(*inputs[position : position + count]))
            position += count
        return tuple(outputs)


def inputs_of(examples: tuple[Example, ...], factor: float = 1.0) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape) * factor for example in examples for shape in example.shapes)


def gemm(row: str, operator: Any, layer: Callable[..., nn.Module], *shapes: tuple[int, ...]) -> list[Example]:
    """A layer alone, and with each activation that is fused into it, by name and in place."""
    fused = {
        aten.relu.default: F.relu,
        aten.relu_.default: F.relu_,
        aten.relu6.default: torch.ops.aten.relu6,
        aten.hardtanh.default: lambda x: F.hardtanh(x, -0.5, 0.7),
        aten.hardtanh_.default: lambda x: F.hardtanh_(x, -0.5, 0.7),
    }
    plain = Example(row, (operator,), lambda m, x: m(x), shapes, (layer(),))
    return [plain] + [
        Example(row, (operator, target), lambda m, x, f=function: f(m(x)), shapes, (layer(),))
        for target, function in fused.items()
    ]


def after_mul(operator: Any, function: Callable[..., torch.Tensor], *shapes: tuple[int, ...], row: str) -> Example:
    """An operator that is computed in integers where its input is quantized: here the output of a product."""
    return Example(row, (operator,), lambda x: function(x * x), shapes)


LAYERS = (
    *gemm("linear", aten.linear.default, lambda: nn.Linear(8, 6), ROWS),
    *gemm("conv", aten.conv2d.default, lambda: nn.Conv2d(4, 6, 3, 2, 1), PICTURE),
    *gemm("conv_transpose", aten.conv_transpose2d.input, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), PICTURE),
    Example("linear", (aten.linear.default,), lambda m, x: m(x), (SEQUENCE,), (nn.Linear(8, 6, bias=False),)),
    Example("linear", (aten.linear.default,), lambda m, x: m(x), ((8,),), (nn.Linear(8, 6),)),
    Example("linear", (aten.matmul.default,), lambda w, x: x @ w, ((2, 5, 8),), constants=(torch.randn(8, 6),)),
    Example("linear", (aten.mm.default,), lambda w, x: torch.mm(x, w), (ROWS,), constants=(torch.randn(8, 6),)),
    Example(
        "linear", (aten.addmm.default,), lambda w, b, x: torch.addmm(b, x, w), (ROWS,),
        constants=(torch.randn(8, 6), torch.randn(6)),
    ),
    Example("linear", (aten.clamp.default,), lambda m, x: m(x).clamp(0, 6), (ROWS,), (nn.Linear(8, 6),)),
    Example("linear", (aten.clamp.default,), lambda m, x: m(x).clamp(min=0), (ROWS,), (nn.Linear(8, 6),)),
    Example("conv", (aten.conv1d.default,), lambda m, x: m(x), ((2, 4, 9),), (nn.Conv1d(4, 6, 3, dilation=2),)),
    Example("conv", (aten.conv1d.padding,), lambda m, x: m(x), ((2, 4, 9),), (nn.Conv1d(4, 6, 3, padding="same"),)),
    Example("conv", (aten.conv2d.padding,), lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 6, 4, padding="same"),)),
    Example("conv", (aten.conv2d.padding,), lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 6, 3, padding="valid"),)),
    Example("conv", (aten.conv2d.default,), lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 4, 3, groups=4),)),
    Example("conv", (aten.conv2d.default,), lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 8, 3, groups=4),)),
    Example("conv", (aten.conv2d.default,), lambda m, x: m(x), (PICTURE,), (nn.Conv2d(4, 6, 3, groups=2, bias=False),)),
    Example("conv", (aten.pad.default,), lambda m, x: m(F.pad(x, (0, 1, 2, 1))), (PICTURE,), (nn.Conv2d(4, 6, 3, 2),)),
    Example(
        "conv", (aten.constant_pad_nd.default,), lambda m, x: m(torch.constant_pad_nd(x, (1, 0, 0, 1))), (PICTURE,),
        (nn.Conv2d(4, 4, 3, 2, groups=4),),
    ),
    Example(
        "conv_transpose", (aten.conv_transpose1d.default,), lambda m, x: m(x), ((2, 4, 9),),
        (nn.ConvTranspose1d(4, 6, 3),),
    ),
)  # fmt: skip

ARITHMETIC = (
    Example("add", (aten.add.Tensor,), lambda x, y: x + y, (PICTURE, (4, 1, 7))),
    Example("add", (aten.add.Tensor,), lambda x: x + x, (ROWS,)),
    Example("add", (aten.add.Tensor,), lambda c, x: x + c, (ROWS,), constants=(torch.randn(8),)),
    Example("add", (aten.add.Tensor,), lambda x: x + 1.5, (ROWS,)),
    Example("add", (aten.add_.Tensor,), lambda x, y: (x * x).add_(y), (ROWS, ROWS)),
    Example("add", (aten.add_.Tensor,), lambda x: (x * x).add_(0.25), (ROWS,)),
    Example("add", (aten.add.Tensor, aten.relu.default), lambda x, y: F.relu(x + y), (ROWS, ROWS)),
    Example("add", (aten.add.Tensor, aten.relu_.default), lambda x, y: F.relu_(x + y), (ROWS, ROWS)),
    Example("add", (aten.add.Tensor, aten.clamp.default), lambda x, y: (x + y).clamp(min=0), (ROWS, ROWS)),
    Example("sub", (aten.sub.Tensor,), lambda x, y: x - y, (PICTURE, (1, 4, 1, 1))),
    Example("sub", (aten.sub.Tensor,), lambda x: x - 1, (ROWS,)),
    Example("sub", (aten.sub_.Tensor,), lambda x, y: (x + x).sub_(y), (ROWS, ROWS)),
    Example("sub", (aten.sub_.Tensor,), lambda x: (x + x).sub_(0.5), (ROWS,)),
    Example("sub", (aten.rsub.Scalar,), lambda x: 1 - x, (ROWS,)),
    Example("sub", (aten.rsub.Tensor,), lambda x, y: torch.rsub(x, y), (ROWS, ROWS)),
    Example("mul", (aten.mul.Tensor,), lambda x, y: x * y, (PICTURE, (2, 4, 1, 1))),
    Example("mul", (aten.mul.Tensor,), lambda x: x * 0.3, (ROWS,)),
    Example("mul", (aten.mul_.Tensor,), lambda x, y: (x + x).mul_(y), (ROWS, ROWS)),
    Example("mul", (aten.mul_.Tensor,), lambda x: (x + x).mul_(-2), (ROWS,)),
    Example("cat", (aten.cat.default,), lambda x, y: torch.cat([x, y], -1), (ROWS, (5, 3))),
    Example(
        "cat", (aten.cat.default,), lambda c, *xs: torch.cat([*xs[:5], c, *xs[5:]], 1), ((2, 2),) * 7,
        constants=(torch.randn(2, 4),),
    ),
)  # fmt: skip

FOLLOWERS = (
    after_mul(aten.max_pool2d.default, lambda x: F.max_pool2d(x, 3, 2, 1), PICTURE, row="max_pool2d"),
    after_mul(aten.max_pool2d.default, lambda x: torch.max_pool2d(x, 2), PICTURE, row="max_pool2d"),
    after_mul(aten.max_pool2d.default, lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), PICTURE, row="max_pool2d"),
    after_mul(aten.mean.dim, lambda x: x.mean((2, 3), keepdim=True), PICTURE, row="mean"),
    after_mul(aten.mean.dim, lambda x: x.mean((-1, -2)), PICTURE, row="mean"),
    after_mul(
        aten.adaptive_avg_pool2d.default, lambda x: F.adaptive_avg_pool2d(x, 1), PICTURE, row="adaptive_avg_pool2d"
    ),
    after_mul(aten.relu.default, F.relu, ROWS, row="clamp"),
    after_mul(aten.relu_.default, F.relu_, ROWS, row="clamp"),
    after_mul(aten.relu6.default, torch.ops.aten.relu6, ROWS, row="clamp"),
    after_mul(aten.hardtanh.default, lambda x: F.hardtanh(x, 0.1, 2), ROWS, row="clamp"),
    after_mul(aten.hardtanh_.default, lambda x: F.hardtanh_(x, 0.1, 2), ROWS, row="clamp"),
    after_mul(aten.clamp.default, lambda x: x.clamp(max=1.5), PICTURE, row="clamp"),
    after_mul(aten.clamp_min.default, lambda x: torch.clamp_min(x, 0.3), ROWS, row="clamp"),
    after_mul(aten.clamp_max.default, lambda x: torch.clamp_max(x, 2), ROWS, row="clamp"),
    Example("linear", (aten.clamp_min.default,), lambda m, x: m(x).clamp_min(-0.1), (ROWS,), (nn.Linear(8, 6),)),
    after_mul(aten.view.default, lambda x: x.view(2, 28, 7), PICTURE, row="view"),
    after_mul(aten.reshape.default, lambda x: x.reshape(-1, 14), PICTURE, row="view"),
    after_mul(aten.flatten.using_ints, lambda x: x.flatten(1), PICTURE, row="view"),
    after_mul(aten.unflatten.int, lambda x: x.unflatten(1, (2, 4)), ROWS, row="view"),
    after_mul(aten.squeeze.default, lambda x: x.squeeze(), (3, 1, 4), row="view"),
    after_mul(aten.squeeze.dim, lambda x: x.squeeze(1), (3, 1, 4), row="view"),
    after_mul(aten.squeeze.dims, lambda x: x.squeeze((1, 2)), (3, 1, 1), row="view"),
    after_mul(aten.unsqueeze.default, lambda x: x.unsqueeze(1), ROWS, row="view"),
    after_mul(aten.permute.default, lambda x: x.permute(0, 3, 1, 2), PICTURE, row="permute"),
    after_mul(aten.transpose.int, lambda x: x.transpose(1, 2), PICTURE, row="permute"),
    after_mul(aten.t.default, lambda x: x.t(), ROWS, row="permute"),
    after_mul(aten.slice.Tensor, lambda x: x[:, 1:5], ROWS, row="slice"),
    after_mul(operator.getitem, lambda x: x.split([3, 5], 1)[1], ROWS, row="slice"),
    after_mul(aten.narrow.default, lambda x: torch.ops.aten.narrow(x, 1, 2, 3), ROWS, row="slice"),
)

EXAMPLES = (*LAYERS, *ARITHMETIC, *FOLLOWERS)
