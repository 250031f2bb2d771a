"""``zeropoint bench``."""

from __future__ import annotations

from typing import Annotated

import typer

import zeropoint
from zeropoint.cli.job import load_job
from zeropoint.cli.measured import RUNS, quantized, require_data, timed
from zeropoint.cli.options import (
    BackendOption,
    ConfigOption,
    DataOption,
    DebugOption,
    ExcludeModule,
    ExcludeOperator,
    ExcludeType,
    JsonOption,
    ModelArgument,
    RunsOption,
    SchemeOption,
    settings_of,
)
from zeropoint.cli.output import StageBar, only_results, warn_of_random, write_json, write_text
from zeropoint.core.extras import require_extra


def bench(
    model: ModelArgument,
    data: DataOption = None,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    runs: RunsOption = RUNS,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="How often each is run before.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of the runtime.", show_default="as many as it chooses")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time MODEL as float and as int8 on the runtime, in turn; say why it is not faster where it is not."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator)
    require_data(data, settings, "bench")
    require_extra("executorch.exir", "executorch")
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        found = timed(job, quantized(job, bar), bar, runs, warmup=warmup, threads=threads)
    warn_of_random(job.data)
    if json:
        write_json({"zeropoint": zeropoint.__version__, **job.named(), **found.to_dict()})
    else:
        write_text(str(found))
