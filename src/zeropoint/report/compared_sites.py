"""The sites of a converted model, and what is summed up of each over the data."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument, reads
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.layers import CLAMPS
from zeropoint.report.conversions import chooses_qparams, is_dequantize, is_quantize
from zeropoint.report.coverage import ONLY_CONSTANTS
from zeropoint.report.record import record_of

MOST_CODES = 2**16
"""So many values of a tensor, evenly spread, are looked at for the codes that are used; and types of so many codes."""

CLIPPED_STEPS = 0.51
"""What is moved by more steps of the scale was not rounded but clipped."""

Again = Callable[[Node, torch.Tensor, dict[Node, Any]], torch.Tensor]
Kind = Literal["activation", "weight"]


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """A tensor that is quantized.

    Args:
        node: the quantize operator of an activation, or the integers of a constant.
        source: what is quantized: the node that computes it, or the constant.
        dequantizes: the dequantize operators that read the integers.
        readers: the nodes that read those.
        annotators: the nodes that ask for it: it stays float when all of them do. Empty: none is known.
        kind: activation or weight.
        is_dynamic: the range is that of each tensor.
    """

    node: Node
    source: Node
    dequantizes: tuple[Node, ...]
    readers: tuple[Node, ...]
    annotators: frozenset[Node]
    kind: Kind
    is_dynamic: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        low, high = (argument(self.dequantizes[0], name) for name in ("quant_min", "quant_max"))
        return (-128 if low is None else int(low), 127 if high is None else int(high))

    @property
    def name(self) -> str:
        """What is quantized: the node that computes an activation, or who reads a constant and as what."""
        if self.kind == "activation":
            return self.source.name
        named = [str(site) for reader in self.readers for site, read in reads(reader) if read in self.dequantizes]
        return named[0] if named else self.source.name


def find_sites(model: GraphModule) -> list[Site]:
    """Returns the sites of a converted model, in the order of the graph."""
    constants = constant_nodes(model)
    stays_float = {r.node for r in record_of(model).coverage if r.reason and r.reason != ONLY_CONSTANTS}
    found: list[Site] = []
    for node in model.graph.nodes:
        dequantizes = tuple(user for user in node.users if is_dequantize(user) and user.args[0] is node)
        readers = tuple(dict.fromkeys(reader for each in dequantizes for reader in each.users))
        if not readers:
            continue
        if not is_quantize(node):
            found.append(Site(node, node, dequantizes, readers, frozenset(readers), "weight"))
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        is_dynamic = any(_is_chosen(each) for each in node.all_input_nodes)
        asking = [n for n in readers if n.name not in stays_float and n.op != "output"]
        if source not in constants and not is_dynamic:
            asking += [n for n in chain_of(source) if n.name not in stays_float]
        kind: Kind = "weight" if source in constants else "activation"
        found.append(Site(node, source, dequantizes, readers, frozenset(asking), kind, is_dynamic))
    return found


def _is_chosen(node: Node) -> bool:
    return chooses_qparams(node) or (node.target is operator.getitem and chooses_qparams(node.all_input_nodes[0]))


def chain_of(node: Node) -> list[Node]:
    """Returns the nodes that are computed as one with a node before it is quantized: a layer and its clamp."""
    chain: list[Node] = []
    while node.op == "call_function" and not is_dequantize(node):
        chain.append(node)
        if any(is_dequantize(read) for read in node.all_input_nodes):
            return chain
        if node.target not in CLAMPS:
            break
        node = node.all_input_nodes[0]
    return []


def groups_of(sites: list[Site]) -> dict[Site, tuple[Site, ...]]:
    """Returns for each activation the activations with which it shares scale and zero point through one operator.

    What the first of such a chain rounds, a pooling or a reshape moves on, and the next rounds as coarsely.
    """
    behind = {dequantize: site for site in sites for dequantize in site.dequantizes if site.kind == "activation"}
    parent = {site: site for site in sites}

    def root(site: Site) -> Site:
        while parent[site] is not site:
            site = parent[site]
        return site

    for site in sites:
        if site.kind == "weight" or site.is_dynamic:
            continue
        sources = site.source.all_input_nodes if site.source.op == "call_function" else []
        for before in (behind[read] for read in sources if read in behind):
            if before.node.args[1:] == site.node.args[1:]:
                parent[root(site)] = root(before)
    members: dict[Site, list[Site]] = {}
    for site in sites:
        members.setdefault(root(site), []).append(site)
    return {site: tuple(each) for each in members.values() for site in each}


@dataclass(slots=True)
class Sums:
    """What is summed up of a site, or of an output, over the batches."""

    signal: float = 0.0
    actual: float = 0.0
    error: float = 0.0
    own_signal: float = 0.0
    own_error: float = 0.0
    largest: float = 0.0
    largest_steps: float = 0.0
    clipped_error: float = 0.0
    clipped: int = 0
    count: int = 0
    codes: torch.Tensor | None = None
    ranges: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Smallest and largest float value of each batch."""

    def add(self, reference: torch.Tensor, actual: torch.Tensor, factor: int = 1) -> None:
        """Adds a batch: the float tensor, and that of the quantized model; ``factor`` where they are a part of it."""
        error = actual - reference
        self.signal += factor * power(reference)
        self.actual += factor * power(actual)
        self.error += factor * power(error)
        self.largest = max(self.largest, _largest(error))
        self.count += factor * error.numel()

    def add_own(self, before: torch.Tensor, after: torch.Tensor, scale: torch.Tensor | None, factor: int = 1) -> None:
        """Adds what rounding did to a tensor: what was quantized, what came out, and the scale that broadcasts."""
        error = after - before
        self.own_signal += factor * power(before)
        self.own_error += factor * power(error)
        if scale is None:
            return
        if scale.numel() == 1:
            largest = _largest(error) / float(scale)
        else:
            largest = _largest(error / scale)
        self.largest_steps = max(self.largest_steps, largest)
        if largest > CLIPPED_STEPS:
            is_clipped = (error.abs() > CLIPPED_STEPS * scale) & error.isfinite()
            self.clipped += factor * int(is_clipped.sum())
            self.clipped_error += factor * power(error[is_clipped])

    def add_codes(self, integers: torch.Tensor, low: int, high: int) -> None:
        """Marks the codes that a tensor uses."""
        some = some_of(integers, MOST_CODES)[0].to(torch.int64) - low
        self.mark(some.clamp(0, high - low), low, high)

    def mark(self, codes: torch.Tensor, low: int, high: int) -> None:
        """Marks codes, int64, counted from the smallest integer."""
        if high - low >= MOST_CODES:
            return
        if self.codes is None:
            self.codes = torch.zeros(high - low + 1, dtype=torch.bool)
        self.codes[codes.cpu()] = True

    @property
    def sqnr_db(self) -> float:
        """SQNR in dB of the quantized model's tensor against the float one."""
        return decibels(self.signal, self.error)

    @property
    def own_sqnr_db(self) -> float:
        """SQNR in dB of what rounding did here."""
        return decibels(self.own_signal, self.own_error)

    @property
    def cosine(self) -> float:
        """The cosine between the two tensors; 1 where both are 0."""
        product = math.sqrt(self.signal * self.actual)
        return (self.signal + self.actual - self.error) / (2 * product) if product else float(self.error == 0)


