"""An explanation in words."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeropoint.report.explain.explanation import ExplainedNode, Explanation, GoneNode, ScaleGroup

IN_DEPTH = 6
"""An explanation of as many nodes shows each in depth."""
MOST_PLACES, MOST_GROUPS, MOST_MEMBERS = 6, 8, 8
"""How many places of one kind, groups, and tensors of a group the text shows; the data has all."""
_NUMBER = re.compile(r"\d+")
_NODE_NUMBER = re.compile(r"(_\d+)+\b")


def headline(node: ExplainedNode) -> str:
    """Returns a node with its operator, module and source line."""
    place = ", ".join(part for part in (node.module, node.source) if part)
    return f"{node.name} ({node.operator}){f' [{place}]' if place else ''}"


def node_lines(node: ExplainedNode) -> list[str]:
    """Returns one node in depth: what became of it, what it reads and what it returns."""
    pattern = f" (row {node.pattern!r})" if node.pattern else ""
    state = f"integer{pattern}" if node.is_quantized else f"float{pattern}: {node.reason}"
    lines = [f"{headline(node)}: {state}"]
    if node.exported_as:
        lines.append(f"  exported as {node.exported_as}")
    if node.computed_with:
        lines.append(f"  computed with {', '.join(node.computed_with)}")
    return [*lines, *(f"  reads   {tensor}" for tensor in node.inputs), f"  returns {node.output}"]


def group_lines(group: ScaleGroup) -> list[str]:
    """Returns a group: its spec, its range, its members with theirs, and who made the range that wide."""
    wide = f", range {group.low:.4g} to {group.high:.4g}" if group.low is not None and group.high is not None else ""
    lines = [f"group {group.number}: {group.spec}{wide}"]
    widest = group.widened_by() if group.is_shared else ()
    for member in group.members[:MOST_MEMBERS]:
        own = f", {member.low:.4g} to {member.high:.4g}" if member.low is not None else ""
        lines.append(
            f"  {member.tensor} ({', '.join(member.sites[:4])}{', ...' if len(member.sites) > 4 else ''}){own}"
        )
    if len(group.members) > MOST_MEMBERS:
        lines.append(f"  ... and {len(group.members) - MOST_MEMBERS} more tensors")
    return [*lines, f"  range by {' and '.join(widest)}"] if widest else lines


def lines(explanation: Explanation) -> list[str]:
    """Returns the whole: totals, integer operators, float ones by reason, what is gone, rules and shared scales."""
    if 0 < len(explanation.nodes) <= IN_DEPTH:
        return _in_depth(explanation)
    specs = _Specs(explanation)
    return [
        _totals(explanation),
        *(f"rule      {rule}" for rule in explanation.rules),
        *(["quantized as", *specs.lines()] if specs.letters else []),
        *_section("integer", _by_kind(explanation.quantized, specs.kind)),
        *_section("float", _by_kind(explanation.stays_float, _float_kind)),
        *_section("gone", _by_kind(explanation.gone, _gone_kind)),
        *_shared(explanation),
    ]


def _in_depth(explanation: Explanation) -> list[str]:
    nodes = [line for node in explanation.nodes for line in node_lines(node)]
    gone = [str(node) for node in explanation.gone]
    groups = [line for group in explanation.groups if group.is_shared for line in group_lines(group)]
    return [_totals(explanation), *(f"rule      {rule}" for rule in explanation.rules), *nodes, *gone, *groups]


def _totals(explanation: Explanation) -> str:
    integer, floats = len(explanation.quantized), len(explanation.stays_float)
    tensors = sum(len(group.members) for group in explanation.groups)
    shared = sum(group.is_shared for group in explanation.groups)
    scales = f"{tensors} tensors quantized; {shared} scales are of several tensors"
    return f"{integer} of {integer + floats} operators integer, {floats} float; {scales}"


class _Specs:
    """Letters for the specs of a model, so that lines about many tensors are short."""

    def __init__(self, explanation: Explanation) -> None:
        specs = (tensor.spec for node in explanation.nodes for tensor in (*node.inputs, node.output) if tensor.spec)
        self.letters = {spec: _letters(number) for number, (spec, _) in enumerate(Counter(specs).most_common())}

    def lines(self) -> list[str]:
        """Returns what the letters stand for."""
        return [f"  {letter}  {spec}" for spec, letter in self.letters.items()]

    def kind(self, node: ExplainedNode) -> tuple[str, str]:
        """Returns the operator of a node, and how what it reads and returns is quantized."""
        inputs = Counter(
            f"{_argument(tensor.site)} {self.letters[tensor.spec]}" for tensor in node.inputs if tensor.spec
        )
        parts = [text if count == 1 else f"{count} x {text}" for text, count in inputs.items()]
        output = [f"returns {self.letters[node.output.spec]}"] if node.output.spec else []
        return node.operator, ", ".join([*parts, *output]) or f"computed with {node.pattern or 'its neighbours'}"


def _letters(number: int) -> str:
    return string.ascii_uppercase[number] if number < 26 else f"{string.ascii_uppercase[number % 26]}{number // 26}"


def _argument(site: str) -> str:
    return site.partition(".")[2].partition("[")[0]


def _float_kind(node: ExplainedNode) -> tuple[str, str]:
    return node.operator, node.reason


def _gone_kind(node: GoneNode) -> tuple[str, str]:
    return node.operator, node.how


def _by_kind(nodes: Iterable[Any], kind_of: Callable[[Any], tuple[str, str]]) -> dict[tuple[str, str], list[Any]]:
    """Returns the nodes by kind, most first. Kinds that differ in numbers of nodes alone are one, told as the first."""
    firsts: dict[tuple[str, str], tuple[str, str]] = {}
    kinds: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for node in nodes:
        operator, what = kind_of(node)
        kinds[firsts.setdefault((operator, _NODE_NUMBER.sub("", what)), (operator, what))].append(node)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def _section(title: str, kinds: dict[tuple[str, str], list[Any]]) -> list[str]:
    if not kinds:
        return []
    width = max(len(operator) for operator, _ in kinds)
    found = [title]
    for (operator, what), nodes in kinds.items():
        found.append(f"  {len(nodes):4}  {operator:<{width}}  {what}".rstrip())
        found.append(f"        {' ' * width}  in {places([node.modules[0] if node.modules else '' for node in nodes])}")
    return found


def places(paths: Sequence[str]) -> str:
    """Returns paths of modules in few words: those that differ in one number as one, with the numbers in braces."""
    alike: dict[str, list[list[int]]] = defaultdict(list)
    for path in dict.fromkeys(path or "(the model)" for path in paths):
        alike[_NUMBER.sub("#", path)].append([int(number) for number in _NUMBER.findall(path)])
    texts = [_merged(pattern, numbers) for pattern, numbers in alike.items()]
    more = [f"and {len(texts) - MOST_PLACES} more places"] if len(texts) > MOST_PLACES else []
    return ", ".join(texts[:MOST_PLACES] + more)


def _merged(pattern: str, numbers: list[list[int]]) -> str:
    columns = [_range(sorted({row[i] for row in numbers})) for i in range(len(numbers[0]))]
    for column in columns:
        pattern = pattern.replace("#", column, 1)
    return pattern


def _range(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    is_run = values == list(range(values[0], values[-1] + 1))
    return f"{{{values[0]}..{values[-1]}}}" if is_run and len(values) > 2 else f"{{{','.join(map(str, values))}}}"


def _shared(explanation: Explanation) -> list[str]:
    shared = sorted((g for g in explanation.groups if g.is_shared), key=lambda group: -len(group.members))
    if not shared:
        return []
    found = [f"  {line}" for group in shared[:MOST_GROUPS] for line in group_lines(group)]
    more = [f"  ... and {len(shared) - MOST_GROUPS} more groups"] if len(shared) > MOST_GROUPS else []
    return ["shared scales", *found, *more]
