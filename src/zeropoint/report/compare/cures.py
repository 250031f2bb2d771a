"""Cures: rules that a user can set, and what the output gains when they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.annotate.rules import Rules
from zeropoint.backends.xnnpack.config import FINE_EPS, get_default_quantization_config
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.dtypes import is_float
from zeropoint.core.errors import ComparisonError
from zeropoint.core.policy import CORRECTED_KEY
from zeropoint.graph.layers import LAYERS, TRANSPOSED
from zeropoint.graph.layers import groups_of as groups_of_layer
from zeropoint.graph.source import module_path, module_stack
from zeropoint.numerics import ops
from zeropoint.numerics.qparams import choose_qparams
from zeropoint.report.compare.compared_sites import Site, Sums, chain_of
from zeropoint.report.compare.lockstep import Lockstep
from zeropoint.report.speed.work import is_integer_layer, multiply_accumulates

Kind = Literal["per_channel", "float"]
MOST_DB = 120.0
"""An output that is exact counts as so many dB in the mean."""
SMALLEST_GAIN_DB = 0.5
"""What gains less is no cure."""
ABOUT_DB = 1.0
"""A cheaper cure may leave so many dB more noise than the best one."""


@dataclass(frozen=True, slots=True)
class Cure:
    """A rule that makes a model more accurate.

    Args:
        kind: ``"per_channel"``: a scale for each output channel of the weights. ``"float"``: leave float.
        modules: what the rule holds for, by path; empty string: the model itself.
        nodes: single nodes of the graph, by name, where a module would take too much.
        gain_db: SQNR of the outputs with all cures, less that with all but this one, in dB.
        lost: multiply-accumulates that are no longer integer for it.
        integer_share: share of the model's multiply-accumulates that still are, with all cures.
    """

    kind: Kind
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    gain_db: float
    lost: int
    integer_share: float

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules as ``kind: what``."""
        return (
            *(f"{self.kind}: {module or '*'}" for module in self.modules),
            *(f"{self.kind}: node {node}" for node in self.nodes),
        )

    def __str__(self) -> str:
        lost = f"{self.lost:,} multiply-accumulates are float then" if self.lost else "no integer layer is lost"
        return f"{'; '.join(self.rules)} ({self.gain_db:+.1f} dB, {lost})"

    def apply(self, quantizer: Any) -> Any:
        """Sets the rules on a quantizer with the methods of ``XNNPACKQuantizer``, and returns it.

        Raises:
            ComparisonError: the quantizer has no rules.
        """
        rules = getattr(quantizer, "rules", None)
        if not isinstance(rules, Rules):
            remedy = f"Leave these out in another way: {', '.join(self.rules)}."
            raise ComparisonError(f"{type(quantizer).__name__} has no rules", where="Cure.apply", remedy=remedy)
        for module in self.modules:
            self._set_module(quantizer, rules, module)
        for node in self.nodes:
            quantizer.set_node_name(node, None)
        return quantizer

    def _set_module(self, quantizer: Any, rules: Rules, module: str) -> None:
        config = None
        if self.kind == "per_channel":
            before = rules.of_module(module)
            if before is None:
                remedy = "Call set_global(config) first."
                raise ComparisonError("the quantizer has no configuration", where="Cure.apply", remedy=remedy)
            config = per_channel(before)
        if module:
            quantizer.set_module_name(module, config)
        else:
            quantizer.set_global(config)


