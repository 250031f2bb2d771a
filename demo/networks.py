"""The networks of the demo: what is loaded, on what data it is judged, and by which metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo import efficientnet_lite0, waifu2x

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Network:
    """One network of the demo.

    Args:
        name: its key in ``build/demo.json``.
        title: what it is and on what it is judged.
        metric_name: name and unit of ``metric``.
        load: returns the module and its example inputs.
        calibration: batches of held-out data.
        judge: returns the figures of a run: ``metric`` and others.
        agreement: returns how far two runs agree, as text.
        picture: draws float and int8 results side by side.
    """

    name: str
    title: str
    metric_name: str
    load: Callable[[], tuple[torch.nn.Module, tuple[Any, ...]]]
    calibration: Callable[[], list[tuple[Any, ...]]]
    judge: Callable[[Run], tuple[dict[str, float], torch.Tensor]]
    agreement: Callable[[torch.Tensor, torch.Tensor], str]
    picture: Callable[[Run, Run, Path], Any] | None = None


def _judge_waifu2x(run: Run) -> tuple[dict[str, float], torch.Tensor]:
    low, _ = waifu2x.crops()
    enlarged = torch.cat([run(crop) for crop in low.split(1)])
    return {"metric": waifu2x.metric(run, batch=1)}, enlarged


def _agree_pictures(reference: torch.Tensor, other: torch.Tensor) -> str:
    if torch.equal(reference, other):
        return "the same"
    return f"{float(waifu2x.psnr(other.clamp(0, 1), reference.clamp(0, 1)).mean()):.1f} dB"


def _judge_efficientnet(run: Run) -> tuple[dict[str, float], torch.Tensor]:
    scores = efficientnet_lite0.metrics(run, batch=1)
    return {"metric": scores.top1, "top5": scores.top5, "nll": scores.negative_log_likelihood}, scores.logits


def _agree_classes(reference: torch.Tensor, other: torch.Tensor) -> str:
    return f"{float((reference.argmax(1) == other.argmax(1)).float().mean()):.1%}"


NETWORKS = (
    Network(
        "waifu2x",
        "waifu2x upconv_7: 2x super-resolution, judged on 24 crops of photographs",
        "PSNR (dB)",
        lambda: waifu2x.load(1),
        lambda: waifu2x.calibration(32, 1),
        _judge_waifu2x,
        _agree_pictures,
        lambda float_run, int8_run, path: waifu2x.side_by_side(float_run, int8_run, path, batch=1),
    ),
    Network(
        "efficientnet_lite0",
        "EfficientNet-Lite0: ImageNet classes, judged on 460 labelled views of 23 photographs",
        "top-1",
        lambda: efficientnet_lite0.load(1),
        lambda: efficientnet_lite0.calibration(80, 1),
        _judge_efficientnet,
        _agree_classes,
    ),
)
