"""DATA: a folder of pictures, an ``.npz`` or ``.safetensors`` file, Python that yields batches, or ``random``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zeropoint.cli.array_files import read_arrays
from zeropoint.cli.exits import UsageError
from zeropoint.cli.pictures import Pictures
from zeropoint.cli.python_names import call, find, is_python_name, items
from zeropoint.cli.settings import DataSettings
from zeropoint.core.errors import CalibrationError

FORMS = (
    "Give a folder of pictures, an .npz or .safetensors file, package.module:callable, or the word random for random "
    "data, which tells nothing about accuracy."
)
YIELDED = "Let it yield tuples of the model's inputs."
RANDOM = "random"
RANDOM_BATCHES = 16


class Batches:
    """Batches that are read when they are needed, as often as that is.

    Args:
        read: gives a batch by its number.
        numbers: of the batches, in the order that they are taken.
        samples: how many are in them.
    """

    def __init__(self, read: Callable[[int], tuple[Any, ...]], numbers: Sequence[int], samples: int) -> None:
        self._read, self._numbers, self.samples = read, numbers, samples

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (self._read(number) for number in self._numbers)


@dataclass(frozen=True, slots=True)
class Data:
    """Samples of a model's inputs.

    Args:
        name: as the user gave it.
        calibration: batches that activations are measured on.
        evaluation: batches that int8 is compared with float on.
        is_unseen: none of those that int8 is compared on is measured on.
        is_random: it is no data, but noise.
        dropped: samples that are left over where batches are larger than 1.
        classes: of each batch of the evaluation: the number of each sample's folder, where pictures are in such.
        class_names: the names of the folders, in the order of their numbers.
    """

    name: str
    calibration: Batches
    evaluation: Batches
    is_unseen: bool
    is_random: bool = False
    dropped: int = 0
    classes: tuple[tuple[int, ...], ...] = ()
    class_names: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """Returns how much of what there is."""
        kind = "random numbers, which say nothing about accuracy" if self.is_random else self.name
        unseen = "others" if self.is_unseen else "the same"
        calibration, evaluation = self.calibration.samples, self.evaluation.samples
        dropped = f"; {self.dropped} left over" if self.dropped else ""
        return f"{kind}: {calibration} samples to measure on, {evaluation} {unseen} to compare on{dropped}"


def load_data(name: str, inputs: tuple[Any, ...] | None, input_names: Sequence[str], settings: DataSettings) -> Data:
    """Returns what DATA names, as batches of the size of the model's example inputs.

    Raises:
        UsageError: it is none of the forms, or there is no data in it.
        FileError: a file is damaged, or holds pickled objects.
        CalibrationError: what is in it does not fit the model's inputs.
    """
    if name == RANDOM:
        return _random(_needed(inputs, name), settings)
    path = Path(name)
    if path.is_dir():
        return _of_pictures(Pictures(path, _needed(inputs, name), settings.image), _needed(inputs, name), settings)
    if path.suffix in (".npz", ".safetensors"):
        arrays = read_arrays(path)
        return _of_arrays(name, arrays, _needed(inputs, name), input_names, settings)
    if is_python_name(name) and not path.exists():
        return _of_python(name, settings)
    what = "it is no file of a known kind" if path.exists() else "there is no such file or folder"
    raise UsageError(what, where=name, remedy=FORMS)


def _needed(inputs: tuple[Any, ...] | None, name: str) -> tuple[Any, ...]:
    if inputs is None:
        remedy = "Let MODEL return (module, example_inputs)."
        raise UsageError(
            "the model comes without example inputs, which say the shape of its data", where=name, remedy=remedy
        )
    return inputs


def batch_size(inputs: tuple[Any, ...]) -> int:
    """Returns how many samples are in a batch: the first size of the first input."""
    first = next((each for each in inputs if isinstance(each, torch.Tensor) and each.dim()), None)
    return 1 if first is None else int(first.shape[0])


def _split(count: int, batch: int, settings: DataSettings) -> tuple[list[int], list[int], bool]:
    """Returns the numbers of the batches to measure on, those to compare on, and whether these are others."""
    numbers = list(range(count))
    random.Random(settings.seed).shuffle(numbers)
    first, second = max(1, settings.samples // batch), max(1, settings.evaluate // batch)
    unseen = numbers[first : first + second]
    return numbers[:first], unseen or numbers[:second], bool(unseen)


def _made(name: str, read: Callable[[int], Any], sizes: Sequence[int], settings: DataSettings, **more: Any) -> Data:
    """Returns the data of batches of these sizes, of which the first is the usual one."""
    measured, compared, is_unseen = _split(len(sizes), sizes[0], settings)

    def batches(numbers: Sequence[int]) -> Batches:
        return Batches(read, numbers, sum(sizes[number] for number in numbers))

    return Data(name, batches(measured), batches(compared), is_unseen, **more)


def _random(inputs: tuple[Any, ...], settings: DataSettings) -> Data:
    def read(number: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(settings.seed + number)
        return tuple(_random_like(each, generator) for each in inputs)

    return _made(RANDOM, read, [batch_size(inputs)] * RANDOM_BATCHES, settings, is_random=True)


def _random_like(example: Any, generator: torch.Generator) -> Any:
    if not isinstance(example, torch.Tensor) or example.dtype == torch.bool:
        return example
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator).to(example.dtype)
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, tuple(example.shape), generator=generator).to(example.dtype)


def _of_python(name: str, settings: DataSettings) -> Data:
    found = find(name)
    made = call(found, name, YIELDED) if callable(found) else found
    if isinstance(made, (str, bytes, dict, torch.Tensor)) or not isinstance(made, Iterable):
        what = f"it gives {type(made).__name__}, not batches"
        raise UsageError(what, where=name, remedy=YIELDED)
    batches: list[Any] = []
    sizes: list[int] = []
    for each in items(made, name):
        batch = each if isinstance(each, tuple) else tuple(each) if isinstance(each, list) else (each,)
        batches.append(batch)
        sizes.append(batch_size(batch))
        if sum(sizes) >= settings.samples + settings.evaluate:
            break
    if not batches:
        raise UsageError("it yields no batch", where=name, remedy=YIELDED)
    return _made(name, batches.__getitem__, sizes, settings)


def _of_arrays(
    name: str, arrays: dict[str, torch.Tensor], inputs: tuple[Any, ...], names: Sequence[str], settings: DataSettings
) -> Data:
    tensors = _in_order(name, arrays, inputs, names)
    counts = {len(tensor) for tensor in tensors}
    if len(counts) > 1 or 0 in counts:
        sizes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in arrays.items())
        what = f"its arrays have different numbers of samples along axis 0, or none: {sizes}"
        raise CalibrationError(what, where=name)
    (total,), batch = counts, batch_size(inputs)
    if total < batch:
        what = f"it has {total} samples, and the model takes {batch} at once"
        raise CalibrationError(what, where=name, remedy="Give more samples, or export the model for fewer.")

    def read(number: int) -> tuple[Any, ...]:
        return tuple(tensor[number * batch : (number + 1) * batch].clone() for tensor in tensors)

    return _made(name, read, [batch] * (total // batch), settings, dropped=total % batch)


def _in_order(
    name: str, arrays: dict[str, torch.Tensor], inputs: tuple[Any, ...], names: Sequence[str]
) -> list[torch.Tensor]:
    """Returns the arrays in the order of the model's inputs: by their names, or as they are where there is one only."""
    scalars = [key for key, tensor in arrays.items() if not tensor.dim()]
    if set(names) <= set(arrays) and not scalars:
        return [arrays[each] for each in names]
    numbered = [f"arr_{i}" for i in range(len(names))]  # As numpy.savez names what is given without names.
    if set(arrays) == set(numbered):
        return [arrays[each] for each in numbered]
    if len(arrays) == len(inputs) == 1 and not scalars:
        return list(arrays.values())
    what = f"it has the arrays {', '.join(arrays) or 'none'}; the model's inputs are {', '.join(names)}"
    raise CalibrationError(what, where=name, remedy="Name the arrays as the inputs; axis 0 counts the samples.")


def _of_pictures(pictures: Pictures, inputs: tuple[Any, ...], settings: DataSettings) -> Data:
    batch = batch_size(inputs)
    total = len(pictures.paths)
    if total < batch:
        what = f"it has {total} pictures, and the model takes {batch} at once"
        raise CalibrationError(what, where=str(pictures.folder), remedy="Give more, or export the model for fewer.")
    order = list(range(total))
    random.Random(settings.seed).shuffle(order)

    def samples_of(number: int) -> list[int]:
        return order[number * batch : (number + 1) * batch]

    def read(number: int) -> tuple[Any, ...]:
        return (torch.stack([pictures[sample] for sample in samples_of(number)]),)

    made = _made(str(pictures.folder), read, [batch] * (total // batch), settings, dropped=total % batch)
    if not pictures.class_names:
        return made
    _, compared, _ = _split(total // batch, batch, settings)
    classes = tuple(tuple(pictures.classes[sample] for sample in samples_of(number)) for number in compared)
    return replace(made, classes=classes, class_names=pictures.class_names)
