"""``zeropoint explain``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from zeropoint.cli.job import load_job
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
    SchemeOption,
    StrictOption,
    settings_of,
)
from zeropoint.cli.output import StageBar, only_results, write_json, write_text
from zeropoint.report.explain.explain import explain as explain_model
from zeropoint.report.explain.explanation import Explanation


def explain(
    model: ModelArgument,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NAME", help="Only this node, or all of this module.", show_default=False),
    ] = None,
    data: DataOption = None,
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
    """Say of each operator of MODEL how it will be quantized, or why not. With --data, who widens shared scales."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator, strict)
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        batches = None
        if job.data is not None:
            batches = bar.each(job.data.calibration, len(job.data.calibration), "measure")
        explanation = explain_model(job.graph, job.quantizer, calibration_data=batches)
    found = explanation if node is None else explanation[node]
    if not json:
        write_text(str(found))
    elif isinstance(found, Explanation):
        write_json(found.as_dict())
    else:
        write_json(dataclasses.asdict(found))
    explanation.require_quantized(settings.checks.strict)
