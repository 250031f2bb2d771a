"""Batch norm: the operators by which exports of different devices and decompositions spell it, in both modes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument, bind, set_argument
from zeropoint.graph.schema import schema_of

aten = torch.ops.aten

NO_TRAINING = (aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default)
FUNCTIONAL = (aten._native_batch_norm_legit_functional.default, aten._batch_norm_with_update_functional.default)
"""Operators that return the new statistics after the results that the others have, instead of writing them."""
ALWAYS_TRAINING = (aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default)
MULTIPLE = (
    aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats, aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default,
    *NO_TRAINING, *FUNCTIONAL, aten._batch_norm_with_update.default,
)  # fmt: skip
"""Operators whose first result is that of batch norm; the others are statistics."""
BATCH_NORMS = (aten.batch_norm.default, *MULTIPLE)
STATISTICS = ("running_mean", "running_var")
IN_EVAL_MODE: dict[Any, Any] = {
    aten._native_batch_norm_legit.default: aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit_functional.default: aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_with_update.default: aten._batch_norm_no_update.default,
    aten._batch_norm_with_update_functional.default: aten._batch_norm_no_update.default,
}
"""How export spells in eval mode what it spells so in train mode; for the others, an argument says the mode."""
IN_TRAIN_MODE: dict[Any, Any] = {
    aten._native_batch_norm_legit_no_training.default: aten._native_batch_norm_legit.default,
    aten._batch_norm_no_update.default: aten._batch_norm_with_update.default,
}

COUNTER = "num_batches_tracked"
"""Name of the buffer with the number of batches that a batch norm has seen."""
COUNTING = (aten.add_.Tensor, aten.add.Tensor, aten.copy_.default)
STAYS = "batch_norm"
"""Pattern of the decision about a batch norm that is not folded; the reason says why."""


def keeps_statistics(norm: Node) -> bool:
    """True for a batch norm with running statistics; another one normalizes by each batch, in eval mode too."""
    return all(isinstance(argument(norm, name), Node) for name in STATISTICS)


def is_in_train_mode(norm: Node) -> bool:
    """True for a batch norm that has running statistics, and normalizes by each batch all the same."""
    if norm.target in NO_TRAINING or not keeps_statistics(norm):
        return False
    return norm.target in ALWAYS_TRAINING or bool(argument(norm, "training") or argument(norm, "train"))


def set_train_mode(norm: Node, training: bool) -> None:
    """Makes a batch norm with running statistics normalize by each batch and update them, or normalize by them.

    The node, its other arguments and the meaning of its results stay; where its operator is of one mode, that changes.
    """
    spellings = IN_TRAIN_MODE if training else IN_EVAL_MODE
    if norm.target in spellings:
        _respell(norm, spellings[norm.target])
    else:
        set_argument(norm, "training", training)


def _respell(norm: Node, target: Any) -> None:
    is_functional, bound = norm.target in FUNCTIONAL, bind(norm)
    norm.target = target
    norm.args, norm.kwargs = tuple(bound.get(name, True) for name in schema_of(target).names), {}  # training=True
    results = len(target._schema.returns)
    if isinstance(norm.meta.get("val"), (list, tuple)):
        norm.meta["val"] = tuple(norm.meta["val"][:results])
    if is_functional:
        _read_statistics_themselves(norm, results)


def _read_statistics_themselves(norm: Node, results: int) -> None:
    """Replaces the statistics that a functional spelling returned, and what writes them back, by the buffers."""
    for user in list(norm.users):
        place = user.args[1] if user.target is operator.getitem else 0
        if not isinstance(place, int) or place < results:
            continue
        statistic = argument(norm, STATISTICS[place - results])
        user.replace_all_uses_with(statistic)
        norm.graph.erase_node(user)
        for copy in [each for each in statistic.users if each.target is aten.copy_.default]:
            if copy.args[:2] == (statistic, statistic):
                copy.replace_all_uses_with(statistic)
                norm.graph.erase_node(copy)


def counts_batches(node: Node) -> bool:
    """True for what adds to the number of batches that a batch norm has seen, or writes it down."""
    counted = node
    while isinstance(counted, Node) and counted.target in COUNTING:
        counted = counted.args[0]
    return counted is not node and isinstance(counted, Node) and str(counted.target).rpartition(".")[2] == COUNTER
