"""Values as JSON has them."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """Returns a value of dictionaries, lists and tuples with lists for tuples, and None for infinity and NaN."""
    match value:
        case dict():
            return {key: plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
