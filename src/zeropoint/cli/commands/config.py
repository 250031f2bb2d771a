"""``zeropoint config``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from zeropoint.cli.exits import UsageError
from zeropoint.cli.options import (
    BackendOption,
    ConfigOption,
    DebugOption,
    ExcludeModule,
    ExcludeOperator,
    ExcludeType,
    JsonOption,
    SchemeOption,
    StrictOption,
    settings_of,
)
from zeropoint.cli.output import write_json, write_text
from zeropoint.cli.schema import to_toml


def config(
    show: Annotated[bool, typer.Option("--show", help="Print the configuration that counts, as TOML.")] = False,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    strict: StrictOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the configuration: the defaults, with a file and options over them."""
    del debug
    if not show:
        raise UsageError("it has nothing to do", where="config", remedy="Give --show.")
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator, strict)
    if json:
        write_json(dataclasses.asdict(settings))
    else:
        write_text(to_toml(settings).rstrip())
