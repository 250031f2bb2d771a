"""Reads the weights of an ncnn model: a ``.param`` text and a ``.bin`` file.

Format: ncnn wiki, "param and model file structure". Of a layer's parameters, 0 is the number of outputs, 1 the kernel
size, 3 the stride, 4 the padding, 6 the number of weights; -23310 holds those of an activation fused into the layer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FLOAT16_TAG = 0x01306B47
FLOAT32_TAG = 0
WEIGHTED = ("Convolution", "Deconvolution")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with weights: ``weight`` as stored, ``(out, in, kernel, kernel)``, and ``bias`` ``(out,)``, float32."""

    kind: str
    parameters: dict[str, str]
    weight: torch.Tensor
    bias: torch.Tensor


def read_layers(stem: Path) -> list[Layer]:
    """Returns the convolutions of ``<stem>.param`` in order, with their weights from ``<stem>.bin``.

    Raises:
        ValueError: the weights are stored in a form other than float16 and float32, or bytes are left over.
    """
    data, offset, layers = stem.with_name(f"{stem.name}.bin").read_bytes(), 0, []
    for kind, parameters in _weighted_lines(stem.with_name(f"{stem.name}.param").read_text()):
        weight, offset = _read_weight(data, offset, int(parameters["6"]))
        out, kernel = int(parameters["0"]), int(parameters["1"])
        bias = np.frombuffer(data, "<f4", out, offset)
        offset += 4 * out
        weight = weight.reshape(out, -1, kernel, kernel)
        layers.append(Layer(kind, parameters, torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())))
    if offset != len(data):
        raise ValueError(f"{stem}.bin: {len(data)} bytes, but the layers of the .param file take {offset}")
    return layers


def _weighted_lines(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields kind and parameters: a line is ``kind name inputs outputs [blob names] key=value ...``."""
    for line in text.splitlines()[2:]:
        kind, _, inputs, outputs, *rest = line.split()
        if kind in WEIGHTED:
            yield kind, dict(pair.split("=", 1) for pair in rest[int(inputs) + int(outputs) :])


def _read_weight(data: bytes, offset: int, count: int) -> tuple[np.ndarray, int]:
    """Returns ``count`` float32 weights and the offset behind them; float16 weights are padded to 4 bytes."""
    (tag,) = struct.unpack_from("<I", data, offset)
    offset += 4
    if tag == FLOAT16_TAG:
        weight = np.frombuffer(data, "<f2", count, offset).astype(np.float32)
        return weight, offset + (2 * count + 3) // 4 * 4
    if tag == FLOAT32_TAG:
        return np.frombuffer(data, "<f4", count, offset), offset + 4 * count
    raise ValueError(f"weights with storage tag {tag:#010x} at byte {offset - 4}; known: float16 and float32")
