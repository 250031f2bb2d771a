"""The comparison of two models, batch by batch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.core.dtypes import is_float
from zeropoint.core.errors import ComparisonError, NonFiniteError
from zeropoint.graph.capture import capture
from zeropoint.graph.constants import evaluate
from zeropoint.graph.copies import copied
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.inputs import inputs_for
from zeropoint.graph.observers import has_observers
from zeropoint.graph.source import module_path, operator_name, source_line
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.compared_sites import (
    Seen,
    Site,
    SiteWatch,
    Sums,
    find_sites,
    groups_of,
    some_along,
    some_of,
)
from zeropoint.report.convergence import Convergence, RangeConvergence, range_convergence
from zeropoint.report.conversions import is_dequantize
from zeropoint.report.cures import SMALLEST_GAIN_DB, Cures, Patient, channels_of, find_cures, mean_db
from zeropoint.report.lockstep import Lockstep
from zeropoint.report.node_errors import ErrorSums, NodeErrors, parts_db
from zeropoint.report.site_gains import NoiseAtOutput
from zeropoint.report.site_reasons import Spread, channel_spread, grid_of, reason, spread_scale
from zeropoint.report.site_samples import SiteSample, add_samples
from zeropoint.report.site_table import Comparison, NodeRow, SiteRow
from zeropoint.report.twin import WHERE, float_constants, folded, with_values

STUDIED = 16
"""One batch of so many, the first too, is differentiated, and its operators computed on mixed inputs."""
MOST_VALUES = 2**13
"""So many values of an activation are looked at in each batch."""
MOST_WEIGHTS = 2**18
"""So many values of a weight are looked at."""
SOME_NOISE = 0.05
"""Of the sites that one cure treats, the first in the network that makes such a share of the noise is named first."""
MOST_KNOWN = 0.5
"""Where the noise of fewer sites reaches the outputs, gradients do not pass through the model."""
TRIED_BATCHES = 4
"""Cures are tried on so many batches."""
SAME_GRAPH_DB = 40.0
"""The graph of the quantized model, computed in float, has to give what the float model gives: by so many dB."""
INSIDE_DB = 10.0
"""The same where bodies of control flow are quantized, whose constants stay rounded."""


class Comparing:
    """A float model and a quantized one, compared batch by batch.

    Args:
        float_model: as in ``compare``.
        quantized: a graph with quantize and dequantize operators.
    """

    def __init__(self, float_model: Any, quantized: GraphModule) -> None:
        self.float_model, self.quantized = float_model, quantized
        self.sites: list[Site] = []
        self.outputs: list[Sums] = []
        self.kept: list[tuple[tuple[Any, ...], list[Any]]] = []
        self.spread: dict[Site, Spread] = {}
        self._random = random.Random(0)
        self._samples: list[SiteSample] = []
        self.batches = 0
        self.expected: list[Any] = []
        self.is_known = True

    def compare(self, data: Iterable[Any], measure: int) -> Comparison:
        """Returns the comparison over all batches, with so many cures."""
        for index, batch in enumerate(data):
            inputs = inputs_for(self.quantized, batch, f"{WHERE}, batch {index}")
            if index == 0:
                self._begin(inputs)
            self._see_batch(index, inputs)
        if not self.batches:
            remedy = "Give some batches of real data, as for calibration."
            raise ComparisonError("data is empty", where=WHERE, remedy=remedy)
        self._see_weights()
        self.noise = self._noise()
        patient = Patient(self.run, self.sites, self.groups, self.kept)
        return self._comparison(self._cures(patient, measure))

    def _begin(self, inputs: tuple[Any, ...]) -> None:
        """Takes the float model's constants, and what it returns for a batch."""
        reference = folded(_captured(self.float_model, inputs))
        self.quantized = with_values(self.quantized, inputs)
        self.sites = find_sites(self.quantized)
        self.groups = groups_of(self.sites)
        self.sums = {site: Sums() for site in self.sites}
        self.limits = {site: site.limits for site in self.sites}
        self.run = Lockstep(self.quantized, float_constants(self.quantized, reference))
        self.grids = {site: grid_of(site, self.run) for site in self.sites}
        self.scales = {site: spread_scale(site, grid[0]) for site, grid in self.grids.items() if grid[0].numel()}
        self.nodes = NodeErrors(self.run, self.sites)
        self.gains = NoiseAtOutput(self.run, self.sites, self.nodes)
        self._reference = reference
        self._inside = sum(is_dequantize(node) for _, body in bodies(self.quantized) for node in body.graph.nodes)
        self.expected = self._float_outputs(inputs)

    @torch.no_grad()
    def _float_outputs(self, inputs: tuple[Any, ...]) -> list[Any]:
        return pytree.tree_leaves(self._reference(*pytree.tree_map(copied, inputs)))

    def _see_batch(self, index: int, inputs: tuple[Any, ...]) -> None:
        if index % STUDIED == 0:
            outputs, actual = self.gains.study(inputs, self._study_site)
        else:
            with torch.no_grad():
                outputs, actual = self.run.run(inputs, SiteWatch(self.sites, self._see_site))
        add_samples(self._samples)
        self._samples.clear()
        expected, found = pytree.tree_leaves(outputs), pytree.tree_leaves(actual)
        if index == 0:
            _require_one_network(self.expected, expected, INSIDE_DB if self._inside else SAME_GRAPH_DB)
        if self._inside and not self.run.has_state:
            expected = self._float_outputs(inputs)
        self.outputs = self.outputs or [Sums() for _ in expected]
        for sums, wanted, each in zip(self.outputs, expected, found, strict=True):
            if is_float(wanted):
                _require_finite(wanted, index)
                sums.add(wanted, each)
        self._keep(index, (pytree.tree_map(copied, inputs), [copied(each) for each in expected]))
        self.batches += 1

    def _keep(self, index: int, batch: tuple[tuple[Any, ...], list[Any]]) -> None:
        """Keeps a few batches to try cures on: any, but of a model with state the first ones, which go on from it."""
        if index < TRIED_BATCHES:
            self.kept.append(batch)
        elif not self.run.has_state and (place := self._random.randrange(index + 1)) < TRIED_BATCHES:
            self.kept[place] = batch

    def _study_site(self, site: Site, seen: Seen) -> None:
        reference = seen.reference.detach()
        self.spread[site] = channel_spread(reference, 1 if reference.dim() > 2 else -1)
        self._add(site, reference, seen)

    def _see_site(self, site: Site, seen: Seen) -> None:
        self._add(site, seen.reference, seen)

    def _add(self, site: Site, reference: torch.Tensor, seen: Seen) -> None:
        sums, scale = self.sums[site], self.scales.get(site)
        low, high = torch.aminmax(reference)
        sums.ranges.append((float(low), float(high)))
        if scale is not None and scale.numel() > 1:
            sums.add(reference, seen.after)
            sums.add_own(seen.before, seen.after, scale)
            return
        (reference, factor), (before, _), (after, _) = (
            some_of(each, MOST_VALUES) for each in (reference, seen.before, seen.after)
        )
        if scale is None:
            sums.add(reference, after, factor)
            sums.add_own(before, after, None, factor)
            return
        reference, before, after = (each.clone() for each in (reference, before, after))  # The wholes are not kept.
        grid = float(scale), int(self.grids[site][1]), self.limits[site]
        self._samples.append(SiteSample(sums, reference, before, after, factor, *grid))

    def _see_weights(self) -> None:
        for site in self.sites:
            if site.kind == "weight":
                value, rounded = self.run.float_weight(site), self.run.known[site.dequantizes[0]]
                scale = self.scales.get(site)
                part, factor = some_along(value, scale, MOST_WEIGHTS)
                scale = scale[part] if scale is not None and scale.dim() else scale
                self.sums[site].add(value[part], rounded[part], factor)
                self.sums[site].add_own(value[part], rounded[part], scale, factor)
                self.sums[site].add_codes(evaluate(self.quantized, site.node), *site.limits)
                self.spread[site] = channel_spread(value, channels_of(site), self.grids[site][0])

    def _cures(self, patient: Patient, measure: int) -> Cures:
        """Returns what to do about the sites that cost most: at most so many, each of some weight."""
        noise = self._noise_of_groups()
        order = sorted(noise, key=lambda site: -noise[site])[: max(measure, 0)]
        rest, costly = sum(noise.values()), list[Site]()
        for site in order:
            if gain(noise[site], rest) < SMALLEST_GAIN_DB:
                break
            costly.append(site)
            rest -= noise[site]
        return find_cures(patient, costly) if costly else Cures((), math.nan, math.nan, frozenset())

    def _noise(self) -> dict[Site, float]:
        """Returns the noise of each site at the outputs; where that is not known, what it is at the site itself."""
        rounded = [site for site, sums in self.sums.items() if sums.own_error]
        self.is_known = sum(self.gains.noise[site] > 0 for site in rounded) >= MOST_KNOWN * len(rounded)
        if self.is_known:
            return self.gains.noise
        known = {site: self.sums[site] for site in rounded if self.sums[site].own_signal}
        noise = {site: sums.own_error / sums.own_signal for site, sums in known.items()}
        return dict.fromkeys(self.sites, 0.0) | noise

    def _noise_of_groups(self) -> dict[Site, float]:
        """Returns the noise at the outputs of each group, under its first site."""
        firsts = dict.fromkeys(self.groups[site][0] for site in self.sites)
        return {first: sum(self.noise[each] for each in self.groups[first]) for first in firsts}

    def _comparison(self, found: Cures) -> Comparison:
        groups = self._noise_of_groups()
        total = sum(groups.values())
        order = sorted(self.sites, key=lambda s: (-groups[self.groups[s][0]], -self.noise[s]))
        first = self._first(found, total)
        order.sort(key=lambda site: site is not first)
        rows = tuple(self._row(site, groups[self.groups[site][0]], total) for site in order)
        nodes = tuple(_node_row(node, sums) for node, sums in self.nodes.sums.items())
        outputs = tuple(each.sqnr_db if each.count else math.nan for each in self.outputs)
        ranges = sorted(self._ranges(), key=lambda each: -each.moved_steps)
        convergence = Convergence(self.batches, tuple(ranges))
        return Comparison(
            rows, nodes, outputs, mean_db(self.outputs), found.cures, found.after_db - found.before_db, convergence,
            self.batches, tuple(self._notes()),
        )  # fmt: skip

    def _first(self, found: Cures, total: float) -> Site | None:
        """Returns the first site of the network that the best cure treats, of those that make some of the noise."""
        sites = [site for site in found.treated if self.noise[site] >= SOME_NOISE * total]
        place = {node: index for index, node in enumerate(self.run.nodes)}
        return min(sites, key=lambda site: place[_place(site)], default=None)

    def _row(self, site: Site, group: float, total: float) -> SiteRow:
        sums, (scale, zero_point) = self.sums[site], self.grids[site]
        place = _place(site)
        unused = math.nan if sums.codes is None else 1 - float(sums.codes.float().mean())
        clipped = sums.clipped / sums.count if sums.count else 0.0
        return SiteRow(
            site.name, site.kind, operator_name(place), module_path(place), source_line(place), _shape(site.source),
            tuple(scale.flatten().tolist()), tuple(int(each) for each in zero_point.flatten().tolist()), sums.sqnr_db,
            sums.own_sqnr_db, sums.cosine, sums.largest, sums.largest_steps, clipped, unused,
            self.noise[site] / total if total else 0.0, gain(group, total),
            reason(site, sums, self.spread.get(site, Spread()), clipped, unused),
        )  # fmt: skip

    def _ranges(self) -> Iterator[RangeConvergence]:
        for site in self.sites:
            scale = self.grids[site][0]
            if site.kind == "activation" and scale.numel() == 1:
                yield range_convergence(site.name, self.sums[site].ranges, float(scale))

    def _notes(self) -> Iterator[str]:
        if self.gains.failure:
            yield f"the float model could not be differentiated: {self.gains.failure}"
        if not self.is_known:
            yield "what reaches the outputs is not known: noise and gain are those of each tensor by itself"
        if self._inside:
            yield f"{self._inside} dequantize operators inside of control flow were not compared one by one"


