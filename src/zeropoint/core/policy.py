"""What differs between backends besides their operators, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zeropoint.core.errors import SpecError

RECORD_KEY = "zeropoint"
"""Metadata of a model: the record of its quantization, whose ``policy`` is that of the backend that it is made for."""
EQUALIZED_KEY = "zeropoint_equalized"
"""Metadata of a model whose channels were equalized: names of two layers, and what each channel was divided by."""
BIASES = ("float", "float on the int32 grid")


@dataclass(frozen=True, slots=True)
class BackendPolicy:
    """How a backend wants a converted graph.

    Args:
        name: the backend's name.
        bias: what becomes of biases that the configuration has no spec for. ``"float"``: they stay as they are;
            ``"float on the int32 grid"``: float in the graph, quantized by the backend itself to int32 with scale
            ``s_x * s_w``, so their values are rounded to that grid at convert.

    Raises:
        SpecError: ``bias`` is something else.
    """

    name: str
    bias: Literal["float", "float on the int32 grid"]

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            remedy = f"Use one of {', '.join(map(repr, BIASES))}; a bias of integers is a QuantizationConfig's spec."
            raise SpecError(f"bias={self.bias!r} is unknown", where="BackendPolicy", remedy=remedy)
