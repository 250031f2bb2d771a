"""From groups to observers: one instance each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import GraphModule

from zeropoint.annotate.groups import Group, shared_site
from zeropoint.annotate.plan import Plan
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.core.specs import (
    PER_TENSOR,
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
)
from zeropoint.graph.bind import Site, source_of
from zeropoint.numerics.observers import FixedQParamsObserver
from zeropoint.numerics.observers.derived import DerivedObserverOrFakeQuantize

Observers = dict[Site, Any]
Made = dict[Group, Any]


def make_observers(
    model: GraphModule,
    plan: Plan,
    groups: dict[Site, Group],
    quantizer: Quantizer,
    fixed: Callable[..., Any] = FixedQParamsObserver,
) -> Observers:
    """Returns the observer of each site; the sites of a group have the same one.

    ``fixed`` builds that of a fixed spec. The quantizer's callback may replace any of them.

    Raises:
        AnnotationError: derived specs depend on one another in a circle.
        SpecError: an observer refuses the arguments that its spec holds.
    """
    made: Made = {}
    for group in dict.fromkeys(groups.values()):
        _make(group, plan, groups, fixed, made)
    by_place = {_place(site): made[group] for site, group in groups.items()}
    quantizer.prepare_obs_or_fq_callback(model, by_place)
    return {site: by_place[_place(site)] for site in groups}


def _make(
    group: Group, plan: Plan, groups: dict[Site, Group], fixed: Callable[..., Any], made: dict[Group, Any]
) -> None:
    """Makes the observer of a group, those that it derives from first; no recursion."""
    waiting, entered = [group], set[Group]()
    while waiting:
        current = waiting[-1]
        sources = _sources(current, plan, groups)
        missing = [source for source in sources if source not in made]
        if not missing:
            waiting.pop()
            if current not in made:
                made[current] = _build(current, [made[source] for source in sources], fixed)
        elif current in entered:
            raise AnnotationError("derived specs form a circle", where=str(current.sites[0]))
        else:
            entered.add(current)
            waiting.extend(missing)


def _sources(group: Group, plan: Plan, groups: dict[Site, Group]) -> list[Group]:
    if not isinstance(group.spec, DerivedQuantizationSpec):
        return []
    return [groups[shared_site(plan, group.sites[0], place)] for place in group.spec.derived_from]


def _build(group: Group, sources: list[Any], fixed: Callable[..., Any]) -> Any:
    spec = group.spec
    where = str(group.sites[0])
    match spec:
        case DerivedQuantizationSpec():
            return DerivedObserverOrFakeQuantize(obs_or_fqs=sources, **_arguments(spec, "derived_from", "is_dynamic"))
        case FixedQParamsQuantizationSpec():
            return fixed(**_arguments(spec))
        case QuantizationSpec(observer_or_fake_quant_ctr=constructor):
            arguments = _arguments(spec, "observer_or_fake_quant_ctr")
            if spec.qscheme in PER_TENSOR or not _takes_channel_axis(constructor):
                arguments.pop("ch_axis", None)
            return _built(constructor, arguments, where)
        case _:
            raise AnnotationError(f"{type(spec).__name__} is no spec that an observer is made from", where=where)


def _built(constructor: Any, arguments: dict[str, Any], where: str) -> Any:
    try:
        build = constructor.with_args(**arguments) if hasattr(constructor, "with_args") else constructor
        built = build() if build is not constructor else constructor(**arguments)
    except SpecError as error:
        inner = f"{where}: {error.where}" if error.where else where
        raise SpecError(error.what, where=inner, remedy=error.remedy) from error
    except (TypeError, AssertionError, NotImplementedError, ValueError) as error:
        said = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise SpecError(f"{constructor} cannot be built with {said}: {error}", where=where) from error
    if hasattr(built, "calculate_qparams"):
        return built
    remedy = "Give the class of an observer or fake quantizer: it has calculate_qparams."
    raise SpecError(f"{constructor} built a {type(built).__name__}", where=where, remedy=remedy)


def _arguments(spec: Any, *left_out: str) -> dict[str, Any]:
    """Returns the fields of a spec that say something: None would override what the constructor's own arguments say."""
    named = ((name, getattr(spec, name)) for name in spec.__dataclass_fields__ if name not in left_out)
    return {name: value for name, value in named if value is not None}


def _takes_channel_axis(constructor: Any) -> bool:
    """True when the observer behind the constructor, or behind a fake quantizer's ``observer``, has a channel axis."""
    keywords: dict[str, Any] = {}
    while isinstance(partial := getattr(constructor, "p", constructor), functools.partial):
        keywords = {**partial.keywords, **keywords}
        constructor = partial.func
    if "observer" in keywords:
        return _takes_channel_axis(keywords["observer"])
    if inspect.isclass(constructor):
        return "PerChannel" in constructor.__name__ or _class_takes_channel_axis(constructor)
    parameters = inspect.signature(constructor).parameters
    return "ch_axis" in parameters or _takes_any_name(parameters.values())


def _class_takes_channel_axis(kind: type) -> bool:
    """True when the class, or a base to which it passes on the names that it does not know, has a channel axis."""
    own = True
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        if "ch_axis" in parameters:
            return True
        if "observer" in parameters:  # A fake quantizer; one that is built on it may choose the observer itself.
            return not own or _takes_channel_axis(parameters["observer"].default)
        if not _takes_any_name(parameters.values()):
            return False
        own = False
    return False


def _takes_any_name(parameters: Iterable[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _place(site: Site) -> EdgeOrNode:
    if site.is_output:
        return site.node
    return (source_of(site), site.node)
