"""``zeropoint check``."""

from __future__ import annotations

from zeropoint.check_backend import check_backend
from zeropoint.cli.exits import CheckFailed
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
    settings_of,
)
from zeropoint.cli.output import StageBar, only_results, write_json, write_text


def check(
    model: ModelArgument,
    data: DataOption = None,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say before calibration what the backend will not compute as quantized, and where it goes through float."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator)
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        bar("check", 0, None)
        found = check_backend(job.graph, *job.quantization, backend=settings.backend)
    write_json(found.as_dict()) if json else write_text(str(found))
    if not found.is_as_meant:
        count = len(found.refused) + len(found.unfolded)
        raise CheckFailed(f"{count} operators are not computed as meant", where=settings.backend)
