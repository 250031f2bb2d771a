"""Parameters of layers inside of control flow: in the body while it is quantized, operands outside of it else.

Export hands every parameter that a body needs to its operator, so that in the body it is an input like any other: no
layer there would have a constant weight. Programs with parameters in the body, in turn, cannot be exported again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import Names, get_attribute
from zeropoint.graph.constants import constant_nodes
from zeropoint.graph.control_flow import IN_PYTHON
from zeropoint.graph.emit import inherit
from zeropoint.graph.graph_pass import bodies


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a control flow operator, and its bodies."""

    node: Node
    bodies: tuple[GraphModule, ...]

    @property
    def operands(self) -> list[Node]:
        """Returns what each body reads last."""
        return list(self.node.args[-1])  # type: ignore[arg-type]

    def set_operands(self, operands: list[Node]) -> None:
        """Puts others in place of the operands."""
        self.node.args = (*self.node.args[:-1], type(self.node.args[-1])(operands))  # type: ignore[call-arg, misc]


def bring_in_parameters(model: GraphModule) -> None:
    """Moves the parameters among the operands of control flow into the bodies, outermost first."""
    constants = constant_nodes(model)
    for call in _calls(model):
        wanted = [i for i, operand in enumerate(call.operands) if operand.op == "get_attr" and operand in constants]
        for body in call.bodies:
            _bring_in(model, call, body, wanted)
        call.set_operands([operand for i, operand in enumerate(call.operands) if i not in wanted])
    for _, body in bodies(model):
        bring_in_parameters(body)


def lift_parameters(model: GraphModule) -> None:
    """Makes the tensors of the bodies operands of the control flow that runs them, innermost first."""
    for _, body in bodies(model):
        lift_parameters(body)
    names = Names(model)
    for call in _calls(model):
        _lift(model, call, names)


def _calls(model: GraphModule) -> Iterator[Call]:
    """Yields the calls whose bodies no other call runs."""
    by_path = dict(bodies(model))
    for node in list(model.graph.nodes):
        if node.target in IN_PYTHON:
            read = [n for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) in by_path]
            if all(len(n.users) == 1 for n in read):
                yield Call(node, tuple(by_path[str(n.target)] for n in read))


def _bring_in(model: GraphModule, call: Call, body: GraphModule, wanted: list[int]) -> None:
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    last, names = inputs[-1] if inputs else None, Names(body)
    of_operands = inputs[len(inputs) - len(call.operands) :]
    for index in wanted:
        path, before = str(call.operands[index].target), of_operands[index]
        name = names.new(f"{path.replace('.', '_')}_")
        _register(body, name, get_attribute(model, path))
        assert last is not None
        with body.graph.inserting_after(last):
            read = body.graph.get_attr(name)
        read.meta = dict(before.meta)
        before.replace_all_uses_with(read)
    for index in wanted:
        body.graph.erase_node(of_operands[index])


def _lift(model: GraphModule, call: Call, names: Names) -> None:
    """Makes each tensor that a body reads an operand of the call; one that several read is one operand."""
    made: dict[int, int] = {}
    """The index of the operand that a tensor became, by its id."""
    for body in call.bodies:
        for read in [n for n in body.graph.nodes if n.op == "get_attr" and _is_tensor(body, n)]:
            value = get_attribute(body, str(read.target))
            if id(value) not in made:
                made[id(value)] = len(call.operands)
                _add_operand(model, call, read, names.new(f"{str(read.target).replace('.', '_')}_"), value)
            inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
            read.replace_all_uses_with(inputs[made[id(value)] - len(call.operands)])
            body.graph.erase_node(read)


def _add_operand(model: GraphModule, call: Call, read: Node, path: str, value: torch.Tensor) -> None:
    _register(model, path, value)
    with model.graph.inserting_before(call.node):
        operand = model.graph.get_attr(path)
    operand.meta = dict(read.meta)
    inherit(operand, call.node, "lift_parameters")
    call.set_operands([*call.operands, operand])
    for body in call.bodies:
        inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
        first = next(iter(body.graph.nodes))
        with body.graph.inserting_after(inputs[-1]) if inputs else body.graph.inserting_before(first):
            body.graph.placeholder(path).meta = dict(read.meta)


def _is_tensor(body: GraphModule, read: Node) -> bool:
    return isinstance(getattr(body, str(read.target), None), torch.Tensor)


def _register(model: GraphModule, name: str, value: torch.Tensor) -> None:
    if isinstance(value, nn.Parameter):
        model.register_parameter(name, value)
    else:
        model.register_buffer(name, value)
