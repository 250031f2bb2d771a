"""What was done for accuracy beyond rounding, and why not more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AccuracyWork:
    """What was done for accuracy beyond rounding.

    Args:
        equalized: names of the two layers of each pair whose channels were equalized.
        corrected: names of the layers whose biases were corrected.
        not_equalized: why no pair was equalized; empty where one was.
        not_corrected: why no bias was corrected; empty where one was.
    """

    equalized: tuple[tuple[str, str], ...]
    corrected: tuple[str, ...]
    not_equalized: str
    not_corrected: str


def accuracy_line(work: AccuracyWork) -> str:
    """Returns what was done in one line: how many layers, or why none."""
    pairs, layers = len(work.equalized), len(work.corrected)
    equalized = f"{pairs} pair{'s' * (pairs != 1)} of layers" if pairs else f"no layers: {work.not_equalized}"
    corrected = f"the biases of {layers} layer{'s' * (layers != 1)}" if layers else f"no biases: {work.not_corrected}"
    return f"accuracy  equalized {equalized}; corrected {corrected}"
