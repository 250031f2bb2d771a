"""``zeropoint quantize``."""

from __future__ import annotations

import json as json_module
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zeropoint
from zeropoint.api import QuantizedModel
from zeropoint.cli.evaluation import Evaluation, evaluate
from zeropoint.cli.exits import CheckFailed, UsageError
from zeropoint.cli.job import Job, checked, load_job
from zeropoint.cli.measured import Measured, measured, quantized, require_data
from zeropoint.cli.options import (
    BackendOption,
    ConfigOption,
    DataOption,
    DebugOption,
    DryRunOption,
    ExcludeModule,
    ExcludeOperator,
    ExcludeType,
    ForceOption,
    JsonOption,
    MinAgreementOption,
    MinSqnrOption,
    ModelArgument,
    OutOption,
    ReportOption,
    SchemeOption,
    StrictOption,
    settings_of,
)
from zeropoint.cli.output import StageBar, number, only_results, warn_of_random, write_json, write_text
from zeropoint.cli.output_folder import check_free, written_whole
from zeropoint.cli.schema import to_toml
from zeropoint.cli.settings import CheckSettings, Settings
from zeropoint.core.extras import require_extra
from zeropoint.report.explain.explain import explain
from zeropoint.report.explain.explanation import Explanation
from zeropoint.report.speed.speed import speed_note, work_of
from zeropoint.reporting import require_packages


@dataclass(frozen=True, slots=True)
class Done:
    """What the command did.

    Args:
        result: of ``quantize``.
        compared: int8 beside float on samples; None without real data.
        measured: what the page shows; None where none was asked for.
        summary: what is written as ``summary.json``.
    """

    result: QuantizedModel
    compared: Evaluation | None
    measured: Measured | None
    summary: dict[str, Any]


