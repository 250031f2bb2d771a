"""A quantizer made of a backend's table and the user's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from zeropoint.annotate.match import annotate_by_table
from zeropoint.annotate.patterns import Table
from zeropoint.annotate.plan import DECISION_KEY
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.annotate.rules import Choice, Rules, type_name
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import NothingQuantizedError, RuleError
from zeropoint.core.policy import BackendPolicy
from zeropoint.graph.graph_pass import bodies

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11


class TableQuantizer(Quantizer):
    """Annotates by ``table``, where the user's rules say so. Every ``set_`` method returns the quantizer.

    Precedence: node, module name, module type, operator type, global; the innermost module wins, None leaves float.
    A rule that matches no node of the model is an error, raised by ``validate``; so is one for a batch norm that is
    folded into a layer for which another configuration is chosen. A rule that no model could match, such as an
    operator's name in place of the operator, is a RuleError at once.
    """

    table: Table
    policy: BackendPolicy

    def __init__(self) -> None:
        self.rules = Rules()

    def set_global(self, quantization_config: QuantizationConfig) -> Self:
        """Sets the configuration of every node that no other rule selects."""
        self.rules.everything = _checked(quantization_config, "set_global")
        return self

    def set_node_name(self, node_name: str, quantization_config: Choice) -> Self:
        """Sets the configuration of one node, by its name in the graph that is quantized, as ``explain`` gives it."""
        if not isinstance(node_name, str):
            remedy = "Give the node's name, node.name."
            raise RuleError(f"{node_name!r} is no node name", where="set_node_name", remedy=remedy)
        self.rules.by_node_name[node_name] = _checked(quantization_config, "set_node_name")
        return self

    def set_module_name(self, module_name: str, quantization_config: Choice) -> Self:
        """Sets the configuration of a module and all in it, by its path; ``*`` and ``?`` match as in file names."""
        if not isinstance(module_name, str):
            remedy = 'Give the path of a module, e.g. "encoder.layers.0".'
            raise RuleError(f"{module_name!r} is no module name", where="set_module_name", remedy=remedy)
        choice = _checked(quantization_config, "set_module_name")
        self.rules.by_module_name.pop(module_name, None)  # What is set again is set last, and wins.
        self.rules.by_module_name[module_name] = choice
        return self

    def set_module_type(self, module_type: type | str, quantization_config: Choice) -> Self:
        """Sets the configuration of the modules of a class, and all in them."""
        if not isinstance(module_type, type | str):
            remedy = "Give a class, e.g. torch.nn.Linear, or its full name."
            raise RuleError(f"{module_type!r} is no module type", where="set_module_type", remedy=remedy)
        self.rules.by_module_type[type_name(module_type)] = _checked(quantization_config, "set_module_type")
        return self

    def set_operator_type(self, operator_type: Any, quantization_config: Choice) -> Self:
        """Sets the configuration of an operator, e.g. ``torch.ops.aten.add.Tensor``."""
        if not callable(operator_type) or isinstance(operator_type, type):
            remedy = "Give the operator itself, e.g. torch.ops.aten.add.Tensor."
            raise RuleError(f"{operator_type!r} is no operator", where="set_operator_type", remedy=remedy)
        self.rules.by_operator[operator_type] = _checked(quantization_config, "set_operator_type")
        return self

    def set_filter_function(self, filter_function: Callable[[Node], bool]) -> Self:
        """Leaves float every node for which the function returns False."""
        if not callable(filter_function):
            remedy = "Give a function that takes a node and returns whether it may be quantized."
            raise RuleError(f"{filter_function!r} is no function", where="set_filter_function", remedy=remedy)
        self.rules.filter_function = filter_function
        return self

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates the nodes that rows and rules select; every other node gets the reason why not."""
        annotate_by_table(model, self.table, self.rules)
        return model

    def validate(self, model: GraphModule) -> None:
        """Checks that every rule matched and that something is quantized.

        Raises:
            RuleError: a rule matches nothing, or a batch norm that a layer with another configuration computes.
            NothingQuantizedError: no node is quantized; the message gives the reasons.
        """
        self.rules.check_all_match(model)
        reasons = list(dict.fromkeys(_refusals(model)))
        if reasons and not _any_quantized(model):
            some = "; ".join(reasons[:6])
            remedy = "Call set_global(config), or a rule that selects operators of the backend's table."
            raise NothingQuantizedError(f"no node is quantized: {some}", where=type(self).__name__, remedy=remedy)


def _checked(config: Any, where: str) -> Any:
    if config is None and where != "set_global":
        return None
    roles = ("input_activation", "output_activation", "weight", "bias")
    if isinstance(config, QuantizationConfig):
        return config
    if all(hasattr(config, role) for role in roles):  # Another package's.
        specs = {role: getattr(config, role) for role in roles}
        return QuantizationConfig(**specs, is_qat=bool(getattr(config, "is_qat", False)))
    remedy = "Give a QuantizationConfig, e.g. get_symmetric_quantization_config()."
    raise RuleError(f"{type(config).__name__} is no configuration", where=where, remedy=remedy)


def _refusals(model: GraphModule) -> list[str]:
    decisions = [node.meta[DECISION_KEY] for node in model.graph.nodes if DECISION_KEY in node.meta]
    own = [f"{d.nodes[0].name}: {d.refusal}" for d in decisions if d.refusal is not None]
    return own + [reason for _, body in bodies(model) for reason in _refusals(body)]


def _any_quantized(model: GraphModule) -> bool:
    decided = (node.meta.get(DECISION_KEY) for node in model.graph.nodes)
    if any(decision is not None and decision.refusal is None for decision in decided):
        return True
    return any(_any_quantized(body) for _, body in bodies(model))
