"""The commands, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from zeropoint.cli.commands.backends import backends
from zeropoint.cli.commands.bench import bench
from zeropoint.cli.commands.check import check
from zeropoint.cli.commands.compare import compare
from zeropoint.cli.commands.config import config
from zeropoint.cli.commands.doctor import doctor
from zeropoint.cli.commands.explain import explain
from zeropoint.cli.commands.quantize import quantize
from zeropoint.cli.commands.report import report
from zeropoint.cli.exits import guarded

COMMANDS: list[Callable[..., None]] = [quantize, explain, check, compare, bench, report, backends, doctor, config]

app = typer.Typer(
    name="zeropoint",
    help="Quantize PyTorch models for edge devices. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check did not "
    "hold, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from zeropoint import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


for command in COMMANDS:
    app.command(command.__name__)(guarded(command))
