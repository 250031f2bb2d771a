"""Writes the figures of the benchmarks and of the demo into the tables of the documentation.

``python -m bench._tables`` takes ``build/*.json``, keeps them in ``docs/results/`` and rewrites what stands between
``<!-- results: NAME -->`` and ``<!-- end -->`` in README.md and docs/*.md. So no figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
REGION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet18": "ResNet-18",
    "bert_encoder": "BERT encoder, 12 layers",
    "crepe_tiny": "CREPE tiny",
    "mobilenet_v2": "MobileNetV2, initial weights",
}
FILES = {
    "float": "float",
    "int8": "int8 linear layers, float16 tables",
    "int8, tables too": "and 8-bit embedding tables",
    "torchao, scalars kept": "torchao, scalars kept",
}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def workflow(figures: Any) -> str:
    """Returns the table of ``bench.workflow``, and a line on its scaling."""
    header = ("model", "prepare + convert", "torchao", "times faster", "calibration, min-max", "calibration, histogram")
    rows = [
        (
            MODELS[name],
            f"{one['ours']['prepare_s']:.2f} + {one['ours']['convert_s']:.2f} s",
            f"{one['torchao']['prepare_s'] + one['torchao']['convert_s']:.1f} s",
            f"{one['times_faster']:.0f}",
            f"{one['min_max']:.2f}",
            f"{one['histogram']:.2f}",
        )
        for name, one in figures["models"].items()
    ]
    seconds = ", ".join(f"{size} layers {value:.2f} s" for size, value in figures["linears"].items())
    return f"{table(header, rows)}\nLinear layers: {seconds}.\n"


def dynamic(figures: Any) -> str:
    """Returns the table of ``bench.dynamic``."""
    header = ("file", "probe accuracy", "MB", "size", "latency to float", "to torchao")
    rows = [
        (
            FILES[name],
            f"{one['accuracy']:.4f}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['size_ratio']:.2f}",
            f"{one['latency_ratio']:.2f}",
            f"{one['latency_ratio_to_torchao']:.2f}",
        )
        for name, one in figures["files"].items()
    ]
    return table(header, rows)


def observers(figures: Any) -> str:
    """Returns the search of histograms of ``bench.observers``, in ms."""
    ranges = figures["calculate_qparams_ms"]
    header = ("data", *next(iter(ranges.values())))
    return table(header, [(name, *(f"{value:.1f}" for value in one.values())) for name, one in ranges.items()])


def qat_prepare(figures: Any) -> str:
    """Returns the table of ``bench.qat_prepare``."""
    header = ("model", "prepare + convert", "torchao", "times faster")
    rows = [
        (name, *(f"{sum(one[side].values()):.2f} s" for side in ("ours", "torchao")), f"{one['times_faster']:.0f}")
        for name, one in figures.items()
    ]
    return table(header, rows)


def demo(figures: Any) -> str:
    """Returns the table of ``make demo``."""
    rows: list[tuple[str, ...]] = []
    for model, title, unit in (
        ("waifu2x", "**waifu2x** (super-resolution), PSNR on 24 crops", " dB"),
        ("efficientnet_lite0", "**EfficientNet-Lite0**, top-1 on 460 views of 23 photographs", ""),
    ):
        columns = [figures[model][name] for name in ("float", "int8", "torchao")]
        digits = 2 if unit else 3
        rows.append((title, *(f"{one['metric']:.{digits}f}{unit}" for one in columns)))
        if "nll" in columns[0]:
            rows.append(("negative log-likelihood", *(f"{one['nll']:.3f}" for one in columns)))
        rows.append(("agreement with the float model", *(str(one["agreement"]) for one in columns)))
        rows.append(("file", *(f"{one['bytes'] / 1e6:.2f} MB" for one in columns)))
        rows.append(("latency", *(f"{one['latency_ms']:.1f} ms" for one in columns)))
        rows.append(("latency over float", *(f"{one['latency_over_float']:.2f}" for one in columns)))
    return table(("", "float", "int8, zeropoint", "int8, torchao"), rows)


def qat(figures: Any) -> str:
    """Returns the accuracies of ``bench.qat``."""
    header = ("weights", "method", "accuracy %", "mean", "lost", "converted to prepared", "same predictions", "runtime")
    base = figures["accuracy"]["float"]
    rows: list[tuple[str, ...]] = [("float", "", f"{base:.1f}", "", "", "", "", "")]
    for bits, methods in figures["accuracy"].items():
        for method, one in methods.items() if bits != "float" else ():
            runs = one.get("runs", [])
            found = ", ".join(f"{run['accuracy']:.1f}" for run in runs) or f"{one['accuracy']:.1f}"
            cells = [bits, method, found, f"{one['accuracy']:.2f}", f"{base - one['accuracy']:.2f}"]
            rows.append((*cells, *_agreement(runs)))
    return table(header, rows)


def _agreement(runs: Sequence[Any]) -> tuple[str, ...]:
    """Returns the worst of the runs of a method that is checked: steps, same predictions, those of the runtime."""
    if not runs or "steps" not in runs[0]:
        return "", "", ""
    shares = (min(run[key] for run in runs) for key in ("same_predictions", "runtime_agrees"))
    return f"{max(run['steps'] for run in runs):.2f} LSB", *(f"{share:.1%}" for share in shares)


def qat_steps(figures: Any) -> str:
    """Returns the times of a training step of ``bench.qat``."""
    steps = figures["steps"]
    names = [key.removesuffix(", to float") for key in steps if key.endswith(", to float")]
    rows = [(name, *(f"{steps[f'{name}, to {other}']:.2f}" for other in ("float", "torchao"))) for name in names]
    return table(("a step", "to float", "to torchao's"), rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "workflow": ("workflow", workflow),
    "dynamic": ("dynamic", dynamic),
    "observers": ("observers", observers),
    "qat_prepare": ("qat_prepare", qat_prepare),
    "qat": ("qat", qat),
    "qat_steps": ("qat", qat_steps),
    "demo": ("demo", demo),
}
"""Of each region: the name of its results, and what makes the table of them."""


def filled(text: str) -> str:
    """Returns a page with the tables of the kept results in it."""

    def fill(region: re.Match[str]) -> str:
        results, make = TABLES[region[2]]
        figures = json.loads((RESULTS / f"{results}.json").read_text())
        return f"{region[1]}{make(figures)}{region[3]}"

    return REGION.sub(fill, text)


def main() -> None:
    """Takes what was measured last, and writes the pages."""
    RESULTS.mkdir(exist_ok=True)
    for name in dict.fromkeys(results for results, _ in TABLES.values()):
        made = ROOT / "build" / f"{name}.json"
        if made.exists():
            shutil.copyfile(made, RESULTS / made.name)
            print(f"taken: {made.relative_to(ROOT)}", file=sys.stderr)
    for page in PAGES:
        if (text := page.read_text()) != filled(text):
            page.write_text(filled(text))
            print(f"written: {page.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
