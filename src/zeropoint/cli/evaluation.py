"""int8 beside float on samples: how far outputs are apart, and how often both choose the same class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.cli.data import Data
from zeropoint.core.dtypes import is_float
from zeropoint.graph.copies import copy_graph
from zeropoint.graph.inputs import inputs_for
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.summary import decibels


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a comparison gave.

    Args:
        samples: how many were compared.
        is_unseen: none of them was measured on.
        sqnr_db: lowest SQNR of a float output over the batches, in dB; NaN where there is none.
        agreement: share of samples whose largest output is the same; None where outputs are no scores of classes.
        float_top1, int8_top1: share of samples whose largest output is their class; None where classes are not known.
    """

    samples: int
    is_unseen: bool
    sqnr_db: float
    agreement: float | None = None
    float_top1: float | None = None
    int8_top1: float | None = None

    def line(self) -> str:
        """Returns it in words."""
        seen = "that were not measured on" if self.is_unseen else "that were measured on as well"
        text = decibels(self.sqnr_db)
        parts = [f"SQNR {text}" if math.isfinite(self.sqnr_db) else text]
        if self.agreement is not None:
            parts.append(f"same class {self.agreement:.1%}")
        if self.float_top1 is not None and self.int8_top1 is not None:
            parts.append(f"top-1 {self.float_top1:.1%} float, {self.int8_top1:.1%} int8")
        return f"compared  on {self.samples} samples {seen}: {', '.join(parts)}"


@torch.no_grad()
def evaluate(float_model: GraphModule, int8_model: GraphModule, data: Data, batches: Iterable[Any]) -> Evaluation:
    """Returns how a converted model compares with the float one, both run in PyTorch."""
    models = copy_graph(float_model), copy_graph(int8_model)
    ratios: list[float] = []
    choices: list[tuple[torch.Tensor, torch.Tensor]] = []
    classes = 0
    for number, batch in enumerate(batches):
        inputs = inputs_for(float_model, batch, f"batch {number}")
        outputs = [pytree.tree_leaves(model(*inputs)) for model in models]
        pairs = [(a, b) for a, b in zip(*outputs, strict=True) if is_float(a)]
        ratios += [sqnr_db(expected, found) for expected, found in pairs]
        if len(pairs) == 1 and pairs[0][0].dim() == 2 and (classes := pairs[0][0].shape[1]) > 1:
            choices.append((pairs[0][0].argmax(1), pairs[0][1].argmax(1)))
    samples, lowest = data.evaluation.samples, min(ratios, default=math.nan)
    if len(choices) < len(data.evaluation):
        return Evaluation(samples, data.is_unseen, lowest)
    expected, found = (torch.cat(each) for each in zip(*choices, strict=True))
    agreement = float((expected == found).float().mean())
    return Evaluation(samples, data.is_unseen, lowest, agreement, *_top1(expected, found, data, classes))


def _top1(chosen: torch.Tensor, found: torch.Tensor, data: Data, outputs: int) -> tuple[float | None, float | None]:
    """Returns the share of right classes of each model, where there are as many folders as outputs."""
    if len(data.class_names) != outputs:
        return None, None
    labels = torch.tensor([label for batch in data.classes for label in batch])
    return float((chosen == labels).float().mean()), float((found == labels).float().mean())
