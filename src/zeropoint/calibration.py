"""The user's calibration data: checked batch by batch, the first ones kept for what needs them again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from zeropoint.core.errors import CalibrationError
from zeropoint.graph.inputs import inputs_for

KEPT_SAMPLES = 64
KEPT_BYTES = 256 * 2**20
"""How much of the data is kept in memory: the first batches, up to so many samples and bytes, and one at least."""


class CalibrationData:
    """Batches of a model's inputs, read once from the user's iterable.

    Args:
        data: batches, each a tuple of positional inputs or one tensor.
        model: the graph that they are for.
        name: what errors call a batch; its number follows.

    ``count`` is the number of batches, None where the iterable does not know; ``kept`` holds the first of them.

    Raises:
        CalibrationError: there is no batch, or one does not fit the model.
        NonFiniteError: an input holds NaN or infinity.
    """

    def __init__(self, data: Iterable[Any], model: GraphModule, name: str = "calibration batch") -> None:
        self._model, self._name = model, name
        self.count = _count(data)
        self._rest = enumerate(_iterate(data))
        self.kept = list(self._first())
        if not self.kept:
            remedy = "Give some batches of real data: 100 to 500 samples are enough for most models."
            raise CalibrationError("calibration_data is empty", where="quantize", remedy=remedy)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yields every batch, once: the kept ones, then the others as they are read."""
        yield from self.kept
        for index, batch in self._rest:
            yield self._checked(index, batch)

    def _first(self) -> Iterator[tuple[Any, ...]]:
        samples = size = 0
        while samples < KEPT_SAMPLES and size < KEPT_BYTES:
            found = next(self._rest, None)
            if found is None:
                return
            inputs = self._checked(*found)
            tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
            samples += max((len(t) for t in tensors if t.dim()), default=1)
            size += sum(t.numel() * t.element_size() for t in tensors)
            yield inputs

    def _checked(self, index: int, batch: Any) -> tuple[Any, ...]:
        return inputs_for(self._model, batch, f"{self._name} {index}")


def _count(data: Any) -> int | None:
    """Returns how many batches there are; None for a generator, and for a DataLoader over an IterableDataset."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except (TypeError, NotImplementedError):  # It has the method, and what it asks has none.
        return None


def _iterate(data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        what = f"calibration_data is {type(data).__name__}, not an iterable of batches"
        raise CalibrationError(what, where="quantize", remedy="Give a list of tuples of inputs, or a DataLoader.")
    if isinstance(data, torch.Tensor):
        remedy = "Give a list of batches: [(x,), ...]."
        raise CalibrationError("calibration_data is one tensor", where="quantize", remedy=remedy)
    return itertools.chain(data)
