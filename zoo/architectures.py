"""Well-known architectures with random weights: for speed, structure and scale, where accuracy does not matter.

Every function is seeded and returns ``(module in eval mode, example inputs)``; none needs a package with weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator for the block and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomize_batch_norm(model: nn.Module) -> None:
    """Changes statistics and parameters of every batch norm to what training might leave, not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.downsample(x))


class ResNet18(nn.Module):
    """He et al. 2016, "Deep Residual Learning for Image Recognition", table 1. 11.7 M parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            first = BasicBlock(inputs, outputs, stride=1 if index == 1 else 2)
            self.add_module(f"layer{index}", nn.Sequential(first, BasicBlock(outputs, outputs, stride=1)))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for index in range(1, 5):
            hidden = self.get_submodule(f"layer{index}")(hidden)
        return self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


def resnet18(batch: int = 1, size: int = 224, seed: int = 0) -> Model:
    """Returns ResNet-18; input ``(batch, 3, size, size)``, output ``(batch, 1000)``."""
    with seeded(seed):
        model = ResNet18()
        randomize_batch_norm(model)
        return model.eval(), (torch.randn(batch, 3, size, size),)


class FirstOutput(nn.Module):
    """Returns only the first output of a transformers model, a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[0]


def bert_encoder(batch: int = 1, tokens: int = 128, layers: int = 12, attention: str = "sdpa", seed: int = 0) -> Model:
    """Returns the encoder of BERT-base without masks; input and output ``(batch, tokens, 768)``.

    ``attention`` is ``"sdpa"`` (one ``scaled_dot_product_attention`` per layer) or ``"eager"`` (matmuls and softmax).
    """
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    with seeded(seed):
        model = FirstOutput(BertEncoder(BertConfig(num_hidden_layers=layers, attn_implementation=attention)))
        return model.eval(), (torch.randn(batch, tokens, 768),)


def mobilenet_v2(batch: int = 1, size: int = 224, seed: int = 0) -> Model:
    """Returns MobileNet v2 with its initial weights; input ``(batch, 3, size, size)``, output ``(batch, 1001)``.

    Untrained, its activations shrink with every layer, down to 1e-22: histograms that no trained model shows.
    """
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    with seeded(seed):
        model = FirstOutput(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1001)))
        return model.eval(), (torch.randn(batch, 3, size, size),)


def linears(count: int, width: int = 64, batch: int = 8, seed: int = 0) -> Model:
    """Returns ``count`` linear layers with ReLU after each: a chain to show how cost grows with the graph."""
    with seeded(seed):
        layers = (module for _ in range(count) for module in (nn.Linear(width, width), nn.ReLU()))
        return nn.Sequential(*layers).eval(), (torch.randn(batch, width),)
