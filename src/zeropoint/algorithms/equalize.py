"""Equalization: let the channels of an activation use the one range that they are quantized in.

After Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section 4.1), who
equalize weights; here it is activations, from calibration data, since weights get a scale per channel anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.algorithms.watch import watch
from zeropoint.core.errors import NonFiniteError
from zeropoint.core.policy import EQUALIZED_KEY
from zeropoint.graph.attributes import attribute_reads, get_attribute, set_parameter
from zeropoint.graph.bind import argument
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.layers import LAYERS, channel_axis, output_channels, pads_with_zero, scale_inputs, scale_outputs
from zeropoint.graph.source import describe

aten = torch.ops.aten

HOMOGENEOUS = (
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
    aten.dropout.default,
)  # fmt: skip
"""Operators with ``f(a x) = a f(x)`` for ``a > 0``, value by value."""
POOLS: dict[Any, int] = {
    aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.avg_pool2d.default: 2,
    aten.adaptive_avg_pool2d.default: 2,
}  # fmt: skip
"""Pooling is such too, of the values along so many of the last axes."""
STRENGTH = 0.75
"""Exponent of the factor. 1 fills the range with every channel, and leaves data that was not seen no room; of 0.5 to 1
it lost the least on super-resolution (waifu2x) with held-out data."""
FEW_VALUES = 256
"""So many values of a channel say half of what there is to know of its range: the exponent is halved."""
SMALLEST_FACTOR = 1 / 64
"""A channel that calibration hardly excites is not blown up by more than 64."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers with only channel-wise homogeneous operators between them, each the other's only neighbour."""

    first: Node
    second: Node


def equalize(model: GraphModule, batches: Sequence[tuple[Any, ...]]) -> list[Pair]:
    """Scales each output channel of a layer up and the matching weights of the next layer down; returns the pairs.

    The model's function stays the same. Channel ``c`` is divided by ``r_c ** s``, where ``r_c`` is the share of the
    tensor's range that the channel uses: ``max(min_c / min, max_c / max)``; ``s`` is 0.75 where many values were seen,
    and less where few were. The user's own tensors are not written to.
    """
    pairs = find_pairs(model)
    ranges = _ranges(model, batches, [pair.first for pair in pairs])
    applied = [pair for pair in pairs if pair.first in ranges]
    for pair in applied:
        _apply(model, pair, factors(*ranges[pair.first]))
    return applied


def find_pairs(model: GraphModule) -> list[Pair]:
    """Returns the pairs of a graph in order."""
    layers = [node for node in model.graph.nodes if node.op == "call_function" and node.target in LAYERS]
    times_read = Counter(str(node.target) for node in attribute_reads(model.graph))
    pairs = ((layer, _next_layer(layer)) for layer in layers)
    found = [Pair(first, second) for first, second in pairs if second is not None]
    return [pair for pair in found if all(_owns_tensors(layer, times_read) for layer in (pair.first, pair.second))]


def _next_layer(layer: Node) -> Node | None:
    reader, axis, dimensions = sole_reader(layer), channel_axis(layer), layer.meta["val"].dim()
    while reader is not None and _is_channel_wise(reader, dimensions - axis % dimensions):
        reader = sole_reader(reader)
    return reader if reader is not None and reader.target in LAYERS and channel_axis(reader) == axis else None


def _is_channel_wise(node: Node, from_end: int) -> bool:
    """True for an operator with ``f(a x) = a f(x)`` for ``a > 0``, channel by channel of that axis from the end."""
    if node.target in HOMOGENEOUS:
        return True
    if node.target in POOLS:
        return from_end > POOLS[node.target]
    return pads_with_zero(node) and not any(argument(node, "pad")[2 * from_end - 2 : 2 * from_end])


def _owns_tensors(layer: Node, times_read: Counter[str]) -> bool:
    """True when weight and bias are float parameters that nothing else reads."""
    read = [argument(layer, name) for name in ("weight", "bias")]
    return all(
        node.op == "get_attr" and len(node.users) == 1 and times_read[str(node.target)] == 1
        for node in read
        if isinstance(node, Node)
    )


Range = tuple[torch.Tensor, torch.Tensor, int]


def _ranges(model: GraphModule, batches: Sequence[tuple[Any, ...]], layers: list[Node]) -> dict[Node, Range]:
    """Returns smallest and largest value of each output channel over all batches, each of shape ``(channels,)``.

    The third is how many values of a channel there were.
    """
    found: dict[Node, Range] = {}

    def look(node: Node, value: torch.Tensor) -> None:
        channels = value.movedim(channel_axis(node), 0).reshape(output_channels(node), -1)
        low, high = torch.aminmax(channels, dim=1)
        count = channels.shape[1]
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            what = "it returns NaN or infinity on the calibration data, in float"
            raise NonFiniteError(what, where=describe(node), remedy="Look at the data and at this layer's weights.")
        if node in found:
            low, high = torch.minimum(low, found[node][0]), torch.maximum(high, found[node][1])
            count += found[node][2]
        found[node] = (low, high, count)

    watch(model, batches, layers, look)
    return found


def factors(low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
    """Returns what to divide each channel by, in ``[1/64, 1]``, from its smallest and largest of ``count`` values.

    The fewer values, the more of what was not seen lies beyond them, and would be clipped: the less is filled.
    """
    tiny = torch.finfo(torch.float32).tiny
    low, high = low.clamp(max=-tiny), high.clamp(min=tiny)
    used = torch.maximum(low / low.min(), high / high.max())
    return used.pow(STRENGTH * count / (count + FEW_VALUES)).clamp(SMALLEST_FACTOR, 1.0)


def _apply(model: GraphModule, pair: Pair, factor: torch.Tensor) -> None:
    weight, bias = argument(pair.first, "weight"), argument(pair.first, "bias")
    _set(model, weight, scale_outputs(pair.first, _get(model, weight), 1 / factor))
    if bias is not None:
        _set(model, bias, _get(model, bias) / factor)
    following = argument(pair.second, "weight")
    _set(model, following, scale_inputs(pair.second, _get(model, following), factor))
    model.meta.setdefault(EQUALIZED_KEY, []).append((pair.first.name, pair.second.name, factor))


def _get(model: GraphModule, node: Node) -> torch.Tensor:
    return get_attribute(model, str(node.target)).detach()


def _set(model: GraphModule, node: Node, value: torch.Tensor) -> None:
    set_parameter(model, str(node.target), value)
