"""What most commands begin with: MODEL, DATA and the configuration, as the user gave them on one command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from zeropoint.annotate.quantizer import Quantizer
from zeropoint.cli.data import Data, load_data
from zeropoint.cli.exits import UsageError
from zeropoint.cli.models import Model, load_model
from zeropoint.cli.quantizers import quantizer_of
from zeropoint.cli.schema import read_toml, value_of
from zeropoint.cli.settings import RuleSettings, Settings
from zeropoint.graph.capture import capture_in_eval_mode
from zeropoint.graph.inputs import inputs_for
from zeropoint.numerics import ops


@dataclass(frozen=True, slots=True)
class Job:
    """A model that is exported, its data where there is any, and the settings.

    Args:
        model: as it was given.
        graph: its export, in eval mode.
        example_inputs: positional.
        data: None where no DATA was given.
        settings: the configuration file with the options of the command line over it.
    """

    model: Model
    graph: GraphModule
    example_inputs: tuple[Any, ...]
    data: Data | None
    settings: Settings

    @property
    def quantizer(self) -> Quantizer:
        """A new quantizer of the settings."""
        return quantizer_of(self.settings)

    def named(self) -> dict[str, Any]:
        """Returns what a result in JSON is of."""
        data = self.data
        return {
            "model": self.model.name,
            "backend": self.settings.backend,
            "data": None if data is None else data.name,
            "data_is_random": data is not None and data.is_random,
        }

    @property
    def quantization(self) -> tuple[Quantizer | None]:
        """What ``check_backend`` takes after the model: the quantizer, unless the model is converted already."""
        is_converted = any(node.target in ops.DEQUANTIZE_OPS for node in self.graph.graph.nodes)
        return (None if is_converted else self.quantizer,)


def load_job(model_name: str, data_name: str | None, settings: Settings) -> Job:
    """Returns the model, exported, with its data.

    Raises:
        UsageError, FileError, CalibrationError, CaptureError: what was given does not exist, is damaged, or does not
            fit; says what and where.
    """
    model = load_model(model_name)
    inputs, data = model.inputs, None
    if inputs is None and data_name is not None:
        data = load_data(data_name, None, (), settings.data)
        inputs = next(iter(data.calibration))
    inputs = model.example_inputs if inputs is None else inputs
    graph = capture_in_eval_mode(model.module, inputs)
    if data is None and data_name is not None:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        data = load_data(data_name, inputs, names, settings.data)
    if data is not None:
        inputs_for(graph, next(iter(data.calibration)), f"the first batch of {data.name}")
    return Job(model, graph, inputs, data, settings)


def load_settings(config: Path | None, **options: Any) -> Settings:
    """Returns the settings of a file, else the defaults, with those options over them that were given.

    Raises:
        UsageError: the file is not there, or says something that is not allowed.
    """
    settings = Settings() if config is None else read_toml(config, Settings)
    given = {
        name: value_of(Settings, name, value, "the command line")
        for name, value in options.items()
        if value is not None
    }
    return checked(replace(settings, **given), "the command line" if config is None else str(config))


def with_exclusions(
    settings: Settings, modules: Iterable[str], types: Iterable[str], operators: Iterable[str]
) -> Settings:
    """Returns the settings with rules that leave operators float, after those that they have."""
    rules = [RuleSettings(module=each) for each in modules]
    rules += [RuleSettings(type=each) for each in types] + [RuleSettings(operator=each) for each in operators]
    return replace(settings, rules=(*settings.rules, *rules))


def checked(settings: Settings, where: str) -> Settings:
    """Returns the settings, where each value is possible.

    Raises:
        UsageError: one is not; names it.
    """
    data, checks = settings.data, settings.checks
    wrong = [
        (data.samples < 1, "data.samples", data.samples, "1 or more"),
        (data.evaluate < 1, "data.evaluate", data.evaluate, "1 or more"),
        (len(data.image.size) not in (0, 1, 2), "data.image.size", list(data.image.size), "height and width"),
        (any(each < 1 for each in data.image.size), "data.image.size", list(data.image.size), "sizes of 1 or more"),
        (not 0 <= (checks.min_agreement or 0) <= 1, "checks.min_agreement", checks.min_agreement, "a share, 0 to 1"),
    ]
    for is_wrong, name, value, wanted in wrong:
        if is_wrong:
            raise UsageError(f"{name} is {value}; it takes {wanted}", where=where)
    for number, rule in enumerate(settings.rules):
        given = [name for name in ("module", "type", "operator", "node") if getattr(rule, name)]
        if len(given) != 1:
            what = f"rules[{number}] has {' and '.join(given) or 'no key that says for what it is'}"
            raise UsageError(what, where=where, remedy="Give one of module, type, operator, node.")
        if rule.weights is not None and rule.scheme == "float":
            what = f"rules[{number}] has weights = {rule.weights!r}, but its scheme is float"
            raise UsageError(what, where=where, remedy='Add scheme = "static", or "dynamic".')
    return settings
