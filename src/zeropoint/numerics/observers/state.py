"""Save what the observers of a model have seen, apart from its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from zeropoint.core.errors import CalibrationError

MARK = "activation_post_process"
"""In the paths of observers, and of those inside of fake quantizers."""


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """Returns the entries of a prepared model's ``state_dict`` that are its observers' and fake quantizers'."""
    state = mod.state_dict()
    found = OrderedDict((name, value) for name, value in state.items() if MARK in name)
    found._metadata = getattr(state, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return found


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, torch.Tensor]) -> None:
    """Puts saved statistics into the observers and fake quantizers of a model that was prepared alike.

    Raises:
        CalibrationError: the model has other observers than those that were saved.
    """
    expected = {name for name in mod.state_dict() if MARK in name}
    result = mod.load_state_dict({name: value for name, value in obs_dict.items() if MARK in name}, strict=False)
    absent, unknown = expected - set(obs_dict), [name for name in result.unexpected_keys if MARK in name]
    for names, words in ((sorted(absent), "the saved statistics lack"), (unknown, "the model has no observer for")):
        if names:
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            remedy = "Prepare the model with the quantizer that it was prepared with when they were saved."
            raise CalibrationError(f"{words} {some}", where="load_observer_state_dict", remedy=remedy)
