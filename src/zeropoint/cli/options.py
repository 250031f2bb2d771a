"""Arguments and options that several commands have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from zeropoint.cli.job import load_settings, with_exclusions
from zeropoint.cli.settings import Settings

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt2 file of torch.export.save, or package.module:callable that returns (module, example_inputs).",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A folder of pictures, an .npz or .safetensors file, package.module:callable that yields tuples, or the "
        "word random.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A TOML file; `zeropoint config --show` prints one.", show_default=False
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Where the file will run; `zeropoint backends` lists them.",
        show_default="xnnpack",
    ),
]
SchemeOption = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="static|dynamic",
        help="Activations quantized by calibration, or at run time.",
        show_default="static",
    ),
]
ExcludeModule = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude-module", metavar="GLOB", help="Leave the modules of this path float. Repeatable.", show_default=False
    ),
]
ExcludeType = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude-type",
        metavar="TYPE",
        help="Leave modules of this class float, e.g. torch.nn.Linear. Repeatable.",
        show_default=False,
    ),
]
ExcludeOperator = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude-operator",
        metavar="OP",
        help="Leave this operator float, e.g. aten.add.Tensor. Repeatable.",
        show_default=False,
    ),
]
StrictOption = Annotated[
    list[str] | None,
    typer.Option(
        "--strict",
        metavar="GLOB",
        help="Exit with 3 where an operator in these modules stays float. Repeatable.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="DIR", help="A new folder for the results.", show_default=False)
]
MinSqnrOption = Annotated[
    float | None,
    typer.Option(metavar="DB", help="Exit with 3 below this SQNR against the float model, in dB.", show_default=False),
]
MinAgreementOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Exit with 3 below this share of samples of one class.", show_default=False),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
RunsOption = Annotated[int, typer.Option("--runs", min=1, metavar="N", help="How often each file is run and timed.")]
MeasureOption = Annotated[
    int, typer.Option("--measure", min=0, metavar="N", help="How many cures are looked for; 0: none.")
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Compare site by site and time it too, and write report.html.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what packages log.")]


def settings_of(
    config: Path | None,
    backend: str | None = None,
    scheme: str | None = None,
    modules: list[str] | None = None,
    types: list[str] | None = None,
    operators: list[str] | None = None,
    strict: list[str] | None = None,
) -> Settings:
    """Returns the settings of a command line: those of its file, with its options over them."""
    given = {"backend": backend, "scheme": scheme}
    settings = load_settings(config, **given)
    settings = with_exclusions(settings, modules or (), types or (), operators or ())
    strict = [*settings.checks.strict, *(strict or ())]
    return replace(settings, checks=replace(settings.checks, strict=tuple(strict)))
