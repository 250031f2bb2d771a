"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Generator
from importlib import metadata
from types import ModuleType
from typing import Any

from zeropoint.core.errors import MissingExtraError


def import_extra(module: str, extra: str) -> ModuleType:
    """Returns an optional module, imported without the notices that it logs on the way.

    Raises:
        MissingExtraError: it is not installed; the message says what to install.
    """
    try:
        with _quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module, module, extra) from error


def names_of(module: str, extra: str) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` by which a module of ours has the names of an optional one, imported on first use."""

    def get(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        found = import_extra(module, extra)
        if not hasattr(found, name):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(found, name)

    return get


def require_extra(module: str, extra: str) -> None:
    """Raises what ``import_extra`` would, without importing the module.

    Raises:
        MissingExtraError: it is not installed; the message says what to install.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module, module, extra) from error
    if found is None:
        raise _missing(module, module, extra)


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(name: str, module: str, extra: str) -> MissingExtraError:
    what = f"the package {name.partition('.')[0]!r} is not installed"
    return MissingExtraError(what, where=module, remedy=f"Install it with: pip install 'zeropoint[{extra}]'.")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keeps back what packages log and warn while they are imported: none of it is about the user's model."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
