"""Settings that come from the environment."""

from __future__ import annotations

import os


def debug_level() -> int:
    """Returns the level of ``ZEROPOINT_DEBUG``: 0 quiet, 1 times and changes of each pass, 3 graphs too."""
    value = os.environ.get("ZEROPOINT_DEBUG", "0")
    return int(value) if value.isdigit() else 1
