"""What differs between backends besides their operators, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zeropoint.core.errors import SpecError

RECORD_KEY = "zeropoint"
"""Metadata of a model: the record of its quantization, whose ``policy`` is that of the backend that it is made for."""
CORRECTED_KEY = "zeropoint_corrected"
"""Metadata of a converted model: names of the layers whose biases were corrected for the noise at them."""
EQUALIZED_KEY = "zeropoint_equalized"
"""Metadata of a model whose channels were equalized: names of two layers, and what each channel was divided by."""
BIASES = ("float", "float on the int32 grid")
TABLES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class BackendPolicy:
    """How a backend wants a converted graph.

    Args:
        name: the backend's name.
        bias: what becomes of biases that the configuration has no spec for. ``"float"``: they stay as they are;
            ``"float on the int32 grid"``: float in the graph, quantized by the backend itself to int32 with scale
            ``s_x * s_w``, so their values are rounded to that grid at convert.
        tables: how embedding tables that stay float are stored where no activation has a fixed scale, as in language
            models whose activations are quantized at run time.

    Raises:
        SpecError: ``bias`` or ``tables`` is something else.
    """

    name: str
    bias: Literal["float", "float on the int32 grid"]
    tables: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            remedy = f"Use one of {', '.join(map(repr, BIASES))}; a bias of integers is a QuantizationConfig's spec."
            raise SpecError(f"bias={self.bias!r} is unknown", where="BackendPolicy", remedy=remedy)
        if self.tables not in TABLES:
            remedy = f"Use one of {', '.join(map(repr, TABLES))}; tables of bytes are EmbeddingQuantizer's."
            raise SpecError(f"tables={self.tables!r} is unknown", where="BackendPolicy", remedy=remedy)
