"""What differs between backends besides their operators, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class BackendPolicy:
    """How a backend wants a converted graph.

    Args:
        name: the backend's name.
        bias: ``"float"``: as it is; ``"float on the int32 grid"``: float in the graph, quantized by the backend itself
            to int32 with scale ``s_x * s_w``, so its values are rounded to that grid at convert; ``"int32"``: quantized
            in the graph.
    """

    name: str
    bias: Literal["float", "float on the int32 grid", "int32"]