def quantize(
    model: ModelArgument,
    out: OutOption = None,
    data: DataOption = None,
    config: ConfigOption = None,
    backend: BackendOption = None,
    scheme: SchemeOption = None,
    exclude_module: ExcludeModule = None,
    exclude_type: ExcludeType = None,
    exclude_operator: ExcludeOperator = None,
    strict: StrictOption = None,
    min_sqnr: MinSqnrOption = None,
    min_agreement: MinAgreementOption = None,
    report: ReportOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize MODEL to int8, run the file, compare it with the float model, and write DIR."""
    settings = settings_of(config, backend, scheme, exclude_module, exclude_type, exclude_operator, strict)
    settings = _with_checks(settings, min_sqnr, min_agreement)
    out = None if dry_run else _free(out, force=force)
    require_data(data, settings, "quantize")
    require_extra("executorch.exir", "executorch")
    if report:
        require_packages()
    with only_results(debug=debug), StageBar() as bar:
        bar("load and export", 0, None)
        job = load_job(model, data, settings)
        explanation = explain(job.graph, job.quantizer, strict=settings.checks.strict)
        done = None if out is None else _run(job, explanation, bar, report=report)
        if out is not None and done is not None:
            _write(out, job, explanation, done)
    _show(job, explanation, done, out, json=json)
    if done is not None:
        _check(settings.checks, done)


def _free(out: Path | None, *, force: bool) -> Path:
    if out is None:
        raise UsageError("it does not say where the results go", where="quantize", remedy="Give -o DIR.")
    check_free(out, force=force)
    return out


def _with_checks(settings: Settings, min_sqnr: float | None, min_agreement: float | None) -> Settings:
    given = {"min_sqnr_db": min_sqnr, "min_agreement": min_agreement}
    checks = replace(settings.checks, **{name: value for name, value in given.items() if value is not None})
    return checked(replace(settings, checks=checks), "the command line")


def _run(job: Job, explanation: Explanation, bar: StageBar, *, report: bool) -> Done:
    data = job.data
    result = quantized(job, bar)
    evaluation = None
    if data is not None and not data.is_random:
        batches = bar.each(data.evaluation, len(data.evaluation), "compare with float")
        evaluation = evaluate(job.graph, result.model, data, batches)
    found = measured(job, result, bar) if report else None
    return Done(result, evaluation, found, _summary(job, explanation, result, evaluation))


def _summary(job: Job, explanation: Explanation, result: QuantizedModel, compared: Evaluation | None) -> dict[str, Any]:
    data, record = job.data, result.record
    work = work_of(result.model)
    return {
        "zeropoint": zeropoint.__version__,
        **job.named(),
        "calibration_samples": 0 if data is None else data.calibration.samples,
        "operators": {"integer": len(explanation.quantized), "float": len(explanation.stays_float)},
        "multiply_accumulates": {"integer": work.integer, "float": work.floating},
        "rules": [{"rule": each.rule, "matched": each.matched, "decided": each.decided} for each in explanation.rules],
        "bytes": {"float": record.float_bytes, "int8": record.converted_bytes, "file": len(result.pte)},
        "delegates": result.delegates,
        "outside_of_the_delegate": dict(result.outside),
        "float_sqnr_db": number(result.float_sqnr_db),
        "runtime_sqnr_db": number(result.runtime_sqnr_db),
        "compared": None if compared is None else _compared(compared),
        "speed_note": speed_note(work),
        "stages_s": result.stages_s,
    }


def _compared(compared: Evaluation) -> dict[str, Any]:
    return {
        "samples": compared.samples,
        "unseen": compared.is_unseen,
        "sqnr_db": number(compared.sqnr_db),
        "agreement": compared.agreement,
        "float_top1": compared.float_top1,
        "int8_top1": compared.int8_top1,
    }


def _write(out: Path, job: Job, explanation: Explanation, done: Done) -> None:
    summary = json_module.dumps(done.summary, indent=2, allow_nan=False)
    data = "" if job.data is None else f" --data {job.data.name}"
    header = f"# zeropoint quantize {job.model.name}{data} --config config.toml -o DIR\n"
    with written_whole(out) as folder:
        (folder / "model.pte").write_bytes(done.result.pte)
        if done.measured is not None:
            done.measured.write(done.result, folder / "report.html", job.model.name)
        (folder / "summary.json").write_text(summary + "\n", encoding="utf8")
        (folder / "explain.txt").write_text(f"{explanation}\n", encoding="utf8")
        (folder / "config.toml").write_text(header + to_toml(job.settings), encoding="utf8")


def _show(job: Job, explanation: Explanation, done: Done | None, out: Path | None, *, json: bool) -> None:
    data = "none" if job.data is None else job.data.describe()
    warn_of_random(job.data)
    if done is None:
        plan = {"dry_run": True, "data": data, **explanation.as_dict()}
        write_json(plan) if json else write_text(f"dry run   nothing is written\ndata      {data}\n{explanation}")
        return
    if json:
        write_json({**done.summary, "out": str(out)})
        return
    rules = [f"rule      {rule}" for rule in explanation.rules]
    lines = [
        f"data      {data}",
        *rules,
        str(done.result),
        *([done.compared.line()] if done.compared is not None else []),
    ]
    write_text("\n".join([*lines, f"written   {out}"]))


def _check(checks: CheckSettings, done: Done) -> None:
    """Raises where an asked-for accuracy is not reached; the results are written all the same."""
    if checks.min_sqnr_db is not None:
        _check_sqnr(checks.min_sqnr_db, done)
    if checks.min_agreement is not None:
        _check_agreement(checks.min_agreement, done)


def _check_sqnr(least: float, done: Done) -> None:
    found = [done.result.float_sqnr_db] if done.compared is None else [done.result.float_sqnr_db, done.compared.sqnr_db]
    if any(map(math.isnan, found)):
        what = "min_sqnr_db is asked for, and the model has no float output"
        raise CheckFailed(what, where="check", remedy="Leave it out.")
    if min(found) < least:
        raise CheckFailed(f"SQNR against float is {min(found):.1f} dB; {least:g} dB were asked for", where="check")


def _check_agreement(least: float, done: Done) -> None:
    agreement = None if done.compared is None else done.compared.agreement
    if agreement is None:
        what = "min_agreement is asked for, and the model's output is no scores of classes, or there is no real data"
        raise CheckFailed(what, where="check", remedy="Leave it out.")
    if agreement < least:
        raise CheckFailed(f"{agreement:.1%} have the same class; {least:.1%} were asked for", where="check")
