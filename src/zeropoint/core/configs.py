"""What a user chooses for a whole backend: one spec for each role of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from zeropoint.core.specs import QuantizationSpec

OperatorPatternType: TypeAlias = list[Callable[..., Any]]


@dataclass(frozen=True)
class QuantizationConfig:
    """The specs of activations, weights and biases; None: that role stays float."""

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False

    @property
    def is_dynamic(self) -> bool:
        """True when activations get their scale at run time."""
        return self.input_activation is not None and self.input_activation.is_dynamic


class OperatorConfig(NamedTuple):
    """A configuration and the operator patterns that it applies to."""

    config: QuantizationConfig
    operators: list[OperatorPatternType]
