"""Training of ``bench.qat``: one network, one loop, and the ways to prepare it for training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.configs import QuantizationConfig
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize
from zeropoint.numerics.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from zoo.mnist import Digits, mobile_net

BATCH = 50
FLOAT_EPOCHS = 20
FLOAT_RATE = 0.2
QAT_EPOCHS = 4
QAT_RATE = 0.02
SCALE_RATE = 0.1
"""Rate of learned scales and zero points, to that of weights. A scale of 8 bits that spans the observed range is a
fifth of the one that LSQ begins with, for which its gradient is balanced. At the full rate scales of 8 bits jitter, and
cost 0.2 points: means of seven trainings each were 98.2 and, with this rate, 98.5."""
OBSERVED = 40
"""Steps in which ranges are observed before they are learned."""
EPS = 2**-12


def weight_range(bits: int) -> dict[str, int]:
    """Returns the integers of weights, as arguments of a configuration."""
    return {"weight_qmin": -127, "weight_qmax": 127} if bits == 8 else {"weight_qmin": -8, "weight_qmax": 7}


def batches(data: Digits, epochs: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches in another order in each epoch, each moved by up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            move = torch.randint(-2, 3, (2,), generator=generator).tolist()
            yield torch.roll(data.pictures[chosen], move, (2, 3)), data.labels[chosen]


def train(model: Any, data: Digits, epochs: int, rate: float, seed: int, before: Callable[[int], None]) -> None:
    """Trains by SGD with a rate that rises and falls; ``before`` is called with the number of each step."""
    optimizer = torch.optim.SGD(parameter_groups(model, rate), momentum=0.9, nesterov=True)
    steps = epochs * len(data.labels) // BATCH
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for number, (pictures, labels) in enumerate(batches(data, epochs, seed)):
        before(number)
        train_step(model, optimizer, pictures, labels)
        schedule.step()


def parameter_groups(model: Any, rate: float) -> list[dict[str, Any]]:
    """Returns the parameters with their rates: learned scales and zero points have one of their own."""
    fakes = [module for module in model.modules() if isinstance(module, LearnableFakeQuantize)]
    learned = {id(parameter) for fake in fakes for parameter in fake.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in learned], "lr": rate}]
    if learned:
        scales = [p for p in model.parameters() if id(p) in learned]
        groups.append({"params": scales, "lr": rate * SCALE_RATE})
    return groups


def train_step(model: Any, optimizer: torch.optim.Optimizer, pictures: torch.Tensor, labels: torch.Tensor) -> None:
    loss = F.cross_entropy(model(pictures), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def predictions(model: Any, data: Digits) -> torch.Tensor:
    """Returns the class that the model gives each picture."""
    return torch.cat([model(pictures).argmax(1) for pictures in data.pictures.split(BATCH)])


def accuracy(found: torch.Tensor, data: Digits) -> float:
    """Returns the share of right predictions, in percent."""
    return float((found == data.labels).double().mean()) * 100


def float_network(data: Digits, seed: int = 0) -> nn.Module:
    """Returns the trained network, in train mode."""
    model = mobile_net(seed)
    train(model, data, FLOAT_EPOCHS, FLOAT_RATE, seed, lambda _: None)
    return model


def exported(model: nn.Module, data: Digits, *, training: bool) -> torch.fx.GraphModule:
    return torch.export.export(copy.deepcopy(model).train(training), (data.pictures[:BATCH],)).module()


def learned(config: QuantizationConfig) -> QuantizationConfig:
    """Returns the configuration with ranges that are learned (LSQ, LSQ+)."""

    def of(spec: Any, observer: Any) -> Any:
        fake = LearnableFakeQuantize.with_args(observer=observer, use_grad_scaling=True, eps=EPS)
        return replace(spec, observer_or_fake_quant_ctr=fake)

    activation = of(config.input_activation, MovingAverageMinMaxObserver)
    weight = of(config.weight, MovingAveragePerChannelMinMaxObserver)
    return replace(config, input_activation=activation, output_activation=activation, weight=weight)


@dataclass(frozen=True)
class Method:
    """A way to train: how a graph is prepared, and what happens before each step of the training."""

    name: str
    prepare: Callable[[torch.fx.GraphModule, int], Any]
    before: Callable[[Any, int], Callable[[int], None]]
    is_torchao: bool = False


def _ours(graph: torch.fx.GraphModule, bits: int) -> Any:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, **weight_range(bits))
    return zp.prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))


def _learning(graph: torch.fx.GraphModule, bits: int) -> Any:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, **weight_range(bits))
    return zp.prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(learned(config)))


def _torchao(graph: torch.fx.GraphModule, bits: int) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    config = theirs.get_symmetric_quantization_config(is_per_channel=True, is_qat=True, **weight_range(bits))
    return prepare_qat_pt2e(graph, theirs.XNNPACKQuantizer().set_global(config))


def _scheduled(**steps: Any) -> Callable[[Any, int], Callable[[int], None]]:
    def begin(model: Any, count: int) -> Callable[[int], None]:
        schedule = zp.QATSchedule(freeze_ranges_after=count * 3 // 4, **steps)
        return lambda _: schedule.step(model)

    return begin


def _as_scheduled(model: Any, count: int) -> Callable[[int], None]:
    """Does with torchao's switches what the schedule does."""
    from torchao.quantization.pt2e import disable_observer

    return lambda number: model.apply(disable_observer) if number == count * 3 // 4 else None


METHODS = (
    Method("QAT, moving average", _ours, _scheduled()),
    Method("QAT, learned (LSQ)", _learning, _scheduled(learn_ranges_after=OBSERVED)),
    Method("torchao's QAT", _torchao, _as_scheduled, is_torchao=True),
)


def trained(method: Method, prepared: Any, data: Digits, seed: int) -> Any:
    """Returns a copy of the prepared model after its training."""
    model = copy.deepcopy(prepared)
    count = QAT_EPOCHS * len(data.labels) // BATCH
    train(model, data, QAT_EPOCHS, QAT_RATE, seed, method.before(model, count))
    return model


def calibrated(model: nn.Module, data: Digits, bits: int, count: int = 20) -> torch.fx.GraphModule:
    """Returns the network quantized without training, its ranges those of ``count`` batches."""
    config = get_symmetric_quantization_config(is_per_channel=True, **weight_range(bits))
    prepared = zp.prepare_pt2e(exported(model, data, training=False), XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for pictures in itertools.islice(data.pictures.split(BATCH), count):
            prepared(pictures)
    return zp.convert_pt2e(prepared)
