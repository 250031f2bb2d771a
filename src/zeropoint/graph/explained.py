"""A graph module whose failures name the input that does not fit."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from zeropoint.core.errors import CalibrationError, NonFiniteError, ZeropointError
from zeropoint.graph.inputs import inputs_for
from zeropoint.graph.replay import replayed
from zeropoint.graph.train_eval import SwitchedModule


class ExplainedModule(SwitchedModule):
    """Says, where a call fails, which of the inputs is not one that the graph was exported for; may be checkpointed.

    Inputs are looked at after a failure only: a call that succeeds costs nothing more, whichever sizes it has.
    """

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Returns what the graph does.

        Raises:
            CalibrationError: the call failed, and an input has another shape or dtype than the graph was exported for.
        """
        try:
            with replayed(self, (inputs, named)):
                return super().__call__(*inputs, **named)
        except ZeropointError:
            raise
        except Exception as error:
            misfit = None if named else _misfit(self, inputs)
            if misfit is None:
                raise
            raise misfit from error


def _misfit(model: GraphModule, inputs: tuple[Any, ...]) -> CalibrationError | None:
    try:
        inputs_for(model, inputs, "prepared model")
    except NonFiniteError:
        return None
    except CalibrationError as error:
        return error
    return None
