"""When training begins to round, and when it leaves ranges and batch-norm statistics as they are."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeropoint.core.errors import CalibrationError, GraphError, RuleError, SpecError
from zeropoint.graph.observers import is_fake_quantizer
from zeropoint.graph.train_eval import count_batch_norms, freeze_batch_norm, thaw_batch_norm
from zeropoint.graph.within import graphs_within
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize
from zeropoint.passes.qparams_of import saw_nothing

WHERE = "QATSchedule"


class Phase(NamedTuple):
    """What is switched on in a training step: rounding, observing, learning of ranges; and what is frozen."""

    rounds: bool
    observes: bool
    learns: bool
    freezes_batch_norm: bool


class QATSchedule:
    """Switches the fake quantizers and batch norms of a model in training, by the number of the step.

    Call ``schedule.step(prepared)`` once in each training step, before the forward pass. Steps count from 0. Ranges of
    fake quantizers with ``is_dynamic=True`` are those of each tensor, and are never frozen.

    Args:
        observe_steps: for so many steps ranges are observed and nothing is rounded: the float model trains.
        learn_ranges_after: the step from which on each ``LearnableFakeQuantize`` learns its range; None: this schedule
            starts no learning, and leaves those that learn already at it.
        freeze_ranges_after: the step from which on no range changes, observed or learned; None: never.
        freeze_batch_norm_after: the step from which on batch norms normalize by their running statistics and leave them
            as they are, after ``train()`` too; their weight and bias still train. None: never.

    Raises:
        SpecError: a number is no integer, is negative, or steps are out of order: ranges are observed before they are
            learned, and learned before they are frozen.
    """

    def __init__(
        self,
        observe_steps: int = 0,
        *,
        learn_ranges_after: int | None = None,
        freeze_ranges_after: int | None = None,
        freeze_batch_norm_after: int | None = None,
    ) -> None:
        self.observe_steps = _count("observe_steps", observe_steps)
        self.learn_ranges_after = _count_or_none("learn_ranges_after", learn_ranges_after)
        self.freeze_ranges_after = _count_or_none("freeze_ranges_after", freeze_ranges_after)
        self.freeze_batch_norm_after = _count_or_none("freeze_batch_norm_after", freeze_batch_norm_after)
        self._check_order()
        self._steps = 0
        self._applied: tuple[weakref.ref[nn.Module], Phase] | None = None

    def _check_order(self) -> None:
        names = ("observe_steps", "learn_ranges_after", "freeze_ranges_after")
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for (first, low), (second, high) in itertools.pairwise(given):
            if low > high:
                remedy = f"Choose {first} <= {second}."
                raise SpecError(f"{first}={low} is after {second}={high}", where=WHERE, remedy=remedy)

    @property
    def steps(self) -> int:
        """Returns how many steps have begun."""
        return self._steps

    def phase(self, step: int) -> Phase:
        """Returns what is on in a step."""
        is_frozen = _has_come(self.freeze_ranges_after, step)
        learns = _has_come(self.learn_ranges_after, step) and not is_frozen
        return Phase(
            rounds=step >= self.observe_steps,
            observes=not is_frozen,
            learns=learns,
            freezes_batch_norm=_has_come(self.freeze_batch_norm_after, step),
        )

    def step(self, model: nn.Module) -> None:
        """Begins a training step: switches what changes in it.

        All is switched in the first step, in the first one after ``load_state_dict``, and with another model; between
        changes the model is left alone.

        Args:
            model: what ``prepare_qat_pt2e`` returned, or a module that holds it, such as ``DistributedDataParallel``.

        Raises:
            GraphError: the model has no fake quantizers; or ranges would begin or end to learn in
                ``DistributedDataParallel``, which does not follow.
            RuleError: there is nothing of what the schedule freezes or lets learn.
            CalibrationError: ranges are to be frozen, and one has seen no data.
        """
        phase = self.phase(self._steps)
        if self._applied is None or self._applied[0]() is not model or self._applied[1] != phase:
            self._check(model, phase)
            self._apply(model, phase)
            self._applied = weakref.ref(model), phase
        self._steps += 1

    def _check(self, model: nn.Module, phase: Phase) -> None:
        fakes = _fake_quantizers(model)
        if not fakes:
            remedy = "Give what prepare_qat_pt2e returned; convert_pt2e takes them out."
            raise GraphError(f"{type(model).__name__} has no fake quantizers", where=WHERE, remedy=remedy)
        if self.freeze_batch_norm_after is not None and not sum(map(count_batch_norms, graphs_within(model))):
            what = f"freeze_batch_norm_after={self.freeze_batch_norm_after}, and no batch norm has running statistics"
            raise RuleError(what, where=WHERE, remedy="Leave it None for this model.")
        learners = [fake for fake in fakes if isinstance(fake, LearnableFakeQuantize)]
        if self.learn_ranges_after is not None and not learners:
            what = f"learn_ranges_after={self.learn_ranges_after}, and there is no LearnableFakeQuantize"
            raise RuleError(what, where=WHERE, remedy="Leave it None, or prepare with specs that name it.")
        if isinstance(model, DistributedDataParallel):
            self._check_wrapped(learners, phase)
        if not phase.observes:
            _check_seen(fakes)

    def _check_wrapped(self, learners: list[LearnableFakeQuantize], phase: Phase) -> None:
        """Raises where the parameters that have gradients would change: the wrapper keeps a list of them."""
        if any(_is_learning(each) != self._will_learn(each, phase) for each in learners):
            what = f"at step {self._steps} ranges begin or end to learn, which DistributedDataParallel would not notice"
            remedy = "Call step with the module inside, then wrap that anew."
            raise GraphError(what, where=WHERE, remedy=remedy)

    def _will_learn(self, fake: LearnableFakeQuantize, phase: Phase) -> bool:
        """Returns whether a range is learned in a phase; without a step of their own, those that learn go on."""
        return phase.learns or (phase.observes and self.learn_ranges_after is None and _is_learning(fake))

    def _apply(self, model: nn.Module, phase: Phase) -> None:
        for fake in _fake_quantizers(model):
            fake.enable_fake_quant(phase.rounds)
            if isinstance(fake, LearnableFakeQuantize):
                self._switch_learning(fake, phase)
            elif not getattr(fake, "is_dynamic", False):
                fake.enable_observer(phase.observes)
        for graph in graphs_within(model):
            if phase.freezes_batch_norm:
                freeze_batch_norm(graph)
            else:
                thaw_batch_norm(graph)

    def _switch_learning(self, fake: LearnableFakeQuantize, phase: Phase) -> None:
        if self._will_learn(fake, phase):
            fake.enable_range_learning()
        else:
            fake.disable_range_learning()
            fake.enable_observer(phase.observes)

    def state_dict(self) -> dict[str, int]:
        """Returns how many steps have begun; the numbers of the schedule are those of the program."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a schedule was saved; the next step switches everything.

        Raises:
            SpecError: it is no state of a schedule.
        """
        if set(state) != {"steps"}:
            remedy = "Give what QATSchedule.state_dict() returned."
            raise SpecError(f"the state has {sorted(state)}, not ['steps']", where=WHERE, remedy=remedy)
        self._steps = _count("steps", state["steps"])
        self._applied = None

    def __repr__(self) -> str:
        names = ("observe_steps", "learn_ranges_after", "freeze_ranges_after", "freeze_batch_norm_after")
        return f"QATSchedule({', '.join(f'{name}={getattr(self, name)}' for name in names)}; {self._steps} steps begun)"


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _count(name, value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    remedy = "Give a number of training steps, an int of at least 0."
    raise SpecError(f"{name}={value!r} is no number of steps", where=WHERE, remedy=remedy)


def _has_come(after: int | None, step: int) -> bool:
    return after is not None and step >= after


def _fake_quantizers(model: nn.Module) -> list[Any]:
    """Returns the fake quantizers of any package in a model, each once."""
    return [each for each in model.modules() if is_fake_quantizer(each)]


def _is_learning(fake: LearnableFakeQuantize) -> bool:
    return bool(fake.learning_enabled.item())


def _check_seen(fakes: list[Any]) -> None:
    for fake in fakes:
        if saw_nothing(fake) and not getattr(fake, "is_dynamic", False):
            what = "its range is to be frozen, and no data reached it"
            remedy = "Freeze ranges later, or run the model on data first."
            raise CalibrationError(what, where=getattr(fake, "site", "") or type(fake).__name__, remedy=remedy)
