"""``zeropoint backends``."""

from __future__ import annotations

import dataclasses

from zeropoint.backends.known import BACKENDS, KnownBackend
from zeropoint.cli.options import DebugOption, JsonOption
from zeropoint.cli.output import write_json, write_text


def backends(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the backends: which are installed, and what they compute."""
    del debug
    if json:
        write_json([{**dataclasses.asdict(each), "version": each.version} for each in BACKENDS])
        return
    write_text("\n\n".join(_described(each) for each in BACKENDS))


def _described(backend: KnownBackend) -> str:
    missing = f"not installed: pip install 'zeropoint[{backend.extra}]'"
    state = f"{backend.package} {backend.version}" if backend.version else missing
    rows = [
        ("package", state),
        ("makes", backend.file),
        ("runs on", backend.runs_on),
        ("schemes", ", ".join(backend.schemes)),
        ("activations", backend.activations),
        ("weights", backend.weights),
        ("integer operators", ", ".join(backend.operators)),
    ]
    return "\n".join([backend.name, *(f"  {name:<18} {text}" for name, text in rows)])
