"""Batch norm: the operators by which exports of different devices and decompositions spell it."""

from __future__ import annotations

import torch
from torch.fx import Node

from zeropoint.graph.bind import argument

aten = torch.ops.aten

NO_TRAINING = (aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default)
ALWAYS_TRAINING = (aten._batch_norm_with_update.default,)
MULTIPLE = (
    aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default, aten.native_batch_norm.default, aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default, *NO_TRAINING, *ALWAYS_TRAINING,
)  # fmt: skip
"""Operators whose first result is that of batch norm; the others are statistics."""
BATCH_NORMS = (aten.batch_norm.default, *MULTIPLE)


def keeps_statistics(norm: Node) -> bool:
    """True for a batch norm with running statistics; another one normalizes by each batch, in eval mode too."""
    return all(isinstance(argument(norm, name), Node) for name in ("running_mean", "running_var"))


def is_in_train_mode(norm: Node) -> bool:
    """True for a batch norm that has running statistics, and normalizes by each batch all the same."""
    if norm.target in NO_TRAINING or not keeps_statistics(norm):
        return False
    return norm.target in ALWAYS_TRAINING or bool(argument(norm, "training") or argument(norm, "train"))
