"""Choose weight scales for which rounding in the graph and on the runtime cannot differ.

The runtime computes ``y = round(M * a)`` with an integer accumulator ``a`` and ``M = s_x s_w / s_y``; the q/dq graph
computes the same in float32, with an error of some 1e-5. Where ``M * a`` lies that near to a half, the two round to
different integers, and in a deep network one such difference spreads until the outputs agree by 25 dB only. With
``M = p / q`` for an odd ``q``, ``M * a = n + 1/2`` has no solution (``2 p a`` is even, ``q (2 n + 1)`` odd), and it
stays ``1 / (2 q)`` away from every half. So each weight scale is raised, by at most 2/255, until ``M`` is such a
fraction with a small ``q``: the weights are then rounded on that grid, which costs nothing that can be measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from zeropoint.core.errors import CalibrationError
from zeropoint.core.specs import PER_CHANNEL, SYMMETRIC
from zeropoint.graph.bind import argument
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.constants import constant_nodes, evaluate
from zeropoint.graph.layers import LAYERS, groups_of
from zeropoint.graph.observers import observer_of
from zeropoint.numerics.granularity import PerAxis, PerTensor
from zeropoint.passes.affine_blocks import affine_of
from zeropoint.passes.qparams_of import QParams, group_size_of, observe_constant, qparams_of

SMALLEST_DENOMINATOR = 256
"""About the smallest ``q``: larger ones follow a scale more closely, smaller ones stay further from halves."""
COARSE = 2.0**-12
"""Smallest weight scale of the field's quantizers for this arithmetic."""
SMALLEST_RATIO = 2.0**-32
"""Of ``M`` in XNNPACK's requantization; a smaller one cannot be reached by int8 data."""


def steady_weight_scales(model: GraphModule) -> dict[int, QParams]:
    """Returns the scale and zero point of layers' observers, by id; those of weights so that no tie can occur.

    Covers each layer whose input and output are quantized to fixed scales, the same for all layers that read its
    weight: ``s_x s_w / s_y`` is ``p / q``, ``q`` odd.
    """
    constants = constant_nodes(model)
    found: dict[int, QParams] = {}
    for node in model.graph.nodes:
        if node.target not in LAYERS or (calls := _calls(model, node)) is None:
            continue
        read, observers = calls[1], [observer_of(model, call) for call in calls]
        source, weight = read.all_input_nodes[0], observers[1]
        if source not in constants or id(weight) in found or not _have_equal_scales(model, read):
            continue
        if any(getattr(observer, "constant_input", False) for observer in (observers[0], observers[2])):
            continue
        observe_constant(weight, lambda s=source: evaluate(model, s))
        try:
            for observer, call in zip(observers, calls, strict=True):
                if id(observer) not in found:
                    found[id(observer)] = qparams_of(observer, call.all_input_nodes[0])
        except CalibrationError:
            continue  # Convert raises it, with the name of the tensor.
        x, w, y = (found[id(observer)] for observer in observers)
        bias = argument(node, "bias")
        wide = w.scale
        if isinstance(bias, Node) and bias in constants:
            wide = holding_bias(w.scale, x.scale, evaluate(model, bias), groups_of(node))
        found[id(weight)] = replace(w, scale=steady_scale(x.scale, wide, y.scale))
    return found


def holding_bias(w: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns weight scales, small ones raised to at most 2^-12 where the bias would not fit int32 of ``s_x * s_w``.

    Such are the scales of a channel of next to no weights, which batch norm made of one that never changes.

    Args:
        w, x: scales of weight and input, float32, ``(1,)``; or of the weight, ``(channels,)``.
        bias: float, one for each channel of the output.
        groups: of a transposed convolution: its groups share scales.
    """
    needed = bias.detach().abs().to(w.dtype).div_(x.item() * 2.0**30).clamp_(max=COARSE)
    if len(w) == 1:
        needed = needed.amax(0, keepdim=True)
    elif len(w) * groups == len(needed):
        needed = needed.reshape(groups, -1).amax(0)
    return torch.maximum(w, needed) if len(w) == len(needed) else w  # Else they are not those of output channels.


def steady_scale(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns a scale, at most 2/255 above ``w``, for which ``x w / y`` is a fraction of small odd denominator.

    ``p = ceil(256 M)`` and the largest odd ``q <= p / M``: then ``q >= 255``, and ``q <= 511`` where ``M >= 1/256``;
    below, ``p = 1`` and halves lie midway between what neighbouring accumulators give.

    Args:
        x, y: scales of input and output, float32, shape ``(1,)``.
        w: scales of the weight, float32, shape ``(1,)`` or ``(channels,)``.
    """
    of_input, of_output = x.item(), y.item()
    ratio = np.maximum(of_input * w.double().cpu().numpy() / of_output, SMALLEST_RATIO)
    numerator = np.ceil(ratio * SMALLEST_DENOMINATOR)
    denominator = 2 * np.floor((numerator / ratio - 1) / 2) + 1
    return torch.from_numpy((numerator / denominator * of_output / of_input).astype(np.float32)).to(w.device)


def _calls(model: GraphModule, node: Node) -> tuple[Node, Node, Node] | None:
    """Returns the calls of the observers of a layer's input, weight and output.

    None where one of the three is not fixed int8, or the weight has other scales than one per output.
    """
    x, weight = argument(node, "input"), argument(node, "weight")
    if x.op == "call_function" and len(x.users) == 1 and x.all_input_nodes and observer_of(model, x) is None:
        x = x.all_input_nodes[0]
    after = sole_reader(node)
    if after is not None and observer_of(model, after) is None:
        after = sole_reader(after)
    if after is None:
        return None
    found: list[Any] = [observer_of(model, call) for call in (x, weight, after)]
    if any(each is None or getattr(each, "is_dynamic", False) or each.dtype != torch.int8 for each in found):
        return None
    one_scale = found[0].qscheme not in PER_CHANNEL and found[2].qscheme not in PER_CHANNEL
    return (x, weight, after) if one_scale and _has_one_scale_per_output(found[1]) else None


def _have_equal_scales(model: GraphModule, weight: Node) -> bool:
    """True when all readers of a weight have the same observers of input and output: one does, steps of time do."""
    pairs: set[tuple[int, int]] = set()
    for reader in weight.users if len(weight.users) > 1 else ():
        calls = _calls(model, reader) if reader.target in LAYERS else None
        if calls is None:
            return False
        pairs.add((id(observer_of(model, calls[0])), id(observer_of(model, calls[2]))))
    return len(pairs) <= 1


def _has_one_scale_per_output(observer: Any) -> bool:
    affine = affine_of(observer)
    if affine is not None and not isinstance(affine.granularity, (PerTensor, PerAxis)):
        return False
    return observer.qscheme in SYMMETRIC and group_size_of(observer) is None
