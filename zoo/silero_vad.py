"""Silero VAD: is there speech in 32 ms of sound. 0.31 M parameters, a Fourier transform as a convolution, an LSTM cell.

Weights: silero-vad (MIT). Sound: the labelled telephone call of pyannote-audio (MIT).
"""

from __future__ import annotations

import warnings
import wave
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from zoo.packages import folder

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

RATE = 16000
CONTEXT, STEP = 64, 512
"""Samples of the step before that are heard again, and of a step."""
WIDTH = 128
LABEL = 160
"""Samples for each label: 10 ms."""
CALIBRATION_SECONDS = 10
NOISE_DB = (None, 30, 20, 15, 10, 5, 2, 0)
"""Signal-to-noise ratio of each copy of the call; None: as it is."""


class SileroVad(nn.Module):
    """Sound ``(batch, 576)`` at 16 kHz and the state, twice ``(batch, 128)`` -> probability ``(batch, 1)``, state."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.encoder = nn.ModuleList(
            nn.Conv1d(inputs, outputs, 3, stride, 1)
            for inputs, outputs, stride in ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        )
        self.rnn = nn.LSTMCell(WIDTH, WIDTH)
        self.decoder = nn.Conv1d(WIDTH, 1, 1)

    def forward(
        self, sound: torch.Tensor, hidden: torch.Tensor, carried: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spectrum = self.stft(F.pad(sound, (0, 64), "reflect").unsqueeze(1))
        features = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        for layer in self.encoder:
            features = F.relu(layer(features))
        hidden, carried = self.rnn(features.squeeze(-1), (hidden, carried))
        return torch.sigmoid(self.decoder(F.relu(hidden).unsqueeze(-1))).squeeze(-1), hidden, carried


def load(batch: int = 8) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Returns the model in eval mode and example inputs: sound ``(batch, 576)`` and a state of zeros."""
    path = folder("silero_vad") / "data" / "silero_vad.jit"
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*torch.jit.load", DeprecationWarning
        )  # The package has no other form of it.
        weights = torch.jit.load(path, map_location="cpu").state_dict()
    model = SileroVad()
    model.load_state_dict({name: weights[f"_model.{_name_there(name)}"] for name in model.state_dict()})
    sound = torch.randn(batch, CONTEXT + STEP, generator=torch.Generator().manual_seed(0)) * 0.1
    return model.eval(), (sound, *state(batch))


def _name_there(name: str) -> str:
    """Returns the name of a parameter in the package's program."""
    module, _, kind = name.rpartition(".")
    if module.startswith("encoder."):
        return f"{module}.reparam_conv.{kind}"
    there = {"stft": "stft.forward_basis_buffer", "decoder": f"decoder.decoder.2.{kind}"}
    return there.get(module, f"decoder.rnn.{kind}")


def state(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the state before the first step."""
    return torch.zeros(batch, WIDTH), torch.zeros(batch, WIDTH)


def call() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a telephone call ``(samples,)`` of 30 s, and whether someone speaks, for every 10 ms of it."""
    sample = folder("pyannote") / "audio" / "sample"
    sound = read_wav(sample / "sample.wav")
    speech = torch.zeros(len(sound) // LABEL, dtype=torch.bool)
    for line in (sample / "sample.rttm").read_text().splitlines():
        if line.strip():
            start, length = (float(field) for field in line.split()[3:5])
            speech[int(start * 100) : int((start + length) * 100)] = True
    return sound, speech


def read_wav(path: Path) -> torch.Tensor:
    """Returns the samples of a file of one channel, 16 kHz and 16 bits, in ``[-1, 1)``."""
    with wave.open(str(path)) as file:
        form = (file.getnchannels(), file.getframerate(), file.getsampwidth())
        if form != (1, RATE, 2):
            raise ValueError(f"{path}: {form} channels, Hz, bytes; it takes (1, {RATE}, 2)")
        samples = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(samples, dtype=torch.int16).float() / 32768


def noisy(sound: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Returns the sound with white noise of each of ``NOISE_DB``: ``(8, samples)``."""
    generator = torch.Generator().manual_seed(seed)
    loudness = sound.square().mean().sqrt()
    copies = [sound]
    for decibels in NOISE_DB[1:]:
        assert decibels is not None
        noise = torch.randn(len(sound), generator=generator) * loudness * 10 ** (-decibels / 20)
        copies.append(sound + noise)
    return torch.stack(copies)


def steps(sound: torch.Tensor) -> list[torch.Tensor]:
    """Returns the inputs for the steps of sounds ``(batch, samples)``, each ``(batch, 576)``."""
    padded = F.pad(sound, (CONTEXT, -sound.shape[1] % STEP))
    return list(padded.unfold(1, CONTEXT + STEP, STEP).unbind(1))


def metric(run: Run, start: int = 0) -> float:
    """Returns the F1 score of speech, over every 10 ms of the call, as it is and at seven levels of noise.

    Args:
        run: the model, for a batch of 8.
        start: seconds that are left out at the beginning; ``CALIBRATION_SECONDS`` for what is calibrated on them.
    """
    sound, speech = call()
    sound, speech = sound[start * RATE :], speech[start * RATE // LABEL :]
    hidden, carried = state(len(NOISE_DB))
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for chunk in steps(noisy(sound)):
            probability, hidden, carried = (each.clone() for each in run(chunk.contiguous(), hidden, carried))
            found.append(probability)
    of_samples = torch.cat(found, 1).repeat_interleave(STEP, 1)
    is_speech = of_samples[:, : LABEL * len(speech)].unflatten(1, (-1, LABEL)).mean(2) > 0.5
    right = (is_speech & speech).sum()
    return float(2 * right / (is_speech.sum() + speech.sum() * len(is_speech)))


def calibration(batches: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns inputs of so many steps, spread over the beginning of the call, with the state that the model has there.

    The noise is other noise than the metric's.
    """
    model, (_, hidden, carried) = load(len(NOISE_DB))
    sound, _ = call()
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for chunk in steps(noisy(sound[: CALIBRATION_SECONDS * RATE], seed=1)):
            found.append((chunk.contiguous(), hidden, carried))
            _, hidden, carried = model(*found[-1])
    return [found[index * len(found) // batches] for index in range(batches)]
