"""``zeropoint doctor``."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import zeropoint
from zeropoint.backends.known import BACKENDS
from zeropoint.cli.options import DebugOption, JsonOption
from zeropoint.cli.output import write_json, write_text
from zeropoint.core.extras import installed_version
from zeropoint.core.processor import has_integer_dot_product, integer_dot_product

EXTRAS: dict[str, tuple[str, ...]] = {
    "executorch": ("executorch", "torchao"),
    "cli": ("typer", "rich", "pillow", "safetensors"),
    "report": ("jinja2", "plotly"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}
"""The packages of each extra of zeropoint."""


def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, extras and what the processor has; say what is missing for which backend."""
    del debug
    found = _found()
    if json:
        write_json(found)
    else:
        write_text("\n".join(_lines(found)))


def _found() -> dict[str, Any]:
    return {
        "zeropoint": zeropoint.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed_version("numpy"),
        "extras": {extra: {name: installed_version(name) for name in packages} for extra, packages in EXTRAS.items()},
        "processor": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "integer_dot_product": integer_dot_product(),
            "has_integer_dot_product": has_integer_dot_product(),
        },
        "problems": _problems(),
    }


def _problems() -> list[str]:
    """Returns what does not work as it is, with what to do."""
    problems = [
        f"the backend {each.name} needs the package {each.package}: pip install 'zeropoint[{each.extra}]'"
        for each in BACKENDS
        if each.version is None
    ]
    if has_integer_dot_product() is False:
        problems.append("this processor has no integer dot product: int8 may be slower than float on it")
    return problems


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{name:<12} {found[name]}" for name in ("zeropoint", "python", "torch", "numpy")]
    for extra, packages in found["extras"].items():
        there = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        lines.append(f"[{extra}]".ljust(13) + there)
    processor = found["processor"]
    known = {True: processor["integer_dot_product"], False: "none", None: "not known"}
    dot_product = known[processor["has_integer_dot_product"]]
    lines.append(
        f"processor    {processor['machine']}, {processor['cores']} cores, {processor['torch_threads']} threads of "
        f"torch, integer dot product: {dot_product}"
    )
    return [*lines, *(f"problem      {problem}" for problem in found["problems"])]
