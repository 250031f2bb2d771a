"""The error tree. Every error says where, what, and what to do; each is also the builtin that a caller expects."""

from __future__ import annotations


class ZeropointError(Exception):
    """Base of all errors of zeropoint.

    Args:
        what: what is wrong, with the value found and the value needed.
        where: the site, node, module path, file or source line it is about.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        sentence = f"{where}: {what}" if where else what
        super().__init__(f"{sentence.rstrip('.')}. {remedy}".rstrip() if remedy else sentence)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(kind: type[ZeropointError], what: str, where: str, remedy: str) -> ZeropointError:
    return kind(what, where=where, remedy=remedy)


class SpecError(ZeropointError, ValueError):
    """A spec, configuration or numeric argument that cannot hold, found when it is built."""


class AnnotationError(ZeropointError, ValueError, RuntimeError):
    """An annotation that contradicts the graph or another annotation.

    Also the builtin that programs for torchao catch when one quantizer overrules another.
    """


class RuleError(ZeropointError, ValueError):
    """A rule of the user that matches nothing, or that contradicts another rule."""


class CaptureError(ZeropointError, RuntimeError):
    """A model that cannot be exported, or that is not an exported model."""


class GraphError(ZeropointError, RuntimeError):
    """A graph that breaks an invariant, or a pass that failed on it."""


class CalibrationError(ZeropointError, RuntimeError):
    """Calibration data that is missing, malformed or never reached a tensor."""


class NonFiniteError(CalibrationError, ArithmeticError):
    """NaN or infinity met while observing."""


class StaysFloatError(ZeropointError, RuntimeError):
    """An operator that was to be quantized, and is not."""


class UnknownNameError(ZeropointError, KeyError):
    """A name of no node, and of no module."""

    __str__ = Exception.__str__  # KeyError's puts the message in quotes.


class NothingQuantizedError(ZeropointError, RuntimeError):
    """A model in which no node would be quantized."""


class LoweringError(ZeropointError, RuntimeError):
    """A converted graph that the backend would refuse, or compute wrongly."""


class VerificationError(ZeropointError, RuntimeError):
    """A lowered file whose results differ from the converted model's."""


class ComparisonError(ZeropointError, ValueError):
    """Recordings of two models that cannot be compared."""


class RuntimeFailure(ZeropointError, RuntimeError):
    """A lowered file that the runtime did not load or run."""


class MissingExtraError(ZeropointError, ImportError):
    """An optional dependency that is not installed."""


class FileError(ZeropointError, OSError):
    """A file that cannot be read or written."""
