"""Checks of one argument each. An error says the argument, its value and what to give instead."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from zeropoint.core.errors import SpecError


def require_integer(name: str, value: Any, where: str = "") -> int:
    """Returns a whole number as an int: an int, a float without a fraction, numpy's, or a tensor of one element.

    Raises:
        SpecError: it is something else; a bool counts as that.
    """
    number = _number(value)
    if number is not None and (isinstance(number, int) or number.is_integer()):
        return int(number)
    raise SpecError(f"{name}={value!r} is no integer", where=where, remedy="Give an int.")


def require_positive(name: str, value: Any, where: str = "") -> float:
    """Returns a positive finite number as a float: of Python, numpy, or a tensor of one element.

    Raises:
        SpecError: it is something else; a bool counts as that.
    """
    number = _number(value)
    if number is not None and 0 < number < math.inf:
        return float(number)
    raise SpecError(f"{name}={value!r} is not a positive finite number", where=where, remedy="Give a float above 0.")


def require_bool(name: str, value: Any, where: str = "") -> bool:
    """Returns a bool.

    Raises:
        SpecError: it is something else.
    """
    if isinstance(value, bool):
        return value
    raise SpecError(f"{name}={value!r} is no bool", where=where, remedy="Give True or False.")


def _number(value: Any) -> int | float | None:
    """Returns a number of any package, or the one in a tensor of one element, as Python's; None for anything else."""
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, Real):
        return None
    return int(number) if isinstance(number, Integral) else float(number)
