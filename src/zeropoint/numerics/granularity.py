"""Which elements of a tensor share one scale and zero point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from zeropoint.core.arguments import require_integer
from zeropoint.core.errors import SpecError


@dataclass(frozen=True, slots=True)
class Granularity:
    """Base of the kinds of granularity; names and fields are those of ``torchao.quantization.granularity``."""


@dataclass(frozen=True, slots=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerAxis(Granularity):
    """One scale for each index of ``axis`` (per channel). A negative axis counts from the end."""

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", require_integer("axis", self.axis, "PerAxis"))


@dataclass(frozen=True, slots=True)
class PerGroup(Granularity):
    """One scale for each run of ``group_size`` elements along the last axis."""

    group_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", _checked_size("group_size", self.group_size, "PerGroup"))


@dataclass(frozen=True, slots=True)
class PerRow(Granularity):
    """One scale for each vector along ``dim``: that axis is reduced, all others are kept."""

    dim: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", require_integer("dim", self.dim, "PerRow"))


@dataclass(frozen=True, slots=True)
class PerToken(Granularity):
    """One scale for each vector along the last axis: a token of an activation ``(..., tokens, features)``."""


@dataclass(frozen=True, slots=True)
class PerBlock(Granularity):
    """One scale for each block of the last ``len(block_size)`` axes; the axes before those have blocks of 1."""

    block_size: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, (tuple, list)):
            remedy = "Give a tuple of sizes, one for each of the last axes."
            raise SpecError(f"block_size={self.block_size!r} is no tuple", where="PerBlock", remedy=remedy)
        sizes = tuple(_checked_size("block_size", size, "PerBlock") for size in self.block_size)
        object.__setattr__(self, "block_size", sizes)


def _checked_size(name: str, value: Any, where: str) -> int:
    size = require_integer(name, value, where)
    if size < 1:
        raise SpecError(f"{name}={size} is no number of elements", where=where, remedy=f"Choose {name} >= 1.")
    return size


KINDS = (PerTensor, PerAxis, PerGroup, PerRow, PerToken, PerBlock)


def granularity_of(value: Any, where: str = "") -> Granularity:
    """Returns a granularity of any package, known by the name of its class, as one of ours.

    Raises:
        SpecError: it is none.
    """
    if isinstance(value, Granularity):
        return value
    kind = {kind.__name__: kind for kind in KINDS}.get(type(value).__name__)
    names = [] if kind is None else [field.name for field in fields(kind)]
    if kind is None or not all(hasattr(value, name) for name in names):
        remedy = "Give e.g. PerTensor(), PerAxis(0), PerGroup(32) or PerToken()."
        raise SpecError(f"granularity={value!r} is no granularity", where=where, remedy=remedy)
    return kind(*(getattr(value, name) for name in names))


def get_block_size(input_shape: Sequence[int], granularity: Any) -> tuple[int, ...]:
    """Returns ``block_size``, under the name and with the order of arguments that the field knows."""
    return block_size(granularity_of(granularity), input_shape)


def block_size(granularity: Granularity, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the size along each axis of the blocks that share one scale, in a tensor of this shape.

    Raises:
        SpecError: the axis does not exist, or a block does not divide its axis.
    """
    match granularity:
        case PerTensor():
            return tuple(shape)
        case PerAxis(axis):
            kept = checked_axis(axis, shape)
            return tuple(1 if i == kept else size for i, size in enumerate(shape))
        case PerRow(dim):
            return _along(dim, None, shape)
        case PerToken():
            return _along(-1, None, shape)
        case PerGroup(group_size):
            return _divided(granularity, _along(-1, group_size, shape), shape)
        case PerBlock(size):
            if len(size) > len(shape):
                remedy = f"Give at most {len(shape)} block sizes."
                raise SpecError(f"{granularity} has more axes than shape {tuple(shape)}", remedy=remedy)
            return _divided(granularity, (1,) * (len(shape) - len(size)) + tuple(size), shape)
        case _:
            remedy = "Use PerTensor, PerAxis, PerGroup, PerRow, PerToken or PerBlock."
            raise SpecError(f"{granularity!r} is no granularity", remedy=remedy)


def block_counts(granularity: Granularity, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the number of blocks along each axis: the shape of the scale with every axis kept.

    Raises:
        SpecError: as ``block_size``.
    """
    blocks = block_size(granularity, shape)
    return tuple(1 if size == block else size // block for size, block in zip(shape, blocks, strict=True))


def qparams_shape(granularity: Granularity, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of scale and zero point: ``()`` per tensor, ``(channels,)`` per axis, else ``block_counts``.

    Per token of ``(..., n)`` it is ``(..., 1)``; per group ``(..., n / group_size)``.

    Raises:
        SpecError: as ``block_size``.
    """
    match granularity:
        case PerTensor():
            return ()
        case PerAxis(axis):
            return (shape[checked_axis(axis, shape)],)
        case _:
            return block_counts(granularity, shape)


def reduction(block_size: Sequence[int], input_size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the shape in which each block of a tensor has axes of its own, and those axes.

    An axis that is cut into blocks becomes two, their number and their size. Reducing the axes returned leaves one
    value for each block.

    Raises:
        SpecError: the blocks do not cut such a tensor.
    """
    view: list[int] = []
    inside: list[int] = []
    if len(block_size) != len(input_size) or any(
        size % block for size, block in zip(input_size, block_size, strict=True)
    ):
        remedy = "Give one size for each axis, which divides it."
        raise SpecError(
            f"blocks of {tuple(block_size)} do not cut a tensor of shape {tuple(input_size)}", remedy=remedy
        )
    for size, block in zip(input_size, block_size, strict=True):
        if block not in (1, size):
            view.append(size // block)
        if block != 1:
            inside.append(len(view))
        view.append(size if block == 1 else block)
    return view, inside


def checked_axis(axis: int, shape: Sequence[int]) -> int:
    """Returns ``axis`` counted from 0.

    Raises:
        SpecError: a tensor of this shape has no such axis.
    """
    if -len(shape) <= axis < len(shape):
        return axis % len(shape)
    remedy = f"Choose {-len(shape)} <= axis < {len(shape)}." if len(shape) else "Use PerTensor for a scalar."
    raise SpecError(f"axis={axis} does not exist in shape {tuple(shape)}", remedy=remedy)


def _along(dim: int, block: int | None, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns blocks of ``block`` (None: the whole axis) along ``dim`` and of 1 along the other axes."""
    reduced = checked_axis(dim, shape)
    length = shape[reduced] if block is None else block
    return tuple(length if i == reduced else 1 for i in range(len(shape)))


def _divided(granularity: Granularity, blocks: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...]:
    for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        if size % block != 0:
            raise SpecError(
                f"{granularity} does not divide axis {axis} of shape {tuple(shape)}: {size} is no multiple of {block}",
                remedy=f"Choose a size that divides {size}.",
            )
    return blocks
