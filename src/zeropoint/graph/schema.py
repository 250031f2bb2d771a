"""What an operator's schema says, read once for each operator: reading it takes as long as a pass has for a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zeropoint.graph.compat import OpOverload


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema of an operator, as passes ask for it.

    Args:
        names: of the positional arguments, in order.
        defaults: of all arguments that have one, by name; lists as tuples.
        shared: arguments whose memory the result may be: it is a view of them, or they are written to.
        written: arguments whose memory is written to.
        is_pure: nothing is written to, and equal arguments give equal results.
    """

    names: tuple[str, ...]
    defaults: dict[str, Any]
    shared: tuple[str, ...]
    written: tuple[str, ...]
    is_pure: bool


MOST = 2048
"""Operators whose schemas are kept."""
_known: dict[int, tuple[OpOverload, Schema]] = {}
"""By id, which takes a tenth as long as hashing an operator; beside the operator itself, so that the id stays its."""


def _fixed(default: Any) -> Any:
    """Returns a default that no reader can change for all others."""
    return tuple(default) if isinstance(default, list) else default


def schema_of(operator: OpOverload) -> Schema:
    """Returns the schema of an operator."""
    known = _known.get(id(operator))
    if known is None:
        if len(_known) == MOST:
            _known.clear()
        known = _known[id(operator)] = operator, _read(operator)
    return known[1]


def _read(operator: OpOverload) -> Schema:
    schema = operator._schema
    return Schema(
        names=tuple(each.name for each in schema.arguments if not each.kwarg_only),
        defaults={each.name: _fixed(each.default_value) for each in schema.arguments if each.has_default_value()},
        shared=tuple(each.name for each in schema.arguments if each.alias_info is not None),
        written=tuple(each.name for each in schema.arguments if each.alias_info and each.alias_info.is_write),
        is_pure=not schema.is_mutable and torch.Tag.nondeterministic_seeded not in operator.tags,
    )
