"""Histograms of what is quantized: activations on data, in one pass over it, and weights by channel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from zeropoint.graph.bind import bind
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.source import module_path, operator_name
from zeropoint.numerics import ops
from zeropoint.numerics.quantized_tensor import QuantizedTensor

INSIDE = 64
"""Bins between the ends of a range."""
OUTSIDE = 16
"""Bins beyond each end; the outermost ones hold all that lies further out."""
MOST_CHANNELS = 512
"""Of a weight; of one that has more, so many are taken in equal distances."""


@dataclass(slots=True)
class ActivationRange:
    """The values of an activation before they are quantized, and the range that its integers have.

    Args:
        site: the node that computes it.
        operator, module: of that node.
        scale, zero_point: of its integers.
        low, high: the real values of the smallest and the largest integer.
        counts: values in each bin of equal width: 16 below the range, 64 within, 16 above.
        least, most: the smallest and the largest value.
        clipped: how many values are beyond the range by more than half a step.
        total: how many values were seen.
    """

    site: str
    operator: str
    module: str
    scale: float
    zero_point: int
    low: float
    high: float
    counts: torch.Tensor
    least: float = math.inf
    most: float = -math.inf
    clipped: int = 0
    total: int = 0

    @property
    def step(self) -> float:
        """The width of a bin: those inside hold what rounds to an integer of the range, half a step beyond it too."""
        return (self.high - self.low + self.scale) / INSIDE

    @property
    def start(self) -> float:
        """Where the first bin begins."""
        return self.low - self.scale / 2 - OUTSIDE * self.step

    def add(self, values: torch.Tensor) -> None:
        """Counts the values of a batch, NaN left out."""
        values = values.detach().flatten().double()
        values = values[~values.isnan()]
        if not values.numel():
            return
        places = ((values - self.start) / self.step).floor().clamp(0, len(self.counts) - 1)
        self.counts += torch.bincount(places.long(), minlength=len(self.counts))
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
        beyond = (values < self.low - self.scale / 2) | (values > self.high + self.scale / 2)
        self.clipped += int(beyond.sum())
        self.total += values.numel()


@torch.no_grad()
def activation_ranges(converted: GraphModule, batches: Iterable[tuple[Any, ...]]) -> list[ActivationRange]:
    """Returns the values of each activation that has a fixed range, in the order of the graph.

    Args:
        converted: it is run once for each batch; where it writes to buffers, give a copy.
        batches: positional inputs. Memory does not grow with their number.
    """
    watched = WatchedRun(converted)
    for inputs in batches:
        watched.run(*inputs)
    return watched.seen()


class WatchedRun(Interpreter):
    """Runs a converted graph, and counts what its quantize operators of fixed scales read: ``seen``."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        constants = constant_nodes(model)
        quantizes = [n for n in model.graph.nodes if n.target is ops.QUANTIZE_PER_TENSOR and n not in constants]
        self.ranges = {node: _range_of(node) for node in quantizes}

    def seen(self) -> list[ActivationRange]:
        """Returns the values of each activation that has a fixed range, in the order of the graph."""
        return [found for found in self.ranges.values() if found.total]

    def run_node(self, n: Node) -> Any:
        found = self.ranges.get(n)
        if found is not None:
            found.add(self.env[n.all_input_nodes[0]])
        return super().run_node(n)


def _range_of(quantize: Node) -> ActivationRange:
    given, source = bind(quantize), quantize.all_input_nodes[0]
    scale, zero_point = float(given["scale"]), int(given["zero_point"])
    low, high = ((int(given[end]) - zero_point) * scale for end in ("quant_min", "quant_max"))
    counts = torch.zeros(INSIDE + 2 * OUTSIDE, dtype=torch.int64)
    name, module = source.name, module_path(source)
    operator = "input" if source.op == "placeholder" else operator_name(source)
    return ActivationRange(name, operator, module, scale, zero_point, low, high, counts)


@dataclass(frozen=True, slots=True)
class WeightChannels:
    """The values of a weight by channel, and what the integers of each channel reach.

    Args:
        name: its path in the float model.
        shape: its sizes.
        channels: which channels; all, unless there are very many.
        low, high: the smallest and the largest value of each.
        reach: the largest value that each one's scale can hold.
    """

    name: str
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    reach: tuple[float, ...]


def weight_channels(name: str, weight: QuantizedTensor) -> WeightChannels:
    """Returns the channels of a weight along the axis of its scales; along the first one where it has one scale."""
    values = weight.dequantize()
    shape = tuple(values.shape)
    axis = weight.axis if weight.axis is not None else 0
    rows = values.movedim(axis, 0).reshape(shape[axis], -1) if shape else values.reshape(1, 1)
    count = len(rows)
    kept = list(range(0, count, -(-count // MOST_CHANNELS)))
    reach = _per_channel(weight.scale.detach().double(), count) * weight.quant_max
    rows = rows[kept].double()
    return WeightChannels(
        name, shape, tuple(kept), tuple(rows.amin(1).tolist()), tuple(rows.amax(1).tolist()),
        tuple(reach[kept].tolist()),
    )  # fmt: skip


def _per_channel(scales: torch.Tensor, count: int) -> torch.Tensor:
    """Returns a scale for each channel: the largest of its groups, where it has several."""
    flat = scales.reshape(-1)
    if len(flat) == 1:
        return flat.expand(count)
    return flat.reshape(count, -1).amax(1) if len(flat) % count == 0 else flat.max().expand(count)
