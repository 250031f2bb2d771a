"""The backends that zeropoint has, for those who choose one."""

from __future__ import annotations

from dataclasses import dataclass

from zeropoint.backends import xnnpack
from zeropoint.core.extras import installed_version


@dataclass(frozen=True, slots=True)
class KnownBackend:
    """A backend in a few words.

    Args:
        name: what ``quantize(backend=...)`` takes.
        package: what lowering and running need; ``extra`` of zeropoint installs it.
        file: what it makes.
        runs_on: processors.
        schemes: how activations may be quantized.
        activations, weights: the integers of each.
        operators: what it computes in integers: the rows of its table.
    """

    name: str
    package: str
    extra: str
    file: str
    runs_on: str
    schemes: tuple[str, ...]
    activations: str
    weights: str
    operators: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """Version of its package; None: it is not installed."""
        return installed_version(self.package)


BACKENDS = (
    KnownBackend(
        "xnnpack",
        "executorch",
        "executorch",
        ".pte, for the ExecuTorch runtime",
        "ARM and x86 processors",
        ("static", "dynamic"),
        "int8, one scale per tensor; at run time, one per token",
        "int8, one scale per channel or per tensor; with dynamic activations 4 bits per group too",
        tuple(pattern.name for pattern in xnnpack.XNNPACKQuantizer.table.patterns),
    ),
)
