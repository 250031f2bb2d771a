"""What a configuration file of the command may say. Options of the command line go before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Scheme = Literal["static", "dynamic", "float"]
"""Activations quantized by calibration, at run time, or not at all."""
Weights = Literal["per_channel", "per_tensor"]
"""One weight scale for each output channel of a layer, or one for all."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How pictures become the model's input.

    Args:
        size: height and width in pixels; by default those of the model's input.
        resize: "stretch" to the size, "crop": the shorter side to the size and the middle of the longer one, "none":
            pictures have the size.
        scale: what the values 0 to 255 are multiplied with, before ``mean`` and ``std``.
        mean, std: for each channel: ``(x * scale - mean) / std``.
        layout: order of the axes.
        colors: order of the channels; "L" is grey, of one channel.
    """

    size: tuple[int, ...] = ()
    resize: Literal["stretch", "crop", "none"] = "crop"
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colors: Literal["RGB", "BGR", "L"] = "RGB"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How many samples are used, and how files become inputs.

    Args:
        samples: how many, at most, activations are measured on.
        evaluate: on how many, at most, int8 is compared with float; such that are not measured on, while there are any.
        seed: of the order in which samples are taken.
        image: for a folder of pictures.
    """

    samples: int = 128
    evaluate: int = 256
    seed: int = 0
    image: ImageSettings = field(default_factory=ImageSettings)


@dataclass(frozen=True, slots=True)
class RuleSettings:
    """Another scheme for some operators. One of ``module``, ``type``, ``operator`` and ``node`` is given.

    Args:
        module: path of a module, with ``*`` and ``?`` as in file names; all in it.
        type: class of modules, e.g. ``torch.nn.LayerNorm``; all in them.
        operator: e.g. ``aten.add.Tensor``, or ``add`` for every form of it.
        node: one operator, by the name that ``explain`` and ``compare`` give it.
        scheme: what these operators get.
        weights: scales of their weights, for a scheme that is not float; by default those of the configuration.
    """

    module: str = ""
    type: str = ""
    operator: str = ""
    node: str = ""
    scheme: Scheme = "float"
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What has to hold, else the command ends with exit code 3.

    Args:
        min_sqnr_db: lowest SQNR of int8 outputs against float ones, in dB.
        min_agreement: lowest share of samples with the same largest output (top-1).
        strict: paths of modules, as in rules, in which no operator may stay float.
    """

    min_sqnr_db: float | None = None
    min_agreement: float | None = None
    strict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """All of a configuration.

    Args:
        backend: where the file will run.
        scheme: of every operator that no rule selects.
        weights: scales of weights; those of each channel are better, and cost nothing on most backends.
        observer: how ranges of activations are found, for the static scheme.
        accuracy: what is done beyond rounding.
        verify: run the file and compare it with the converted model.
        data, checks, rules: see there.
    """

    backend: Literal["xnnpack"] = "xnnpack"
    scheme: Literal["static", "dynamic"] = "static"
    weights: Weights = "per_channel"
    observer: Literal["minmax", "histogram"] = "minmax"
    accuracy: tuple[Literal["equalize", "correct_biases"], ...] = ("equalize", "correct_biases")
    verify: bool = True
    data: DataSettings = field(default_factory=DataSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    rules: tuple[RuleSettings, ...] = ()
