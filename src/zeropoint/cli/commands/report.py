"""``zeropoint report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeropoint.cli.exits import UsageError
from zeropoint.cli.job import load_job
from zeropoint.cli.measured import CURES, RUNS, measured, quantized, require_data
from zeropoint.cli.options import (
    BackendOption,
    ConfigOption,
    DataOption,
    DebugOption,
    ExcludeModule,
    ExcludeOperator,
    ExcludeType,
    ForceOption,
    JsonOption,
    MeasureOption,
    ModelArgument,
    RunsOption,
    SchemeOption,
    settings_of,
)
from zeropoint.cli.output import StageBar, number, only_results, warn_of_random, write_json, write_text
from zeropoint.cli.output_folder import check_file_free
from zeropoint.core.extras import require_extra
from zeropoint.reporting import require_packages


def report(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="The page, an .html file.", show_default=False)
    ] = None,
    data: DataOption = None,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    measure: MeasureOption = CURES,
    runs: RunsOption = RUNS,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the page.", show_default="MODEL")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize MODEL, compare it site by site with float, time both, and write all that as one HTML file."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator)
    if out is None:
        raise UsageError("it does not say where the page goes", where="report", remedy="Give -o FILE.")
    check_file_free(out, force=force)
    require_data(data, settings, "report")
    require_extra("executorch.exir", "executorch")
    require_packages()
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        result = quantized(job, bar)
        found = measured(job, result, bar, measure=measure, runs=runs)
        bar("write the page", 0, None)
        found.write(result, out, title or model)
    warn_of_random(job.data)
    if json:
        sqnr = None if found.comparison is None else number(found.comparison.sqnr_db)
        write_json({**job.named(), "out": str(out), "sqnr_db": sqnr, "ratio": found.benchmark.ratio})
    else:
        write_text(f"{result}\nwritten   {out}")
