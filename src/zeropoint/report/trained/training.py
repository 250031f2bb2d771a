"""What training inside of ``quantize`` gave, beside what there was before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.graph.copies import copy_graph
from zeropoint.report.trained.check_convert import ConvertCheck

EVALUATE = "evaluate"
FIT = "dB of fit to the float model"


@dataclass(frozen=True, slots=True)
class Training:
    """The model after training and the one before it, by the same measure; the result of ``quantize`` is the kept one.

    Args:
        kept: "qat", the trained model, or "ptq", what post-training quantization gave.
        metric: what the two figures are, higher being better: what the user's "evaluate" gave; or, without it, "dB of
            fit to the float model", see ``fit_db``.
        ptq: the figure of the model before training.
        qat: that of the trained one; NaN where it has none.
        check: the trained model against what was converted, site by site.
        warning: what speaks against training, or against the figures; empty where nothing does.
        ptq_model, qat_model: both converted models.
    """

    kept: Literal["qat", "ptq"]
    metric: str
    ptq: float
    qat: float
    check: ConvertCheck
    warning: str
    ptq_model: GraphModule = field(repr=False)
    qat_model: GraphModule = field(repr=False)

    def lines(self) -> list[str]:
        """Returns which model was kept and both figures, then the warning if there is one."""
        name = "the trained model" if self.kept == "qat" else "the model before training"
        sites = f"converted as trained at {len(self.check.sites)} sites"
        told = f"training  kept {name}; {self.metric}: {self.ptq:.6g} before, {self.qat:.6g} trained; {sites}"
        return [told, *([f"warning   {self.warning}"] if self.warning else [])]


def decide(metric: str, ptq: float, qat: float) -> tuple[Literal["qat", "ptq"], str]:
    """Returns which model is kept, and the warning.

    By the user's measure it is the better one, the trained one where both are equal. The fit to the float model is no
    such measure: training for labels leaves that model. By it the trained model is kept, with a warning where it fits
    less than before; unless it fits worse than the mean of the outputs would, and worse than before: it is another
    function.
    """
    if metric == EVALUATE:
        if qat >= ptq:
            return "qat", ""
        return "ptq", f"training made the model worse, from {ptq:.6g} to {qat:.6g}: the one before it is kept"
    remedy = "give evaluate=, a measure of your own"
    if math.isnan(ptq) or math.isnan(qat):
        return "qat", f"which of the two is better was not measured, as no output is a float: {remedy}"
    if qat >= ptq:
        return "qat", ""
    if qat < 0:
        what = f"the trained model is further from the float model than the mean of its outputs is ({qat:.1f} dB)"
        return "ptq", f"{what}: the one before training is kept; if it is better, {remedy}"
    what = f"training moved the model away from the float one, from {ptq:.1f} to {qat:.1f} dB, as labels do too"
    return "qat", f"{what}: whether it is better was not measured, {remedy}"


def fit_to(float_model: GraphModule, model: GraphModule, batches: Sequence[tuple[Any, ...]]) -> float:
    """Returns the lowest ``fit_db`` of a float output of a model over all batches; NaN where all are integers."""
    expected, found = (_outputs(each, batches) for each in (float_model, model))
    return min(
        (fit_db(e, f) for e, f in zip(expected, found, strict=True) if e[0].is_floating_point()), default=math.nan
    )


@torch.no_grad()
def _outputs(model: GraphModule, batches: Sequence[tuple[Any, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """Returns the tensors of each output, one for each batch. Buffers of the model stay."""
    model = copy_graph(model)
    results = [[t for t in pytree.tree_leaves(model(*b)) if isinstance(t, torch.Tensor)] for b in batches]
    return list(zip(*results, strict=True))


def fit_db(reference: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Returns ``10 log10(sum((ref - mean(ref))^2) / sum((ref - actual)^2))`` over tensors, in dB.

    The mean is that over samples, the first axis, so that 0 dB is what a constant answer reaches; over all values where
    tensors differ in shape or are one sample. Infinite for equal tensors, minus infinity for a constant reference or
    where one alone is not finite.
    """
    if any(r.shape != a.shape for r, a in zip(reference, actual, strict=True)):
        return -math.inf
    whole, other = _joined(reference), _joined(actual)
    same = (whole == other) | (whole.isnan() & other.isnan())
    noise = float((whole - other).masked_fill(same, 0.0).square().sum())
    if noise == 0.0:
        return math.inf
    finite = whole.masked_fill(~whole.isfinite(), 0.0)
    signal = float((finite - finite.mean(0)).square().sum())
    return 10 * math.log10(signal / noise) if math.isfinite(noise) and signal > 0 else -math.inf


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns all samples one after the other, ``(samples, ...)``; or all values, ``(values,)``."""
    samples = [each.detach().double() for each in tensors]
    if all(each.dim() for each in samples) and len({each.shape[1:] for each in samples}) == 1:
        joined = torch.cat(samples)
        return joined if len(joined) > 1 else joined.flatten()
    return torch.cat([each.flatten() for each in samples])
