"""Does a converted model compute what was trained? And if not, where does it begin to differ?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from zeropoint.core.dtypes import FLOAT_DTYPES, plain_dtype
from zeropoint.core.errors import ComparisonError
from zeropoint.graph.bind import reads
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.copies import copied, deep_copy
from zeropoint.graph.graph_pass import bodies
from zeropoint.graph.inputs import inputs_for
from zeropoint.graph.observers import has_observers, is_fake_quantizer, observer_of
from zeropoint.graph.train_eval import move_exported_model_to_eval
from zeropoint.graph.within import graphs_within
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.convert import SITE_KEY
from zeropoint.passes.qparams_of import saw_nothing
from zeropoint.report.float_state import require_float_state
from zeropoint.report.record import record_of
from zeropoint.report.trained.site_values import ConvertedRun, PreparedRun, SiteValue, output_scale, steps_apart

WHERE = "check_convert"
ONE_STEP = 1.001
"""Two neighbours on a grid are one step apart, and a little that is rounding of floats."""


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """How far a site, or an output, of the converted model is from the prepared one.

    Args:
        site: what is quantized: the operator that gives it, or what reads a constant and as which argument.
        prepared: the node that calls the fake quantizer.
        converted: the dequantize that is furthest; empty where there is none.
        steps: the largest difference, in steps of the scale there.
        own_steps: the same when all sites before it hold the values of the prepared model: what this site adds. The
            ends of its range count too, which the inputs may not reach: so another scale is seen.
        sqnr_db: SQNR in dB, the prepared model being the signal.
    """

    site: str
    prepared: str
    converted: str
    steps: float
    own_steps: float
    sqnr_db: float

    @property
    def agrees(self) -> bool:
        """True within one step of the values that the sites before give."""
        return self.own_steps <= ONE_STEP


@dataclass(frozen=True, slots=True)
class ConvertCheck:
    """How a converted model compares with the prepared one in eval mode.

    Args:
        sites: one for each fake quantizer's call, in the order of the graph.
        outputs: one for each tensor that the models return; a float one is measured in 1/255 of its range.
        notes: what was not compared, or cannot agree.
    """

    sites: tuple[SiteDifference, ...]
    outputs: tuple[SiteDifference, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> SiteDifference | None:
        """The first site, then output, that differs by more than one step on its own; None where none does."""
        return next((each for each in (*self.sites, *self.outputs) if not each.agrees), None)

    @property
    def agrees(self) -> bool:
        """True when no site and no output differs by more than one step."""
        return self.first is None

    @property
    def largest_steps(self) -> float:
        """The largest difference of a site in steps, those that it was given included; 0 where there is no site."""
        return max((site.steps for site in self.sites), default=0.0)

    def __str__(self) -> str:
        return "\n".join([self._verdict(), *_table((*self.sites, *self.outputs)), *(f"note: {n}" for n in self.notes)])

    def _verdict(self) -> str:
        first = self.first
        if first is None:
            rest = (
                f", {self.largest_steps:.2f} with what those before differ by" if self.largest_steps > ONE_STEP else ""
            )
            return f"the converted model is what was trained: {len(self.sites)} sites within one step{rest}"
        found = f"{first.own_steps:.2f} steps" if first.converted else "it is not in the converted model"
        return f"the converted model differs from {first.site} on: {found}"


@torch.no_grad()
def check_convert(prepared: nn.Module, converted: nn.Module, inputs: Any) -> ConvertCheck:
    """Returns how a converted model compares with the prepared one in eval mode, at each fake quantizer, in steps.

    Copies are run; the models stay as they are. Scales are those that ``convert_pt2e`` took: nothing is observed anew,
    but where the range is that of each tensor. What differs by rounding to the other neighbour at one site may be more
    than a step at the next; so each site is also measured with the values of the prepared model before it, which tells
    where a difference comes from. Observers do not round, so a model with none but those cannot be compared.

    Args:
        prepared: what ``prepare_qat_pt2e`` returned, or ``prepare_pt2e`` with fake quantizers; a copy taken before
            ``convert_pt2e``, which changes its model. It may be wrapped, as in ``DistributedDataParallel``.
        converted: what ``convert_pt2e`` made of it, with quantize and dequantize operators.
        inputs: positional inputs as a tuple, or a single tensor.

    Raises:
        ComparisonError: a model has no fake quantizers, or they are switched off; or is not converted by zeropoint.
        CalibrationError, NonFiniteError: the inputs do not fit the model.
    """
    trained, result = _graph(prepared, "prepared"), _graph(converted, "converted")
    _require_fake_quantizers(trained)
    _require_sites(result)
    require_float_state(result, WHERE)
    values = inputs_for(trained, inputs, WHERE)
    reference = PreparedRun(_in_eval_mode(trained))
    expected = _run(reference, values)
    free, own = (ConvertedRun(deep_copy(result), reference.values, in_place) for in_place in (False, True))
    outputs = (_run(free, values), _run(own, values))
    sites = tuple(_site(name, node, free, own) for node, name in _site_names(trained, reference.values))
    return ConvertCheck(sites, tuple(_outputs(expected, *outputs)), tuple(_notes(trained)))


def _graph(model: nn.Module, name: str) -> GraphModule:
    found = graphs_within(model)
    if len(found) != 1:
        what = f"{name} is {type(model).__name__} with {len(found)} exported graphs, not one"
        raise ComparisonError(what, where=WHERE, remedy="Give what prepare_qat_pt2e and convert_pt2e returned.")
    return found[0]


def _observers(model: GraphModule) -> Iterator[tuple[Node, Any]]:
    """Yields each call of an observer or fake quantizer, those in control flow included."""
    for node in model.graph.nodes:
        if (observer := observer_of(model, node)) is not None:
            yield node, observer
    for _, body in bodies(model):
        yield from _observers(body)


def _require_fake_quantizers(model: GraphModule) -> None:
    fakes = [(node, observer) for node, observer in _observers(model) if is_fake_quantizer(observer)]
    if not fakes and has_observers(model):
        what = "the prepared model has observers only, which do not round: it is the float model"
        remedy = "Compare fake-quantized models: prepare_qat_pt2e, or specs with a FakeQuantize constructor."
        raise ComparisonError(what, where=WHERE, remedy=remedy)
    if not fakes:
        remedy = "convert_pt2e changes its model: give it a copy, convert_pt2e(copy.deepcopy(prepared))."
        raise ComparisonError("the prepared model has no fake quantizers", where=WHERE, remedy=remedy)
    off = [node.name for node, fake in fakes if not bool(fake.fake_quant_enabled.item())]
    if off:
        what = f"{len(off)} of {len(fakes)} fake quantizers are switched off, {off[0]} the first: they do not round"
        remedy = "Switch them on, prepared.apply(enable_fake_quant), and train with them on."
        raise ComparisonError(what, where=WHERE, remedy=remedy)


def _require_sites(model: GraphModule) -> None:
    graphs = [model, *(body for _, body in bodies(model))]
    if any(SITE_KEY in node.meta for graph in graphs for node in graph.graph.nodes):
        return
    remedy = "Give what convert_pt2e returned, not exported, saved or traced since."
    what = "the nodes of the converted model do not say which fake quantizers they stand for"
    if has_observers(model):
        what, remedy = "the converted model has observers", "Give what convert_pt2e returned."
    elif record_of(model).representation == "reference":
        what = "the converted model is the reference representation, which has no dequantize operators to compare"
        remedy = "Convert a copy without use_reference_representation=True."
    raise ComparisonError(what, where=WHERE, remedy=remedy)


def _in_eval_mode(model: GraphModule) -> GraphModule:
    """Returns a copy in eval mode that rounds with the scales it has."""
    copied = move_exported_model_to_eval(deep_copy(model))
    for _, observer in _observers(copied):
        if is_fake_quantizer(observer) and not getattr(observer, "is_dynamic", False) and not saw_nothing(observer):
            observer.disable_observer()
    return copied


def _run(run: PreparedRun | ConvertedRun, inputs: tuple[Any, ...]) -> list[Any]:
    """Returns what a model gives, as a list; random numbers in it are the same in every run."""
    with torch.random.fork_rng(devices=()):
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        return pytree.tree_leaves(run.run(*pytree.tree_map(copied, inputs)))


def _site_names(model: GraphModule, values: dict[str, SiteValue]) -> Iterator[tuple[str, str]]:
    """Yields the name of each call of a fake quantizer that is read, and what it quantizes."""
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        if node.name in values and node.users:
            source, reader = node.all_input_nodes[0], next(iter(node.users))
            read_as = next((str(site) for site, read in reads(reader) if read is node), "")
            yield node.name, read_as if source in constants and read_as else source.name


def _site(name: str, node: str, free: ConvertedRun, own: ConvertedRun) -> SiteDifference:
    if node not in free.found:
        return SiteDifference(name, node, "", math.inf, math.inf, -math.inf)
    (_, steps, ratio), (converted, own_steps, _) = free.found[node], own.found[node]
    return SiteDifference(name, node, converted, steps, own_steps, ratio)


def _outputs(expected: list[Any], free: list[Any], own: list[Any]) -> Iterator[SiteDifference]:
    if not len(expected) == len(free) == len(own):
        what = f"the prepared model returns {len(expected)} values, the converted one {len(free)}"
        raise ComparisonError(what, where=WHERE, remedy="Give two models of one export.")
    for index, (wanted, *found) in enumerate(zip(expected, free, own, strict=True)):
        if isinstance(wanted, torch.Tensor):
            is_float = wanted.dtype.is_floating_point
            scale = output_scale(wanted) if is_float else torch.ones(())
            steps, own_steps = (steps_apart(wanted, each, scale) for each in found)
            yield SiteDifference(f"output {index}", "output", "output", steps, own_steps, sqnr_db(wanted, found[0]))


def _notes(model: GraphModule) -> Iterator[str]:
    calls = [(node, observer) for node, observer in _observers(model) if not is_fake_quantizer(observer)]
    only_observe = [node.name for node, observer in calls if plain_dtype(observer.dtype) not in FLOAT_DTYPES]
    if only_observe:
        yield f"{len(only_observe)} observers do not round in the prepared model, {only_observe[0]} the first"
    inside = sum(is_fake_quantizer(observer) for _, body in bodies(model) for _, observer in _observers(body))
    if inside:
        yield f"{inside} fake quantizers inside of control flow were not compared one by one; what it returns was"


def _table(rows: Sequence[SiteDifference]) -> list[str]:
    width = max((len(row.site) for row in rows), default=4)
    lines = [f"{'site':<{width}}  {'steps':>8}  {'its own':>8}  {'SQNR dB':>8}"]
    for row in rows:
        numbers = f"{row.steps:>8.2f}  {row.own_steps:>8.2f}  {row.sqnr_db:>8.1f}"
        lines.append(f"{row.site:<{width}}  {numbers}{'' if row.agrees else '  <- differs'}")
    return lines
