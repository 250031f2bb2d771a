"""What the processor can do in integers."""

from __future__ import annotations

import platform
from pathlib import Path

DOT_PRODUCT_FLAGS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp", "i8mm")
"""Names in /proc/cpuinfo of instructions that multiply and add four 8-bit integers at once: x86 VNNI, ARM DotProd."""
FLAGS = Path("/proc/cpuinfo")


def integer_dot_product() -> str | None:
    """Returns the name of the processor's integer dot product instruction; None where it has none, or none is known."""
    words = _words()
    if words is None:
        return "asimddp" if platform.machine() in ("arm64", "aarch64") else None
    return next((flag for flag in DOT_PRODUCT_FLAGS if flag in words), None)


def has_integer_dot_product() -> bool | None:
    """Returns whether the processor has such an instruction; None where that is not known: the system lists none."""
    if integer_dot_product() is not None:
        return True
    return None if _words() is None else False


def _words() -> set[str] | None:
    try:
        return set(FLAGS.read_text(encoding="utf8", errors="replace").split())
    except OSError:
        return None
