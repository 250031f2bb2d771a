"""Trainings and calibrations that are saved in one process and go on in another: ``python -m resumable FOLDER``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import qat_quantizers as qat
import quantizers
import torch
from quantizers import ByHand, activation
from torch import nn

from zeropoint.algorithms.qat_schedule import QATSchedule
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.numerics import observers
from zeropoint.numerics.affine_fake_quantize import AffineFakeQuantize
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.granularity import PerAxis, PerTensor
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize
from zeropoint.numerics.mapping import MappingType
from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

SIZES = (4, 3, 6, 6)
AT, STEPS = (1, 3, 5, 7), 9
"""Steps before which a training is saved, and how many there are."""


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)]
    layers += [nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU6()]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))
    models.randomize_norms(module)
    return module


def inputs(step: int) -> torch.Tensor:
    return torch.randn(SIZES, generator=torch.Generator().manual_seed(step)) * (10 - step)


def xnnpack(act: Any = None) -> XNNPACKQuantizer:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    if act is not None:
        changed = replace(config.input_activation, observer_or_fake_quant_ctr=act)
        config = replace(config, input_activation=changed, output_activation=changed)
    return XNNPACKQuantizer().set_global(config)


def learned(observer: Any, **settings: Any) -> Any:
    return LearnableFakeQuantize.with_args(observer=observer, **settings)


def with_learned_weights(model: Any) -> None:
    """LSQ for activations and, per channel, for weights."""
    act = activation(observer_or_fake_quant_ctr=learned(observers.MovingAverageMinMaxObserver, use_grad_scaling=True))
    kind = replace_fake(qat.OURS, learned(observers.MovingAveragePerChannelMinMaxObserver))
    qat.qat(model, kind, act=act)


def replace_fake(kind: Any, of_weight: Any) -> Any:
    """Returns the classes of an annotation with another fake quantizer of weights."""
    changed = type(kind)(**vars(kind))
    changed.FakeQuantize = of_weight
    return changed


AFFINE = {"mapping_type": MappingType.ASYMMETRIC, "target_dtype": torch.int8, "granularity": PerTensor()}
TRAININGS = {
    "moving average": (xnnpack, {"freeze_ranges_after": 6, "freeze_batch_norm_after": 4}),
    "histogram": (lambda: by_hand(act=fake(observers.HistogramObserver)), {"freeze_ranges_after": 6}),
    "affine": (lambda: by_hand(act=affine()), {"freeze_ranges_after": 6}),
    "learned": (
        lambda: xnnpack(learned(observers.MovingAverageMinMaxObserver)),
        {"learn_ranges_after": 2, "freeze_ranges_after": 6, "freeze_batch_norm_after": 4},
    ),
    "learned, weights too": (lambda: ByHand(with_learned_weights), {"learn_ranges_after": 2}),
    "int32 biases": (lambda: by_hand(bias=qat.derived_bias), {"freeze_ranges_after": 6}),
}  # fmt: skip


def by_hand(**settings: Any) -> ByHand:
    return ByHand(lambda model: qat.qat(model, **settings))


def fake(observer: Any) -> Any:
    return activation(observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer))


def affine() -> Any:
    observer = observers.AffineQuantizedMovingAverageMinMaxObserver
    return activation(observer_or_fake_quant_ctr=AffineFakeQuantize.with_args(observer=observer, **AFFINE))


class Loop:
    """A plain loop by Adam, which may be saved and go on."""

    def __init__(self, name: str, seed: int) -> None:
        build, settings = TRAININGS[name]
        exported = torch.export.export(network(seed).train(), (inputs(0),)).module()
        self.model = prepare_qat_pt2e(exported, build())
        self.schedule = QATSchedule(1, **settings)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)

    def run(self, first: int, end: int = STEPS) -> list[float]:
        return [self.step(number) for number in range(first, end)]

    def step(self, number: int) -> float:
        torch.manual_seed(number)
        self.schedule.step(self.model)
        loss = (self.model(inputs(number)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("model", "schedule", "optimizer")}

    def load(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)


def affine_of(kind: Any, granularity: Any, mapping: MappingType = MappingType.ASYMMETRIC) -> Any:
    return kind.with_args(mapping_type=mapping, target_dtype=torch.int8, granularity=granularity)


CALIBRATIONS = {
    name: {"act": activation(observer_or_fake_quant_ctr=getattr(observers, name))}
    for name in ("MinMaxObserver", "MovingAverageMinMaxObserver", "HistogramObserver", "PercentileObserver",
                 "MSEObserver")
}  # fmt: skip
CALIBRATIONS["affine"] = {
    "act": activation(observer_or_fake_quant_ctr=affine_of(observers.AffineQuantizedMinMaxObserver, PerTensor()))
}
CALIBRATIONS["affine weights"] = {
    "weight_spec": quantizers.weight(
        observer_or_fake_quant_ctr=affine_of(
            observers.AffineQuantizedMinMaxObserver, PerAxis(0), MappingType.SYMMETRIC
        ),
        quant_min=None,
        quant_max=None,
    )
}
CALIBRATIONS["fake quantizers"] = {"act": fake(observers.MovingAverageMinMaxObserver)}
BATCHES, SEEN = 5, 2


def prepared(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model = torch.export.export(module, (inputs(0),)).module()
    return prepare_pt2e(model, ByHand(lambda m: quantizers.static(m, **CALIBRATIONS[name])))


def calibrated(model: Any, first: int, end: int = BATCHES) -> Any:
    with torch.no_grad():
        for number in range(first, end):
            model(inputs(number))
    return model


def outcome(model: Any) -> torch.Tensor:
    return convert_pt2e(calibrated(model, SEEN))(inputs(9))


def go_on(folder: Path) -> None:
    """Loads what another process saved into models of other weights, and saves what they come to."""
    for index, name in enumerate(TRAININGS):
        for at in AT:
            loop = Loop(name, seed=77)
            loop.load(torch.load(folder / f"{index} at {at}.pt"))
            losses = loop.run(at)
            torch.save((losses, dict(loop.model.state_dict())), folder / f"{index} from {at}.pt")
    for index, name in enumerate(CALIBRATIONS):
        model = prepared(name, seed=77)
        model.load_state_dict(torch.load(folder / f"calibration {index}.pt"))
        torch.save(outcome(model), folder / f"calibrated {index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    go_on(Path(sys.argv[1]))
