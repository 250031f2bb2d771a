"""Where training starts: ranges of fake quantizers that cover calibration data."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from zeropoint.graph.attributes import get_attribute, set_parameter
from zeropoint.graph.constants import mutated_attributes
from zeropoint.graph.observers import is_fake_quantizer
from zeropoint.graph.train_eval import move_exported_model_to_eval, move_exported_model_to_train
from zeropoint.numerics.fake_quantize import FakeQuantize


@contextmanager
def start_ranges(prepared: GraphModule) -> Generator[None]:
    """Lets the fake quantizers of a model in training take the ranges of what it is called with inside, as calibration.

    The float model runs then, in eval mode, so its weights and statistics stay; buffers that it writes to begin again.
    Of a moving average, which starts with whatever it sees first, the range becomes that of all the data: that of
    min-max calibration. Other observers observe in their own way. At the end everything observes and rounds, and the
    model is in train mode.

    Raises:
        NonFiniteError: a value of the model is NaN or infinite.
    """
    fakes: list[Any] = [each for each in prepared.modules() if is_fake_quantizer(each)]
    move_exported_model_to_eval(prepared)
    written = {path: get_attribute(prepared, path).detach().clone() for path in mutated_attributes(prepared.graph)}
    for fake in fakes:
        fake.enable_observer()
        fake.disable_fake_quant()
    averages = [_WholeRange(fake) for fake in fakes if isinstance(fake, FakeQuantize) and _is_average(fake)]
    with torch.no_grad(), ExitStack() as stack:
        for average in averages:
            stack.enter_context(average.watched())
        yield
    for average in averages:
        average.write()
    for path, value in written.items():
        set_parameter(prepared, path, value)
    for fake in fakes:
        fake.enable_fake_quant()
    move_exported_model_to_train(prepared)


def _is_average(fake: FakeQuantize) -> bool:
    return hasattr(fake.activation_post_process, "averaging_constant") and not fake.is_dynamic


class _WholeRange:
    """The range of all that a moving average sees."""

    def __init__(self, fake: FakeQuantize) -> None:
        self._fake, self._observer = fake, fake.activation_post_process
        self._range: tuple[torch.Tensor, torch.Tensor] | None = None

    @contextmanager
    def watched(self) -> Generator[None]:
        """Lets the observer keep the range of the last tensor, and joins those ranges."""
        share, self._observer.averaging_constant = self._observer.averaging_constant, 1
        handle = self._observer.register_forward_hook(self._join)
        try:
            yield
        finally:
            handle.remove()
            self._observer.averaging_constant = share

    def _join(self, observer: nn.Module, inputs: Any, output: Any) -> None:
        low, high = (each.clone() for each in self._ends())
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range = low, high

    def _ends(self) -> Iterator[torch.Tensor]:
        yield from (self._observer.min_val, self._observer.max_val)

    def write(self) -> None:
        """Gives the observer the range, and the fake quantizer its scale; nothing where nothing was seen."""
        if self._range is None:
            return
        for mine, found in zip(self._ends(), self._range, strict=True):
            mine.copy_(found)
        self._fake.take_range()
