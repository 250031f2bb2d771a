"""Train a layer with the weight that it will have once the batch norm after it is folded.

With ``s = gamma / sqrt(var + eps)`` of the running variance, ``conv(x, w s) / s + b`` is what the layer gives, and
``w s`` is what will be quantized: its fake quantizer stands there. Batch norm still normalizes by the batch, so that it
trains as in the float model (Krishnamoorthi 2018, section 3.2.2).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node

from zeropoint.annotate.plan import Plan
from zeropoint.core.dtypes import FLOAT_DTYPES, plain_dtype
from zeropoint.core.errors import AnnotationError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode
from zeropoint.graph.bind import Site, argument, reads, set_argument
from zeropoint.graph.chains import sole_reader
from zeropoint.graph.constants import evaluate
from zeropoint.graph.emit import Emitter
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import TRANSPOSED, channel_axis, groups_of
from zeropoint.graph.no_ops import DROPOUTS
from zeropoint.graph.source import describe
from zeropoint.passes.move_annotations import Moved, move_annotations
from zeropoint.passes.normalized_layers import NormalizedLayer, Tensors, find_layer, refuse

aten = torch.ops.aten
PASS = "qat_batch_norm"
QAT_KEY = "qat_conv_bn"
"""Metadata of the nodes of a group: a layer, its batch norm, and what was put around them."""

Role: TypeAlias = Literal["layer", "norm", "weight", "bias", "output", "inner"]


@dataclass(frozen=True, slots=True)
class Member:
    """A node's place in a group. It names no other node, so it stays true in a copy of the graph.

    Args:
        group: number of the group in its graph.
        role: ``weight`` is the scaled weight, ``bias`` the zeros that the layer adds, ``output`` what stands for the
            layer's output.
    """

    group: int
    role: Role


def groups_in(graph: Graph) -> list[dict[Role, Node]]:
    """Returns the nodes of each group by role, the inner ones left out."""
    found: dict[int, dict[Role, Node]] = defaultdict(dict)
    for node in graph.nodes:
        member = node.meta.get(QAT_KEY)
        if member is not None and member.role != "inner":
            found[member.group][member.role] = node
    return list(found.values())


@graph_pass
def qat_batch_norm(model: GraphModule, plan: Plan) -> None:
    """Puts each layer whose weight is quantized, and which a batch norm follows, into the form above.

    Annotations go with the arguments: what was said of the weight holds for the scaled one, what was said of the bias
    for the zeros in its place. The batch norm is put into train mode; but where the graph was exported in train mode,
    one that is not in it was frozen, and stays so, and so does one whose ``momentum=None`` export made 0. One without
    running statistics stays as it is, after a layer with a weight of its own: it normalizes by each batch in use too,
    so nothing can be folded.

    Raises:
        AnnotationError: the bias of such a layer is to be measured, though its values come from batch norm.
    """
    norms = [node for node in model.graph.nodes if node.target in BATCH_NORMS]
    if not norms:
        return
    tensors, known, moved, numbers = Tensors(model), dict[object, Any](), Moved(), count()
    frozen_stay = any(is_in_train_mode(norm) for norm in norms) or _drops_out(model.graph)
    for norm in norms:
        found = find_layer(norm, tensors)
        if isinstance(found, str) or Site(found.layer, "weight") not in plan.specs:
            continue
        reason = _quantized_apart(found, plan)
        if reason is not None:
            refuse(norm, reason)
            continue
        _check_bias(found.layer, plan)
        _Group(found, next(numbers), known).build(model, moved)
        if not frozen_stay and argument(norm, "momentum"):
            set_argument(norm, "training", True)
    move_annotations(model.graph, moved)


def _drops_out(graph: Graph) -> bool:
    return any(node.target in DROPOUTS and argument(node, "train") for node in graph.nodes)


def _quantized_apart(found: NormalizedLayer, plan: Plan) -> str | None:
    """Returns what is quantized between layer and batch norm, or before the weight is scaled: that is not folded."""
    for stored in (argument(found.layer, "weight"), argument(found.layer, "bias")):
        if isinstance(stored, Node) and Site(stored) in plan.specs:
            return f"{stored.name} is quantized by itself"
    node = found.layer
    while node is not found.norm:
        reader = sole_reader(node)
        assert reader is not None
        if Site(node) in plan.specs or any(site in plan.specs for site, _ in reads(reader)):
            return f"{node.name} is quantized by itself"
        node = reader
    return None


def _check_bias(layer: Node, plan: Plan) -> None:
    spec = plan.specs.get(Site(layer, "bias"))
    if isinstance(spec, QuantizationSpec) and plain_dtype(spec.dtype) not in FLOAT_DTYPES:
        what = "its bias is to be measured, but what is added in its place comes from the batch norm after it"
        remedy = "Annotate the bias with a DerivedQuantizationSpec of input and weight, or with None."
        raise AnnotationError(what, where=describe(layer), remedy=remedy)


class _Group:
    """Builds one group: nodes before the layer, and nodes before what reads it."""

    def __init__(self, found: NormalizedLayer, number: int, known: dict[object, Any]) -> None:
        self.layer, self.norm, self.reader = found.layer, found.norm, found.reader
        self._number = number
        self._before, self._after = Emitter(self.layer, PASS, known), Emitter(self.reader, PASS, known)

    def build(self, model: GraphModule, moved: Moved) -> None:
        layer, weight, bias = self.layer, argument(self.layer, "weight"), argument(self.layer, "bias")
        scale = self._scale(model)
        scaled = self._call(self._before, aten.mul.Tensor, weight, self._over_weight(scale), role="weight")
        set_argument(layer, "weight", scaled)
        moved[weight, layer] = scaled, layer
        if bias is not None:
            zeros = self._call(self._before, aten.zeros_like.default, bias, role="bias")
            set_argument(layer, "bias", zeros)
            moved[bias, layer] = zeros, layer
        self.reader.replace_input_with(layer, self._output(scale, bias))
        self._tag(layer, "layer")
        self._tag(self.norm, "norm")

    def _output(self, scale: Node, bias: Node | None) -> Node:
        """Returns what stands for the output of the layer: it divided by the scale, and with its bias."""
        shape = [1] * self.layer.meta["val"].dim()
        shape[channel_axis(self.layer)] = -1
        divisor = self._call(self._after, aten.reshape.default, scale, shape)
        output = self._call(self._after, aten.div.Tensor, self.layer, divisor)
        if bias is not None:
            added = self._call(self._after, aten.reshape.default, bias, shape)
            output = self._call(self._after, aten.add.Tensor, output, added)
        return self._tag(output, "output")

    def _scale(self, model: GraphModule) -> Node:
        """Returns ``gamma / sqrt(var + eps)``, ``(channels,)``; where gamma is 0, one of 1: no division by 0."""
        variance, eps = argument(self.norm, "running_var"), argument(self.norm, "eps")
        raised = self._call(self._before, aten.add.Tensor, variance, eps)
        deviation = self._call(self._before, aten.sqrt.default, raised)
        gamma = argument(self.norm, "weight")
        if gamma is None:
            return self._call(self._before, aten.reciprocal.default, deviation)
        if bool((evaluate(model, gamma) == 0).any()):
            is_zero = self._call(self._before, aten.eq.Scalar, gamma, 0)
            gamma = self._call(self._before, aten.masked_fill.Scalar, gamma, is_zero, 1.0)
        return self._call(self._before, aten.div.Tensor, gamma, deviation)

    def _over_weight(self, scale: Node) -> Node:
        """Returns the scale as it is multiplied with the weight: each output channel by its own."""
        sizes = argument(self.layer, "weight").meta["val"].shape
        space, groups = [1] * (len(sizes) - 2), groups_of(self.layer)
        if self.layer.target not in TRANSPOSED:
            return self._call(self._before, aten.reshape.default, scale, [-1, 1, *space])
        if groups == 1:
            return self._call(self._before, aten.reshape.default, scale, [1, -1, *space])
        grouped = self._call(self._before, aten.reshape.default, scale, [groups, 1, sizes[1]])
        each = self._call(self._before, aten.expand.default, grouped, [groups, sizes[0] // groups, sizes[1]])
        return self._call(self._before, aten.reshape.default, each, [sizes[0], sizes[1], *space])

    def _call(self, emit: Emitter, target: Any, *args: Any, role: Role = "inner") -> Node:
        return self._tag(emit.call(target, *args), role)

    def _tag(self, node: Node, role: Role) -> Node:
        node.meta[QAT_KEY] = Member(self._number, role)
        return node
