"""The pictures of the documentation, drawn by the build from what zeropoint computes.

A hook of mkdocs: each function of ``PICTURES`` becomes ``images/<its name>.svg``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from zeropoint.numerics.affine import dequantize, quantize
from zeropoint.numerics.observers import HistogramObserver, MinMaxObserver
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.weight_scales import steady_scale

FLOAT, INTEGER, ERROR = "#777777", "#00796b", "#c62828"


def grid(axes: Axes) -> None:
    """Real values as a line, the integers that they become as steps: what is clipped, and where the zero is."""
    x = torch.linspace(-1.5, 3.5, 2001)
    kept = _kept(x, 0.2, -3, (-8, 7))
    axes.plot(x, x, color=FLOAT, label="x")
    axes.plot(x, kept, color=INTEGER, label="s (q - z), 16 integers")
    low, high = (-8 + 3) * 0.2, (7 + 3) * 0.2
    for edge, name in ((low, "q = -8"), (high, "q = 7")):
        axes.axvline(edge, color=ERROR, linestyle=":")
        axes.annotate(name, (edge, 3.1), ha="center", color=ERROR)
    axes.annotate("z = -3: the real 0 is an integer", (0, 0), (0.35, -0.9), arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="real value x", ylabel="value kept", ylim=(-1.5, 3.5))
    axes.legend(loc="upper left", bbox_to_anchor=(0.15, 0.9))


def clipping(axes: Axes) -> None:
    """How much noise each range of a heavy-tailed tensor leaves, and which two observers choose."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((100_000,))
    ranges = np.geomspace(1.0, float(x.abs().max()), 60)
    axes.plot(ranges, [_sqnr(x, limit / 7) for limit in ranges], color=INTEGER)
    for kind, style in ((MinMaxObserver, ":"), (HistogramObserver, "--")):
        observer = kind(dtype=torch.int8, quant_min=-8, quant_max=7, qscheme=torch.per_tensor_symmetric)
        observer(x)
        scale = float(observer.calculate_qparams()[0])
        axes.axvline(scale * 7, color=ERROR, linestyle=style, label=f"{kind.__name__}: {_sqnr(x, scale):.1f} dB")
    axes.set(xlabel="largest value that is not clipped", ylabel="SQNR in dB, 4 bits", ylim=(0, None))
    axes.legend(loc="upper center")


def _sqnr(x: torch.Tensor, scale: float) -> float:
    return sqnr_db(x, _kept(x, scale, 0, (-8, 7)))


def _kept(x: torch.Tensor, scale: float, zero_point: int, limits: tuple[int, int]) -> torch.Tensor:
    """Returns what is left of values that were integers in between."""
    integers = quantize(x, scale, zero_point, torch.int8, quant_min=limits[0], quant_max=limits[1])
    return dequantize(integers, scale, zero_point)


def ties(axes: Axes) -> None:
    """How near to a half the product M a comes, for a scale as measured and for the one that convert chooses."""
    x, w, y = (torch.tensor([value]) for value in (0.0235, 0.00391, 0.0413))
    accumulators = torch.arange(-500_000, 500_000).double()
    bins = np.geomspace(1e-6, 0.5, 80)
    for weight, color, name in (
        (w, FLOAT, "as measured"),
        (steady_scale(x, w, y), INTEGER, "chosen: M = p / q, q odd"),
    ):
        product = accumulators * float(x.double() * weight.double() / y.double())
        distance = (product - product.floor() - 0.5).abs()
        axes.hist(distance.numpy(), bins=bins, color=color, alpha=0.6, label=name)
    axes.axvspan(1e-6, 1e-5, color=ERROR, alpha=0.15)
    axes.annotate("float32 errs\nby this much", (1.2e-6, 2e4), color=ERROR)
    axes.set(
        xscale="log", yscale="log", xlabel="distance of M a from the next half", ylabel="accumulators of a million"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(0.25, 1.0))


def noise(axes: Axes) -> None:
    """How SQNR grows with bits: 6 dB each, for values that fill the range evenly, less for a normal distribution."""
    torch.manual_seed(0)
    bits = range(2, 9)
    for name, x, color in (
        ("uniform", torch.rand(50_000) * 2 - 1, INTEGER),
        ("normal", torch.randn(50_000), FLOAT),
    ):
        found = [_sqnr_of(x, count) for count in bits]
        axes.plot(list(bits), found, marker="o", color=color, label=name)
    axes.plot(list(bits), [6.02 * count for count in bits], color=ERROR, linestyle=":", label="6.02 dB a bit")
    axes.set(xlabel="bits", ylabel="SQNR in dB, range of least error")
    axes.legend()


def _sqnr_of(x: torch.Tensor, bits: int) -> float:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    observer = HistogramObserver(dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    return sqnr_db(x, _kept(x, float(scale), int(zero_point), (low, high)))


PICTURES: tuple[Callable[[Axes], None], ...] = (grid, clipping, ties, noise)


def draw(picture: Callable[[Axes], None]) -> bytes:
    """Returns a picture as SVG, the same bytes each time."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    picture(axes)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.BytesIO()
    with rc_context({"svg.hashsalt": picture.__name__}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pictures to the site."""
    for picture in PICTURES:
        files.append(File.generated(config, f"images/{picture.__name__}.svg", content=draw(picture)))
    return files
