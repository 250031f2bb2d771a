"""From a graph that was trained to one for use: batch norm folded, dropout ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from zeropoint.annotate.rules import forget_erased
from zeropoint.core.errors import GraphError
from zeropoint.graph.batch_norms import counts_batches, is_in_train_mode
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.constants import evaluate
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import graph_pass, remove_dead_code
from zeropoint.graph.layers import scale_outputs
from zeropoint.graph.no_ops import DROPOUTS
from zeropoint.graph.source import describe
from zeropoint.passes.fold_batch_norm import factor_and_shift, fold_batch_norm, new_parameters
from zeropoint.passes.move_annotations import Moved, move_annotations
from zeropoint.passes.normalized_layers import Tensors
from zeropoint.passes.qat_batch_norm import PASS, Role, groups_in

aten = torch.ops.aten


def end_training(model: GraphModule) -> None:
    """Folds batch norm into the layers before it, and puts what is left of it, and dropout, into eval mode.

    The weights that are quantized are those that the fake quantizers see in eval mode, to the bit. Nothing counts
    batches any longer.
    """
    remove_counters(model)
    fold_groups(model)
    to_eval(model)
    fold_batch_norm(model)  # Into layers whose weight is not quantized.
    forget_erased(model)


@graph_pass
def remove_counters(model: GraphModule) -> None:
    """Erases what counts the batches that a batch norm has seen."""
    for node in reversed(model.graph.nodes):
        if counts_batches(node) and not node.users:
            model.graph.erase_node(node)


@graph_pass
def to_eval(model: GraphModule) -> None:
    """Lets batch norm use its running statistics, and dropout drop nothing."""
    for node in model.graph.nodes:
        if node.target is aten.batch_norm.default and is_in_train_mode(node):
            set_argument(node, "training", False)
        elif node.target in DROPOUTS:
            set_argument(node, "train", False)


@graph_pass
def fold_groups(model: GraphModule) -> None:
    """Takes the groups of ``qat_batch_norm`` apart: the layer gets the weight that was trained, and all of the bias.

    Raises:
        GraphError: a node of a group is no longer there.
    """
    folds = [_Fold.of(model, members) for members in groups_in(model.graph)]
    for fold in folds:
        fold.take_apart()
    remove_dead_code(model.graph)
    tensors, moved = Tensors(model), Moved()
    for fold in folds:
        fold.place(tensors, moved)
    move_annotations(model.graph, moved)


@dataclass(frozen=True, slots=True)
class _Fold:
    """A group, and the weight and bias of its layer with batch norm in them."""

    members: dict[Role, Node]
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: GraphModule, members: dict[Role, Node]) -> _Fold:
        """Computes the tensors while the group is whole."""
        missing = {"layer", "norm", "weight", "output"} - set(members)
        if missing:
            what = f"of its group in training, these are gone: {', '.join(sorted(missing))}"
            remedy = "Leave the nodes with the metadata qat_conv_bn as they are between prepare and convert."
            raise GraphError(what, where=describe(next(iter(members.values()))), remedy=remedy)
        layer, norm, scaled = members["layer"], members["norm"], members["weight"]
        weight, gamma = evaluate(model, scaled), argument(norm, "weight")
        if gamma is not None and not bool((is_kept := evaluate(model, gamma) != 0).all()):
            weight = scale_outputs(layer, weight, is_kept.to(weight.dtype))
        zeros = members.get("bias")
        _, shift = factor_and_shift(model, norm, None if zeros is None else zeros.all_input_nodes[0])
        return cls(members, weight, shift.to(weight.dtype))

    def take_apart(self) -> None:
        """Lets the layer read its own weight and bias, and everything after batch norm read the layer."""
        layer, norm = self.members["layer"], self.members["norm"]
        for role in ("weight", "bias"):
            if role in self.members:
                self.members[role].replace_all_uses_with(self.members[role].all_input_nodes[0])
        self.members["output"].replace_all_uses_with(layer)
        norm.replace_all_uses_with(argument(norm, "input"))
        if "custom" in norm.meta:
            layer.meta["custom"] = {**layer.meta.get("custom", {}), **norm.meta["custom"]}
        norm.graph.erase_node(norm)

    def place(self, tensors: Tensors, moved: Moved) -> None:
        """Puts the folded tensors where the layer, or the fake quantizer before it, reads."""
        layer = self.members["layer"]
        (weight_reader, weight), (bias_reader, bias) = _read(layer, "weight"), _read(layer, "bias")
        assert weight is not None
        new_weight, new_bias = new_parameters(layer, (weight, bias), self.weight, self.bias, tensors)
        weight_reader.replace_input_with(weight, new_weight)
        moved[self.members["weight"], layer] = new_weight, layer
        if bias is None:
            set_argument(layer, "bias", new_bias)
        else:
            bias_reader.replace_input_with(bias, new_bias)
            moved[self.members["bias"], layer] = new_bias, layer
        for new in (new_weight, new_bias):
            inherit(new, layer, PASS)


def _read(layer: Node, name: str) -> tuple[Node, Node | None]:
    """Returns the node that reads an argument of a layer, its fake quantizer or itself, and what that reads."""
    reader, read = layer, argument(layer, name)
    while isinstance(read, Node) and read.op == "call_module":
        reader, read = read, read.all_input_nodes[0]
    return reader, read
