"""Dataclasses as the schema of a TOML file: reading one with errors that say where, and writing one."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from zeropoint.cli.exits import UsageError
from zeropoint.core.extras import import_extra

T = TypeVar("T")


def read_toml(path: Path, kind: type[T]) -> T:
    """Returns a file as a dataclass.

    Raises:
        UsageError: it is not there, or no TOML; or it has a key that is not known, or a value of another type than the
            key takes: says which, and what is allowed.
    """
    tomllib = _tomllib()
    try:
        content = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path)) from error
    try:
        found = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"it is no TOML: {error}", where=str(path)) from error
    return _table(found, kind, str(path), "")


def value_of(kind: type, key: str, value: Any, where: str) -> Any:
    """Returns a value as a key of a dataclass takes it.

    Raises:
        UsageError: it takes none such: says what is allowed.
    """
    return _value(value, typing.get_type_hints(kind)[key], where, key)


def _tomllib() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10 has it not.
        return import_extra("tomli", "cli")


def _table(found: Any, kind: type[T], file: str, path: str) -> T:
    if not isinstance(found, dict):
        raise _wrong(found, "a table", file, path)
    hints = typing.get_type_hints(kind)
    for key in found:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            what = f"there is no key {_join(path, key)!r}"
            raise UsageError(what, where=file, remedy=f"{hint}Allowed here: {', '.join(hints)}.")
    values = {key: _value(value, hints[key], file, _join(path, key)) for key, value in found.items()}
    return kind(**values)


def _value(value: Any, wanted: Any, file: str, path: str) -> Any:
    """Returns a value as the type that its key takes."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return _table(value, wanted, file, path)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(value, _name(wanted), file, path)
        return tuple(_value(item, arguments[0], file, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(value, _name(wanted), file, path)
        return value
    if origin in (typing.Union, types.UnionType):  # With None, which TOML has no word for: the key is left out.
        return _value(value, arguments[0], file, path)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is float and is_number and math.isfinite(value):
        return float(value)
    if wanted is not float and type(value) is wanted:
        return value
    raise _wrong(value, _name(wanted), file, path)


def _wrong(value: Any, wanted: str, file: str, path: str) -> UsageError:
    return UsageError(f"{path} is {_toml(value) if _is_plain(value) else 'a table'}; it takes {wanted}", where=file)


def _name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"a list, each item {_name(arguments[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(json.dumps(each) for each in arguments)}"
    if dataclasses.is_dataclass(kind):
        return "a table"
    return {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}[kind]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def to_toml(value: Any) -> str:
    """Returns a dataclass as TOML: what ``read_toml`` reads as the same."""
    return "\n".join(_lines(value, "")).strip() + "\n"


def _lines(value: Any, path: str) -> list[str]:
    """Returns the lines of a table: its values first, then the tables in it."""
    plain: list[str] = []
    tables: list[str] = []
    for each in dataclasses.fields(value):
        item, inner = getattr(value, each.name), _join(path, each.name)
        if dataclasses.is_dataclass(item):
            tables += ["", f"[{inner}]", *_lines(item, inner)]
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            tables += [line for row in item for line in ("", f"[[{inner}]]", *_lines(row, inner))]
        elif item is not None and not _is_empty_text(item):
            plain.append(f"{each.name} = {_toml(item)}")
    return [*plain, *tables]


def _is_empty_text(item: Any) -> bool:
    """True for a string that says nothing; the key is left out."""
    return item == "" and isinstance(item, str)


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return not any(isinstance(item, (dict, list, tuple)) for item in items)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case _:
            return repr(value) if isinstance(value, (int, float)) else str(value)
