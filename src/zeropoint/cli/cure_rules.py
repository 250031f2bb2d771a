"""What ``compare`` proposes, as rules of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from zeropoint.annotate.rules import matches, paths_around
from zeropoint.cli.schema import to_toml
from zeropoint.cli.settings import RuleSettings, Scheme, Settings
from zeropoint.report.compare.cures import Cure


def rules_of(cures: Iterable[Cure], settings: Settings) -> tuple[RuleSettings, ...]:
    """Returns the rules of cures, each once, for a model that these settings made."""
    return tuple(dict.fromkeys(rule for cure in cures for rule in _rules(cure, settings)))


def _rules(cure: Cure, settings: Settings) -> Iterator[RuleSettings]:
    """A scale for each channel keeps the scheme; the path of the model itself, which is empty, is ``*`` in a rule."""
    if cure.kind == "per_channel":
        for module in cure.modules:
            yield RuleSettings(module=module or "*", scheme=_scheme_of(module, settings), weights="per_channel")
    else:
        yield from (RuleSettings(module=module) for module in cure.modules)
        yield from (RuleSettings(node=node) for node in cure.nodes)


def _scheme_of(module: str, settings: Settings) -> Scheme:
    """Returns the scheme that a module has by its path, by that of one around it, or as all have it."""
    for path in paths_around(module):
        for rule in reversed(settings.rules):
            if rule.module and matches(path, rule.module):
                return rule.scheme
    return settings.scheme


def with_rules(settings: Settings, rules: Iterable[RuleSettings]) -> Settings:
    """Returns settings with more rules after those that they have: of two for one module, the last one holds."""
    return replace(settings, rules=(*settings.rules, *rules))


def lines_of(rules: Iterable[RuleSettings]) -> str:
    """Returns rules as the lines of a configuration file."""
    text = to_toml(Settings(rules=tuple(rules)))
    return text[text.index("[[rules]]") :].rstrip()
