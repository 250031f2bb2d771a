"""What ``compare`` proposes, as rules of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from zeropoint.cli.schema import to_toml
from zeropoint.cli.settings import RuleSettings, Settings
from zeropoint.report.compare.cures import Cure


def rules_of(cures: Iterable[Cure], settings: Settings) -> tuple[RuleSettings, ...]:
    """Returns the rules of cures, each once, for a model that these settings made."""
    return tuple(dict.fromkeys(rule for cure in cures for rule in _rules(cure, settings)))


def _rules(cure: Cure, settings: Settings) -> Iterator[RuleSettings]:
    """A scale for each channel keeps the scheme; the path of the model itself, which is empty, is ``*`` in a rule."""
    if cure.kind == "per_channel":
        scheme = settings.scheme
        yield from (RuleSettings(module=each or "*", scheme=scheme, weights="per_channel") for each in cure.modules)
    else:
        yield from (RuleSettings(module=module) for module in cure.modules)
        yield from (RuleSettings(node=node) for node in cure.nodes)


def with_rules(settings: Settings, rules: Iterable[RuleSettings]) -> Settings:
    """Returns settings with more rules after those that they have: of two for one module, the last one holds."""
    return replace(settings, rules=(*settings.rules, *rules))


def lines_of(rules: Iterable[RuleSettings]) -> str:
    """Returns rules as the lines of a configuration file."""
    text = to_toml(Settings(rules=tuple(rules)))
    return text[text.index("[[rules]]") :].rstrip()
