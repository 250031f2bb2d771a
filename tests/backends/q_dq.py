"""Graphs of quantize and dequantize operators written by hand, as any quantizer or none may leave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import zeropoint.numerics.ops  # noqa: F401  (registers quantized_decomposed)

qd = torch.ops.quantized_decomposed
SCALE = 0.03


def quantize(x, scale=SCALE, zero_point=3, low=-128, high=127, dtype=torch.int8):
    return qd.quantize_per_tensor(x, scale, zero_point, low, high, dtype)


def dequantize(x, scale=SCALE, zero_point=3, low=-128, high=127, dtype=torch.int8):
    return qd.dequantize_per_tensor(x, scale, zero_point, low, high, dtype)


def fake(x, *qparams: Any, **named: Any):
    """Quantizes and dequantizes."""
    return dequantize(quantize(x, *qparams, **named), *qparams, **named)


class Layer(nn.Module):
    """A weight as integers of its own, per tensor or per channel, and a float bias: ``compute(x, weight, bias)``."""

    def __init__(self, shape, compute=F.linear, axis: int | None = 0, zero_point=0, scale=0.01, bias=None, out=None):
        super().__init__()
        self.compute, self.axis, self.zero_point, self.scale = compute, axis, zero_point, scale
        self.register_buffer("integers", torch.randint(-127, 128, shape, dtype=torch.int8))
        count = shape[axis if axis is not None else 0]
        self.register_buffer("scales", torch.full((count,), scale) * torch.linspace(0.5, 1, count))
        self.register_buffer("zero_points", torch.full((count,), zero_point))
        self.bias = nn.Parameter(torch.randn(out or shape[0]) if bias is None else bias)

    def weight(self) -> torch.Tensor:
        if self.axis is None:
            return dequantize(self.integers, self.scale, self.zero_point, -127, 127)
        return qd.dequantize_per_channel(self.integers, self.scales, self.zero_points, self.axis, -127, 127, torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.weight(), self.bias)


class Graph(nn.Module):
    """A function of layers and inputs."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*self.layers, *inputs)


class Side(nn.Module):
    """Graphs side by side, one input and one output each."""

    def __init__(self, *graphs: nn.Module) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(graphs)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(graph(x) for graph, x in zip(self.graphs, inputs, strict=True))


def exported(module: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs).module()
