"""The ``zeropoint`` command: thin, over the functions of the library."""

from __future__ import annotations

import sys

from zeropoint.cli.exits import Exit
from zeropoint.core.errors import MissingExtraError
from zeropoint.core.extras import require_extra


def main() -> None:
    """Runs the command with the arguments of the process."""
    try:
        for package in ("typer", "rich"):
            require_extra(package, "cli")
    except MissingExtraError as error:
        sys.stderr.write(f"zeropoint: {error}\n")
        sys.exit(Exit.FAILED)
    from zeropoint.cli.app import app  # The packages that it needs are there only now.

    app()
