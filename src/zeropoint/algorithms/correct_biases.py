"""Bias correction: remove the shift that quantization gives to the mean of each output channel.

Nagel et al. 2019, section 4.2, the empirical form: layer by layer, each with the corrected layers before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from zeropoint.algorithms.watch import watch
from zeropoint.core.policy import CORRECTED_KEY
from zeropoint.graph.attributes import get_attribute, set_parameter
from zeropoint.graph.bind import argument
from zeropoint.graph.layers import LAYERS, channel_axis
from zeropoint.numerics import ops
from zeropoint.passes.round_biases import bias_limits, bias_scale, on_grid

LIVE_BYTES = 2**29
"""How much memory the values on the way may take: as many of the batches are used as fit, and one at least."""
SIGNIFICANCE = 2.0
"""A shift is corrected when it is at least so many times its own standard error over the samples."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What bias correction did.

    Args:
        changed: names of the layers whose biases were changed.
        correctable: how many layers have a bias that could be: one on the int32 grid.
        samples: how many samples the shifts of their means were measured on.
    """

    changed: tuple[str, ...]
    correctable: int
    samples: int

    @property
    def reason(self) -> str:
        """Why no bias was changed; empty where one was."""
        if self.changed:
            return ""
        if not self.correctable:
            return "no layer has a bias, and input and weight quantized to fixed scales"
        if self.samples < 2:
            return f"only {self.samples} sample was used, and it takes 2 to tell a shift from chance"
        return "no shift is larger than chance"


def channel_means(model: GraphModule, batches: Sequence[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """Returns, for each layer by name, the mean of each output channel of each sample: ``(samples, channels)``."""
    found: dict[str, list[torch.Tensor]] = {}
    layers = [node for node in model.graph.nodes if node.target in LAYERS and node.meta["val"].dim() > 1]
    watch(model, batches, layers, lambda node, value: found.setdefault(node.name, []).append(_means(node, value)))
    return {name: torch.cat(means) for name, means in found.items()}


def _means(layer: Node, value: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all axes but that of the samples, which is the first, and that of the channels."""
    axis = channel_axis(layer)
    channels_last = value.movedim(axis, -1)
    if axis == 0:  # The layer has one sample, and no axis of them.
        channels_last = channels_last.unsqueeze(0)
    return channels_last.reshape(channels_last.shape[0], -1, channels_last.shape[-1]).mean(1)


def _samples(layer: Node, value: torch.Tensor) -> int:
    return 1 if channel_axis(layer) == 0 else len(value)


@torch.no_grad()
def correct_biases(
    converted: GraphModule, batches: Sequence[tuple[Any, ...]], reference: dict[str, torch.Tensor]
) -> Correction:
    """Adds to each quantized layer's bias what its output lacks in the mean; returns what was changed.

    Args:
        converted: what ``convert_pt2e`` returned; its biases are changed, and stay on their int32 grid.
        batches: the inputs that ``reference`` was computed on; the first of them are used, as many as fit in memory.
        reference: ``channel_means`` of the float model.
    """
    if not reference:
        return Correction((), 0, 0)
    last_read = last_reads(converted)
    batches = batches[: max(1, LIVE_BYTES // max(1, live_bytes(converted, batches[0], last_read)))]
    values: list[dict[Node, Any]] = [_inputs(converted, inputs) for inputs in batches]
    changed: list[str] = []
    correctable = samples = 0
    for node in converted.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for known in values:
            known[node] = _run(converted, node, known)
        if node.name in reference and (scale := _grid(converted, node)) is not None:
            correctable, samples = correctable + 1, max(samples, sum(_samples(node, known[node]) for known in values))
            if _correct(converted, node, values, reference[node.name], scale):
                changed.append(node.name)
        for finished in last_read.get(node, ()):
            for known in values:
                known.pop(finished, None)
    converted.meta[CORRECTED_KEY] = tuple(changed)
    return Correction(tuple(changed), correctable, samples)


def _inputs(model: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, Any]:
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, pytree.tree_leaves(inputs), strict=True))


def last_reads(model: GraphModule) -> dict[Node, list[Node]]:
    """Returns the nodes whose value is read for the last time by each node."""
    last: dict[Node, Node] = {}
    for node in model.graph.nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    found: dict[Node, list[Node]] = {}
    for read, reader in last.items():
        found.setdefault(reader, []).append(read)
    return found


def live_bytes(model: GraphModule, inputs: tuple[Any, ...], last_read: dict[Node, list[Node]]) -> int:
    """Returns the most memory that tensors on the way from one batch of inputs to the outputs take at once."""
    known, most = _inputs(model, inputs), 0
    for node in model.graph.nodes:
        if node.op not in ("placeholder", "output"):
            known[node] = _run(model, node, known)
        computed = [value for each, value in known.items() if each.op != "get_attr" and isinstance(value, torch.Tensor)]
        most = max(most, sum({value.data_ptr(): value.nbytes for value in computed}.values()))
        for finished in last_read.get(node, ()):
            known.pop(finished, None)
    return most


def _run(model: GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), name)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])
    target = model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    assert callable(target)
    return target(*args, **kwargs)


def _grid(model: GraphModule, layer: Node) -> torch.Tensor | None:
    """Returns the step of a layer's bias; None where it has none, or it is not one of a quantized layer."""
    if layer.target not in LAYERS or argument(layer, "weight").target not in ops.DEQUANTIZE_OPS:
        return None
    bias = argument(layer, "bias")
    if bias is None or bias.op != "get_attr" or len(bias.users) > 1:  # One that steps share suits none of them alone.
        return None
    return bias_scale(model, layer)


def _correct(
    model: GraphModule, layer: Node, values: list[dict[Node, Any]], reference: torch.Tensor, scale: torch.Tensor
) -> bool:
    """Corrects one layer's bias, of steps of ``scale``, and its outputs on all batches; returns whether it did."""
    bias = argument(layer, "bias")
    means = torch.cat([_means(layer, known[layer]) for known in values])
    shift = reference[: len(means)] - means
    wanted = significant(shift)
    before = get_attribute(model, str(bias.target)).detach()
    after = on_grid(before + wanted.to(before.dtype), scale, bias_limits(layer))
    if torch.equal(before, after):
        return False
    set_parameter(model, str(bias.target), after)
    shape = [1] * values[0][layer].dim()
    shape[channel_axis(layer)] = -1
    for known in values:
        known[bias] = after
        known[layer] = known[layer] + (after - before).reshape(shape)
    return True


def significant(shift: torch.Tensor) -> torch.Tensor:
    """Returns the mean over samples of each channel's shift, 0 where it may be chance.

    Args:
        shift: ``(samples, channels)``.
    """
    mean = shift.mean(0)
    if len(shift) < 2:
        return torch.zeros_like(mean)
    error = shift.std(0) / len(shift) ** 0.5
    return torch.where(mean.abs() >= SIGNIFICANCE * error, mean, torch.zeros_like(mean))