def _place(site: Site) -> Node:
    """Returns what computes an activation or reads a constant."""
    return site.source if site.kind == "activation" else site.readers[0]


def gain(part: float, total: float) -> float:
    """Returns the dB that a part of the noise is worth."""
    rest = 1 - part / total if total else 1.0
    return 0.0 - 10 * math.log10(max(rest, 1e-6))


def _node_row(node: Node, sums: ErrorSums) -> NodeRow:
    place = (node.name, operator_name(node), module_path(node), source_line(node))
    return NodeRow(*place, sums.total.sqnr_db, *parts_db(sums))


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(size if isinstance(size, int) else -1 for size in value.shape) if value is not None else ()


def _captured(model: Any, inputs: tuple[Any, ...]) -> GraphModule:
    captured = capture(model, inputs)
    is_other = has_observers(captured) or any(is_dequantize(node) for node in captured.graph.nodes)
    if is_other:
        what = "the float model is prepared or converted: both change the graph that they are given"
        remedy = "Give the module, or another export of it: torch.export.export(...).module()."
        raise ComparisonError(what, where=WHERE, remedy=remedy)
    return captured


def _require_one_network(expected: list[Any], found: list[Any], least_db: float) -> None:
    """Raises unless the float model gives what the quantized graph gives in float."""
    remedy = "Give the float model that the quantized one was made of."
    if len(expected) != len(found):
        what = f"the float model returns {len(expected)} values, the quantized one {len(found)}"
        raise ComparisonError(what, where=WHERE, remedy=remedy)
    if not any(map(is_float, expected)):
        raise ComparisonError("the models return no real values, whose noise could be measured", where=WHERE)
    for index, (wanted, each) in enumerate(zip(expected, found, strict=True)):
        if is_float(wanted):
            _require_finite(wanted, 0)
        if is_float(wanted) and (ratio := sqnr_db(wanted, each)) < least_db and bool(wanted.any()):
            what = f"output {index} of the quantized graph, computed in float, is not that of the float model"
            raise ComparisonError(f"{what}: SQNR {ratio:.1f} dB", where=WHERE, remedy=remedy)


def _require_finite(value: torch.Tensor, batch: int) -> None:
    if bool(value.isnan().any()):
        what = "the float model returns NaN"
        raise NonFiniteError(what, where=f"{WHERE}, batch {batch}", remedy="Look at the data and the weights.")
