"""MODEL: a ``.pt2`` file of ``torch.export.save``, or Python that makes a module."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from zeropoint.cli.exits import UsageError
from zeropoint.cli.pt2_file import load_pt2
from zeropoint.cli.python_names import call, find, is_python_name

FORMS = "Give a .pt2 file of torch.export.save, or package.module:callable, which returns a module and its inputs."


@dataclass(frozen=True, slots=True)
class Model:
    """A model and the inputs that it is exported for.

    Args:
        name: as the user gave it.
        module: a module, or the module of an exported program.
        inputs: positional; None where the model alone was given, and its data says them.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...] | None

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        """The inputs.

        Raises:
            UsageError: there are none.
        """
        if self.inputs is None:
            remedy = "Let the callable return (module, example_inputs), or give --data, whose first batch is taken."
            raise UsageError("it comes without example inputs", where=self.name, remedy=remedy)
        return self.inputs


def load_model(name: str) -> Model:
    """Returns what MODEL names.

    Raises:
        UsageError: it is neither a ``.pt2`` file nor a name in Python, or does not give a model.
        FileError: the file is damaged, or holds what may not be loaded.
    """
    if Path(name).exists() or name.endswith(".pt2"):
        program = load_pt2(Path(name))
        return Model(name, program.module(check_guards=False), _inputs_of(program, name))
    if is_python_name(name):
        return _made_by(find(name), name)
    raise UsageError("there is no such file, and it is no name in Python", where=name, remedy=FORMS)


def _inputs_of(program: ExportedProgram, name: str) -> tuple[Any, ...] | None:
    if program.example_inputs is None:
        return None
    inputs, named = program.example_inputs
    if named:
        what = f"it was exported with the inputs {', '.join(named)} by name"
        raise UsageError(what, where=name, remedy="Export it with positional inputs: torch.export.export(model, (x,)).")
    return tuple(inputs)


def _made_by(found: Any, name: str) -> Model:
    """Returns the model that a name in Python stands for: a module, or what a function or class without arguments
    gives, a module alone or with its example inputs.
    """
    made = found if isinstance(found, nn.Module) and not inspect.isclass(found) else call(found, name, FORMS)
    inputs = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], (nn.Module, ExportedProgram)):
        made, inputs = made
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(each, torch.Tensor) for each in inputs[:1]):
            what = f"the inputs that it returns begin with {type(inputs[0]).__name__}"
            raise UsageError(what, where=name, remedy="Return (module, example_inputs), a tuple of tensors.")
    if isinstance(made, ExportedProgram):
        inputs = _inputs_of(made, name) if inputs is None else inputs
        made = made.module()
    if not isinstance(made, nn.Module):
        what = f"it gives {type(made).__name__}"
        raise UsageError(what, where=name, remedy="Let it return a torch.nn.Module, or (module, example_inputs).")
    return Model(name, made if isinstance(made, GraphModule) else made.eval(), inputs)
