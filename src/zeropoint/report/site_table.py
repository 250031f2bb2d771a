"""``Comparison``: what ``compare`` found, as data and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from zeropoint.report.convergence import Convergence
from zeropoint.report.cures import Cure

SHOWN = 10
"""Rows of the printed tables."""


@dataclass(frozen=True, slots=True)
class SiteRow:
    """A tensor that is quantized, and what that costs.

    Of tensors of one scale with more than 2^13 values, and of weights with more than 2^18, evenly spread values are
    looked at: what follows from them (SQNR, cosine, largest errors, clipped values, unused codes) is an estimate then.

    Args:
        site: the node that computes an activation, or ``node.argument`` for a constant.
        kind: ``"activation"`` or ``"weight"``.
        operator: what computes it, or reads it.
        module: path of the innermost module around that.
        source: ``file:line`` of the user's program.
        shape: of the tensor.
        scale, zero_point: one value, or one for each channel or group; empty where they are found at run time.
        sqnr_db: SQNR in dB of the quantized model's tensor against the float one.
        own_sqnr_db: the same of what rounding and clipping do here, without what came before.
        cosine: between the two tensors.
        largest_error: the largest absolute difference between the two.
        largest_error_steps: the largest difference that rounding and clipping make here, in steps of the scale (LSB).
        clipped: share of the values beyond the range.
        unused_codes: share of the integers that no value is rounded to; NaN for types of more than 16 bits.
        noise: share of all noise at the outputs that this site makes, to first order.
        gain_db: what the SQNR of the outputs would gain if it alone stayed float, to first order, with those that
            share its scale.
        why: what is wrong with it.
    """

    site: str
    kind: Literal["activation", "weight"]
    operator: str
    module: str
    source: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    sqnr_db: float
    own_sqnr_db: float
    cosine: float
    largest_error: float
    largest_error_steps: float
    clipped: float
    unused_codes: float
    noise: float
    gain_db: float
    why: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.operator, self.module, self.source) if part)
        return f"{self.kind} {self.site} ({place})"


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A quantized operator, and where the error of its output comes from, before that is rounded itself.

    It is measured on one batch in sixteen: ``sqnr_db`` on 2^14 evenly spread values of it, the parts of layers, and
    of operators on single values, on a quarter of the samples.

    Args:
        node, operator, module, source: as in ``SiteRow``.
        sqnr_db: SQNR in dB of what it returns in the quantized model against the float one.
        weight_sqnr_db: the same of it in float, but for its constants: with float inputs and quantized constants.
        activation_sqnr_db: with float constants, and float inputs that are rounded.
        carried_sqnr_db: with float constants, and the inputs of the quantized model before they are rounded.
    """

    node: str
    operator: str
    module: str
    source: str
    sqnr_db: float
    weight_sqnr_db: float
    activation_sqnr_db: float
    carried_sqnr_db: float

    @property
    def main_part(self) -> Literal["weight", "activation", "carried"]:
        """Where most of the error comes from."""
        parts: dict[float, Literal["weight", "activation", "carried"]] = {
            self.carried_sqnr_db: "carried", self.activation_sqnr_db: "activation", self.weight_sqnr_db: "weight"
        }  # fmt: skip
        return parts[min(parts)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which sites of a quantized model cost its accuracy, and what to do.

    Args:
        sites: one row for each tensor that is quantized, that which costs most first. Where cures were looked for, the
            first is one that the best cure treats: of those with 5 % of the noise the first in the network.
        nodes: one row for each operator that reads integers, in the order of the graph.
        outputs_sqnr_db: SQNR in dB of each float output against the float model, NaN for others.
        sqnr_db: the mean of those, each counted as 120 dB at most.
        cures: what to do, all of it; that which gains most first. They were tried on the converted model.
        gain_db: what ``sqnr_db`` gains when all cures are applied, on the batches on which they were tried; NaN where
            none was.
        convergence: were there enough samples?
        batches: how many batches were compared.
        notes: what was not compared.
    """

    sites: tuple[SiteRow, ...]
    nodes: tuple[NodeRow, ...]
    outputs_sqnr_db: tuple[float, ...]
    sqnr_db: float
    cures: tuple[Cure, ...]
    gain_db: float
    convergence: Convergence
    batches: int
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> SiteRow:
        """The site with which to begin."""
        return self.sites[0]

    @property
    def cure(self) -> Cure | None:
        """The first thing to do; None where nothing was found that gains."""
        return self.cures[0] if self.cures else None

    def apply(self, quantizer: Any) -> Any:
        """Sets the rules of all cures on a quantizer, and returns it.

        Raises:
            ComparisonError: the quantizer has no rules.
        """
        for cure in self.cures:
            cure.apply(quantizer)
        return quantizer

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, texts and numbers; what is infinite or NaN as None."""
        return _plain(dataclasses.asdict(self))

    def to_json(self) -> str:
        """Returns ``to_dict()`` as JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int = SHOWN) -> str:
        """Returns a summary and the tables, of ``most`` rows each."""
        return "\n".join([*_verdict(self), *_site_lines(self, most), *_node_lines(self, most)])


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


def _verdict(found: Comparison) -> list[str]:
    worst = found.worst
    lines = [
        f"output    SQNR {db(found.sqnr_db)} dB against float on {found.batches} batches",
        f"worst     {worst}: {worst.noise:.0%} of the noise at the output",
        f"why       {worst.why}",
    ]
    lines += [f"cure      {cure}" for cure in found.cures]
    if found.cures:
        share = found.cures[0].integer_share
        lines.append(f"together  {found.gain_db:+.1f} dB; {share:.0%} of the multiply-accumulates are integer then")
    else:
        lines.append("cure      none was found: the noise is spread over many sites")
    return [*lines, str(found.convergence), *(f"note      {note}" for note in found.notes)]


def _site_lines(found: Comparison, most: int) -> list[str]:
    rows = found.sites[:most]
    width = max(len(row.site) for row in rows)
    head = f"{'site':<{width}}  {'gain dB':>7}  {'noise':>6}  {'SQNR':>6}  {'own':>6}  {'cosine':>7}"
    head += f"  {'clipped':>8}  {'unused':>6}  module"
    lines = ["", head]
    lines += [
        f"{row.site:<{width}}  {row.gain_db:>7.2f}  {row.noise:>6.1%}  {db(row.sqnr_db):>6}  {db(row.own_sqnr_db):>6}  "
        f"{row.cosine:>7.4f}  {row.clipped:>8.3%}  {row.unused_codes:>6.0%}  {row.module or '-'}"
        for row in rows
    ]
    rest = len(found.sites) - len(rows)
    return [*lines, f"... and {rest} more"] if rest > 0 else lines


def _node_lines(found: Comparison, most: int) -> list[str]:
    rows = sorted(found.nodes, key=lambda row: row.sqnr_db)[:most]
    if not rows:
        return []
    width = max(max(len(row.node) for row in rows), len("operator"))
    lines = ["", f"{'operator':<{width}}  {'SQNR':>6}  {'weight':>6}  {'input':>6}  {'before':>6}  most of it"]
    for row in rows:
        parts = (row.sqnr_db, row.weight_sqnr_db, row.activation_sqnr_db, row.carried_sqnr_db)
        named = {"weight": "its weight", "activation": "rounding its input", "carried": "from before"}[row.main_part]
        lines.append(f"{row.node:<{width}}  {'  '.join(f'{db(each):>6}' for each in parts)}  {named}")
    return lines


def db(value: float) -> str:
    """Returns decibels as text."""
    return "exact" if value == math.inf else f"{value:.1f}"