def per_channel(config: QuantizationConfig) -> QuantizationConfig:
    """Returns the configuration with a weight scale for each output channel."""
    assert config.weight is not None
    usual = get_default_quantization_config(is_qat=config.is_qat).weight
    assert usual is not None
    constructor = usual.observer_or_fake_quant_ctr
    weight = replace(
        config.weight, observer_or_fake_quant_ctr=constructor, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    return replace(config, weight=weight)


@dataclass(frozen=True, eq=False, slots=True)
class Proposal:
    """A cure that is not tried yet.

    Args:
        kind, modules, nodes: as in ``Cure``.
        floats: the nodes that stay float.
        constants: other values of dequantize nodes.
    """

    kind: Kind
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    floats: frozenset[Node] = frozenset()
    constants: dict[Node, torch.Tensor] = field(default_factory=dict[Node, torch.Tensor])


class Patient:
    """A converted model whose sites are left out or changed, to see what the outputs gain.

    Args:
        run: the model.
        sites: all of its sites.
        groups: those that share scale and zero point.
        batches: inputs, and what the float model returns for them.
    """

    def __init__(
        self,
        run: Lockstep,
        sites: list[Site],
        groups: dict[Site, tuple[Site, ...]],
        batches: Sequence[tuple[tuple[Any, ...], list[Any]]],
    ) -> None:
        self.run, self.sites, self.groups, self.batches = run, sites, groups, batches
        layers = [n for n in run.nodes if n.target in LAYERS]
        self.work = {n: multiply_accumulates(n) for n in layers}
        self.integer = {n for n in layers if is_integer_layer(n)}
        self._within = _nodes_within(run.model)
        self._chains = _chains(sites)
        self._known: dict[tuple[Proposal, ...], float] = {}

    def sqnr_db(self, proposals: Sequence[Proposal]) -> float:
        """Returns the SQNR of the outputs of the changed model in dB; it is run once for each choice of proposals."""
        chosen = tuple(proposals)
        if chosen not in self._known:
            self._known[chosen] = self._measured(chosen)
        return self._known[chosen]

    @torch.no_grad()
    def _measured(self, proposals: Sequence[Proposal]) -> float:
        other = self._other_values(proposals)
        sums: list[Sums] = []
        self.run.restart()
        for inputs, expected in self.batches:
            found = pytree.tree_leaves(self.run.run_quantized(inputs, other))
            sums = sums or [Sums() for _ in expected]
            for each, wanted, actual in zip(sums, expected, found, strict=True):
                if is_float(wanted):
                    each.add(wanted, actual)
        return mean_db(sums)

    def _other_values(self, proposals: Sequence[Proposal]) -> Callable[[Node, dict[Node, Any]], Any]:
        floats = frozenset(node for each in proposals for node in each.floats)
        gone = [site for site in self.sites if site.annotators and site.annotators <= floats]
        skipped = {site.node for site in gone if site.kind == "activation"}
        weights = {
            each: self.run.float_weight(site) for site in gone if site.kind == "weight" for each in site.dequantizes
        }
        skipped |= {each for site in gone if site.kind == "activation" for each in site.dequantizes}
        biases = self._biases([*floats, *self._corrected_anew(proposals)])
        constants = {node: value for each in proposals for node, value in each.constants.items()} | weights | biases

        def other(node: Node, values: dict[Node, Any]) -> Any:
            if node in constants:
                return constants[node]
            return values[node.args[0]] if node in skipped else None  # type: ignore[index]

        return other

    def _biases(self, layers: Iterable[Node]) -> dict[Node, torch.Tensor]:
        """Returns the float biases of layers: those of the quantized model are on the grid of its scales."""
        read = {n for layer in layers for n in layer.all_input_nodes if n.op == "get_attr"}
        return {n: self.run.constants[n] for n in read if n in self.run.constants}

    def _corrected_anew(self, proposals: Sequence[Proposal]) -> list[Node]:
        """Returns the layers whose biases were corrected for noise that is gone: those after the first that changes."""
        changed = {node for each in proposals for node in each.floats}
        changed |= {reader for each in proposals for node in each.constants for reader in node.users}
        first = next((index for index, node in enumerate(self.run.nodes) if node in changed), len(self.run.nodes))
        corrected = self.run.model.meta.get(CORRECTED_KEY, ())
        return [node for node in self.run.nodes[first:] if node.name in corrected]

    def treated(self, proposal: Proposal) -> frozenset[Site]:
        """Returns the sites that a proposal leaves float, or whose constants it changes."""
        gone = {site for site in self.sites if site.annotators and site.annotators <= proposal.floats}
        return frozenset(gone | {site for site in self.sites if site.dequantizes[0] in proposal.constants})

    def lost(self, floats: frozenset[Node]) -> int:
        """Returns the integer multiply-accumulates of nodes."""
        return sum(self.work[node] for node in floats if node in self.integer)

    def integer_share(self, floats: frozenset[Node]) -> float:
        """Returns which share of the multiply-accumulates is integer when these nodes stay float."""
        total = sum(self.work.values())
        return (sum(self.work[n] for n in self.integer) - self.lost(floats)) / total if total else 0.0

    def proposals(self, site: Site) -> Iterator[Proposal]:
        """Yields what may cure a site, the cheapest first."""
        if site.kind == "weight":
            yield from self._per_channel(site)
        yield from self._left_out(site)

    def _per_channel(self, site: Site) -> Iterator[Proposal]:
        if not all(reader.target in LAYERS for reader in site.readers):
            return
        modules = tuple(dict.fromkeys(module_path(reader) for reader in site.readers))
        inside = {node for module in modules for node in self._within.get(module, ())}
        constants: dict[Node, torch.Tensor] = {}
        for each in self.sites:
            if each.kind == "weight" and _is_per_tensor(each) and inside.issuperset(each.readers):
                value = _in_channels(each, self.run.float_weight(each))
                constants |= dict.fromkeys(each.dequantizes, value) | self._biases(each.readers)
        if site.dequantizes[0] in constants:
            yield Proposal("per_channel", modules, (), constants=constants)

    def _left_out(self, site: Site) -> Iterator[Proposal]:
        asking = frozenset(node for each in self.groups[site] for node in each.annotators)
        asking |= {node for each in asking for node in self._chains.get(each, ())}
        if not asking:
            return
        modules: list[str] = []
        left = set(asking)
        floats = set(asking)
        in_order = [node for node in self.run.nodes if node in asking]
        for module in dict.fromkeys(map(module_path, in_order)):
            inside = self._within.get(module, set())
            is_free = self.lost(frozenset(inside)) == self.lost(frozenset(inside & asking))
            if module and is_free and self._are_whole(inside | asking):
                modules.append(module)
                left -= inside
                floats |= inside
        yield Proposal("float", tuple(modules), tuple(n.name for n in in_order if n in left), frozenset(floats))

    def _are_whole(self, nodes: set[Node]) -> bool:
        """True where none is computed as one with another node: of a relu called twice, one may end a sum."""
        return all(nodes.issuperset(self._chains.get(node, ())) for node in nodes)


def mean_db(sums: Iterable[Sums]) -> float:
    """Returns the mean SQNR of float outputs in dB, each of 120 at most; NaN where there is none."""
    found = [min(each.sqnr_db, MOST_DB) for each in sums if each.signal]
    return sum(found) / len(found) if found else math.nan


def _nodes_within(model: GraphModule) -> dict[str, set[Node]]:
    """Returns the nodes of each module, those of the modules in it included, by path."""
    found: dict[str, set[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and not any(
            node.target in each for each in (ops.QUANTIZE_OPS, ops.DEQUANTIZE_OPS)
        ):
            for path, _ in module_stack(node):
                found.setdefault(path, set()).add(node)
            found.setdefault("", set()).add(node)
    return found


def _chains(sites: Iterable[Site]) -> dict[Node, tuple[Node, ...]]:
    """Returns for each node those that are computed as one with it."""
    chains = [tuple(chain_of(site.source)) for site in sites if site.kind == "activation"]
    return {node: chain for chain in chains for node in chain}


def _is_per_tensor(site: Site) -> bool:
    return site.dequantizes[0].target in (ops.DEQUANTIZE_PER_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR)


def channels_of(site: Site) -> int:
    """Returns the axis of the output channels of a weight."""
    layer = site.readers[0]
    return 1 if layer.target in TRANSPOSED and groups_of_layer(layer) == 1 else 0


def _in_channels(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight rounded with a scale for each output channel."""
    low, high = site.limits
    others = [each for each in range(weight.dim()) if each != channels_of(site)]
    scale, _ = choose_qparams(
        weight.amin(others, keepdim=True),
        weight.amax(others, keepdim=True),
        low,
        high,
        symmetric=True,
        eps=FINE_EPS,
    )
    return (weight / scale).round().clamp(low, high) * scale


@dataclass(frozen=True, slots=True)
class Cures:
    """Cures, that which gains most first.

    Args:
        before_db, after_db: the SQNR of the outputs on the batches on which they were tried, without and with them.
        treated: the sites that the first one treats.
    """

    cures: tuple[Cure, ...]
    before_db: float
    after_db: float
    treated: frozenset[Site]


def find_cures(patient: Patient, sites: Iterable[Site]) -> Cures:
    """Returns what to do about sites, that which gains most first.

    For each site the cheapest rule is taken of those that come within 1 dB of the best, with what is taken for those
    before it: where several sites ruin the output, the cure of one alone gains nothing. Then those that are not needed
    are dropped.
    """
    taken: list[Proposal] = []
    for site in sites:
        tried = [(each, patient.sqnr_db([*taken, each])) for each in patient.proposals(site)]
        best = max((found for _, found in tried), default=-math.inf)
        close = [each for each, found in tried if found >= best - ABOUT_DB]
        taken += close[:1]
    reached = patient.sqnr_db(taken)
    for each in reversed(taken):
        others = [other for other in taken if other is not each]
        without = patient.sqnr_db(others)
        if without >= reached - SMALLEST_GAIN_DB:
            taken, reached = others, without
    cures = list(zip(_as_cures(patient, taken, reached), taken, strict=True))
    cures.sort(key=lambda each: -each[0].gain_db)
    treated = patient.treated(cures[0][1]) if cures else frozenset[Site]()
    return Cures(tuple(cure for cure, _ in cures), patient.sqnr_db([]), reached, treated)


def _as_cures(patient: Patient, taken: Sequence[Proposal], reached: float) -> Iterator[Cure]:
    floats = frozenset(node for each in taken for node in each.floats)
    for each in taken:
        others = [other for other in taken if other is not each]
        of_others = frozenset(node for other in others for node in other.floats)
        lost = patient.lost(floats - of_others)
        gain = reached - patient.sqnr_db(others)
        yield Cure(each.kind, each.modules, each.nodes, gain, lost, patient.integer_share(floats))
