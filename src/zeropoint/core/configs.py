"""What a user chooses for a whole backend: one spec for each role of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from zeropoint.core.arguments import require_bool
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import QuantizationSpec, is_spec

OperatorPatternType: TypeAlias = list[Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The specs of activations, weights and biases; None: that role stays float.

    Raises:
        SpecError: a role has something that is no spec.
    """

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False

    def __post_init__(self) -> None:
        require_bool("is_qat", self.is_qat, "QuantizationConfig")
        for role in ("input_activation", "output_activation", "weight", "bias"):
            spec = getattr(self, role)
            if spec is not None and not is_spec(spec):
                remedy = "Give a QuantizationSpec, or None to leave it float."
                raise SpecError(f"{role}={spec!r} is no quantization spec", where="QuantizationConfig", remedy=remedy)

    @property
    def is_dynamic(self) -> bool:
        """True when activations get their scale at run time."""
        return self.input_activation is not None and self.input_activation.is_dynamic


class OperatorConfig(NamedTuple):
    """A configuration and the operator patterns that it applies to."""

    config: QuantizationConfig
    operators: list[OperatorPatternType]
