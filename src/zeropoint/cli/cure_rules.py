"""What ``compare`` proposes, as rules of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from zeropoint.cli.schema import to_toml
from zeropoint.cli.settings import RuleSettings, Settings
from zeropoint.report.cures import Cure


def rules_of(cures: Iterable[Cure]) -> tuple[RuleSettings, ...]:
    """Returns the rules of cures, each once.

    A scale for each channel is no rule: every scheme of the configuration has it.
    """
    return tuple(dict.fromkeys(rule for cure in cures if cure.kind == "float" for rule in _rules(cure)))


def _rules(cure: Cure) -> Iterator[RuleSettings]:
    yield from (RuleSettings(module=module) for module in cure.modules)
    yield from (RuleSettings(node=node) for node in cure.nodes)


def with_rules(settings: Settings, rules: Iterable[RuleSettings]) -> Settings:
    """Returns settings with more rules, which go before those that are there."""
    return replace(settings, rules=(*settings.rules, *rules))


def lines_of(rules: Iterable[RuleSettings]) -> str:
    """Returns rules as the lines of a configuration file."""
    text = to_toml(Settings(rules=tuple(rules)))
    return text[text.index("[[rules]]") :].rstrip()