def some_of(value: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """Returns values of a tensor, flat and evenly spread, about so many at most, and one of how many each is.

    The distance is odd, so that they are not all of one column.
    """
    every = max(1, value.numel() // most)
    every += every > 1 and every % 2 == 0
    value = value.detach()
    if every == 1 or value.is_contiguous():
        return value.reshape(-1)[::every], every
    return torch.take(value, torch.arange(0, value.numel(), every, device=value.device)), every


def some_along(value: torch.Tensor, scale: torch.Tensor | None, most: int) -> tuple[tuple[slice, ...], int]:
    """Returns which part of a tensor to look at, about so many values, and one of how many each is.

    It is cut along the longest axis along which the scale is one.
    """
    whole = slice(None)
    axes = [each for each in range(value.dim()) if scale is None or scale.dim() == 0 or scale.shape[each] == 1]
    every = max(1, value.numel() // most)
    if not axes or every == 1:
        return (whole,) * value.dim(), 1
    axis = max(axes, key=lambda each: value.shape[each])
    every = min(every + (every % 2 == 0), value.shape[axis])
    return tuple(slice(None, None, every) if each == axis else whole for each in range(value.dim())), every


def decibels(signal: float, error: float) -> float:
    """Returns a ratio of powers in dB."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf


def power(value: torch.Tensor) -> float:
    """Returns the sum of squares of the finite values: a mask is infinite, which no grid has."""
    flat = value.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float32 else flat.float()
    found = float(torch.dot(flat, flat))
    return found if math.isfinite(found) else float(flat[flat.isfinite()].double().square().sum())


def _largest(error: torch.Tensor) -> float:
    if not error.numel():
        return 0.0
    low, high = map(float, torch.aminmax(error))
    if not math.isfinite(low + high):
        return _largest(error[error.isfinite()])
    return max(-low, high)


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """An activation site in a batch.

    Args:
        reference: its float value.
        before, after: what is quantized in the quantized model, and that dequantized.
        rounded: the float value quantized and dequantized; None where that was not asked for.
    """

    reference: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    rounded: torch.Tensor | None = None


class SiteWatch:
    """Calls ``look(site, seen)`` for each activation site of a lock-step run, in the order of the graph.

    Args:
        sites: all sites of the model.
        look: what to call.
        again: computes an operator for another first argument, to round the float values too.
    """

    def __init__(self, sites: Iterable[Site], look: Callable[[Site, Seen], None], again: Again | None = None) -> None:
        activations = [site for site in sites if site.kind == "activation"]
        self._look, self._again = look, again
        self._quantizes = {site.node: site for site in activations}
        self._dequantizes = {site.dequantizes[0]: site for site in activations}
        self._before: dict[Site, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @torch.no_grad()
    def __call__(self, node: Node, reference: Any, actual: Any, floats: Any, quantized: Any) -> None:
        """Looks at a node: its float and its quantized value, and those of all that is read later."""
        if node in self._quantizes:
            site = self._quantizes[node]
            rounded = None if self._again is None else self._again(node, reference.detach(), quantized)
            self._before[site] = quantized[site.source], rounded
        elif node in self._dequantizes:
            site = self._dequantizes[node]
            before, integers = self._before.pop(site)
            rounded = None if integers is None or self._again is None else self._again(node, integers, quantized)
            self._look(site, Seen(reference, before, actual, rounded))
