"""``zeropoint compare``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import zeropoint
from zeropoint.cli.cure_rules import lines_of, rules_of, with_rules
from zeropoint.cli.job import Job, load_job
from zeropoint.cli.measured import CURES, compared, quantized, require_samples
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
    SchemeOption,
    settings_of,
)
from zeropoint.cli.output import StageBar, note, only_results, warn_of_random, write_json, write_text
from zeropoint.cli.output_folder import check_file_free
from zeropoint.cli.schema import to_toml
from zeropoint.cli.settings import RuleSettings
from zeropoint.core.extras import require_extra
from zeropoint.core.files import write_atomically
from zeropoint.report.compare.site_table import SHOWN, Comparison

Rules = tuple[RuleSettings, ...]


def compare(
    model: ModelArgument,
    data: DataOption = None,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    measure: MeasureOption = CURES,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows of each table.")] = SHOWN,
    write_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the configuration with the rules that cure.", show_default=False),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say which tensors cost MODEL its accuracy as int8, why, and which rules of the configuration cure it."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator)
    require_samples(data)
    if write_config is not None:
        check_file_free(write_config, force=force)
    require_extra("executorch.exir", "executorch")
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        found = compared(job, quantized(job, bar, verify=False), bar, measure)
    rules = rules_of(found.cures, job.settings)
    if write_config is not None:
        _write(write_config, job, found, rules)
    _show(job, found, rules, rows, write_config, json=json)


def _write(file: Path, job: Job, found: Comparison, rules: Rules) -> None:
    gain = f"{found.gain_db:+.1f} dB predicted" if rules else "no cure was found"
    header = f"# zeropoint compare {job.model.name}: {gain}\n"
    write_atomically(file, (header + to_toml(with_rules(job.settings, rules))).encode())
    if not rules:
        note("zeropoint: warning: no cure was found; the configuration is as it was")


def _show(job: Job, found: Comparison, rules: Rules, rows: int, written: Path | None, *, json: bool) -> None:
    warn_of_random(job.data)
    if json:
        write_json(_plain(job, found, rules, written))
        return
    assert job.data is not None
    parts = [f"data      {job.data.describe()}", found.text(rows)]
    if rules:
        parts += ["", "cure, as lines of the configuration (--config FILE):", "", lines_of(rules)]
    if written is not None:
        parts += ["", f"written   {written}"]
    write_text("\n".join(parts))


def _plain(job: Job, found: Comparison, rules: Rules, written: Path | None) -> dict[str, Any]:
    given = [{key: value for key, value in dataclasses.asdict(rule).items() if value} for rule in rules]
    return {
        "zeropoint": zeropoint.__version__,
        **job.named(),
        **found.to_dict(),
        "rules": given,
        "rules_toml": lines_of(rules) if rules else "",
        "written": None if written is None else str(written),
    }
