"""Ours in place of the observers and fake quantizers that torch and torchao ship, with the same settings.

The scales are the same; ours find them without loops in Python, and raise where data is missing. A class that
somebody derived from theirs is not replaced, and neither is a fake quantizer of theirs with such an observer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from zeropoint.core.errors import SpecError
from zeropoint.numerics import fake_quantize, observers
from zeropoint.numerics.observers.base import PartialWrapper

PACKAGES = ("torch.ao.quantization.", "torchao.quantization.")
REPLACED = (
    observers.MinMaxObserver,
    observers.MovingAverageMinMaxObserver,
    observers.PerChannelMinMaxObserver,
    observers.MovingAveragePerChannelMinMaxObserver,
    observers.HistogramObserver,
    observers.FixedQParamsObserver,
    observers.PlaceholderObserver,
    observers.NoopObserver,
    fake_quantize.FakeQuantize,
    fake_quantize.FixedQParamsFakeQuantize,
    fake_quantize.FusedMovingAvgObsFakeQuantize,
)
_BY_NAME = {ours.__name__: ours for ours in REPLACED}


def replaced(constructor: Any) -> Any:
    """Returns the constructor of our class with the arguments of theirs; what is not theirs comes back as it is.

    Unwraps partials of any package, nested ones too, and the constructors among the arguments (``observer=...``).
    """
    kind, arguments, late = unwrapped(constructor)
    ours = _BY_NAME.get(kind.__name__) if inspect.isclass(kind) and kind.__module__.startswith(PACKAGES) else None
    if ours is None:
        return constructor
    arguments = {name: replaced(value) for name, value in arguments.items()}
    if "observer" in arguments and not _is_ours(arguments["observer"]):
        return constructor
    return PartialWrapper(functools.partial(ours, **arguments), late)


def stock_observers(choice: str) -> Callable[[Any], Any]:
    """Returns what gives the constructor to use: for "replace" ``replaced``, for "keep" the one that it is given.

    Raises:
        SpecError: it is another word.
    """
    match choice:
        case "replace":
            return replaced
        case "keep":
            return lambda constructor: constructor
        case _:
            what = f"stock_observers={choice!r} is no choice"
            raise SpecError(what, where="prepare_pt2e", remedy='Choose "replace" or "keep".')


def unwrapped(constructor: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns the class, its arguments by name, and the functions that give further ones when it is built."""
    arguments: dict[str, Any] = {}
    late: dict[str, Any] = {}
    while isinstance(partial := getattr(constructor, "p", constructor), functools.partial):
        if partial.args:
            return None, {}, {}
        late = {**getattr(constructor, "callable_args", {}), **late}
        arguments = {**partial.keywords, **arguments}
        constructor = partial.func
    return constructor, arguments, late


def _is_ours(constructor: Any) -> bool:
    kind, _, _ = unwrapped(constructor)
    return inspect.isclass(kind) and kind.__module__.startswith("zeropoint.")
