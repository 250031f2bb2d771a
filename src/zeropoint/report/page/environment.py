"""Where a report was made: versions and the machine."""

from __future__ import annotations

import os
import platform

from zeropoint.core.extras import installed_version
from zeropoint.core.processor import has_integer_dot_product, integer_dot_product

PACKAGES = ("zeropoint", "torch", "executorch", "torchao", "numpy")


def environment() -> tuple[tuple[str, str], ...]:
    """Returns names and values: versions of packages, of Python and of the system, and what the processor can do."""
    without = "not known" if has_integer_dot_product() is None else "none"
    return (
        *((name, version) for name in PACKAGES if (version := installed_version(name))),
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()} ({platform.machine()})"),
        ("processors", str(os.cpu_count())),
        ("integer dot product", integer_dot_product() or without),
    )
