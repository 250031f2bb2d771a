"""What a model carries with it about its quantization, as plain data in ``model.meta``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from zeropoint.annotate.plan import Plan
from zeropoint.core.policy import BackendPolicy
from zeropoint.graph.attributes import get_attribute, tensors_of
from zeropoint.graph.bind import argument
from zeropoint.passes.round_biases import BiasRounding
from zeropoint.report.coverage import CoverageRow, coverage

RECORD_KEY = "zeropoint"


@dataclass(frozen=True, slots=True)
class Record:
    """The history of a prepared or converted model.

    Args:
        policy: that of the quantizer's backend; None for a quantizer that states none.
        coverage: one row per compute node.
        float_bytes: size of parameters and buffers before quantization, in bytes.
        converted_bytes: the same after conversion; 0 before.
        biases: how biases were rounded.
    """

    policy: BackendPolicy | None
    coverage: tuple[CoverageRow, ...]
    float_bytes: int
    converted_bytes: int = 0
    biases: tuple[BiasRounding, ...] = ()

    @property
    def rounds_biases(self) -> bool:
        """True when the backend computes float biases on the int32 grid."""
        return self.policy is not None and self.policy.bias == "float on the int32 grid"


def start_record(model: GraphModule, plan: Plan, quantizer: Any) -> None:
    """Puts a new record on a model that is about to get observers."""
    rows = coverage(model, plan)
    model.meta[RECORD_KEY] = Record(policy_of(quantizer), rows, model_bytes(model))


def record_of(model: GraphModule) -> Record:
    """Returns the model's record; an empty one for a model of another package."""
    return model.meta.get(RECORD_KEY) or Record(None, (), model_bytes(model))


def finish_record(model: GraphModule, biases: tuple[BiasRounding, ...]) -> None:
    """Completes the record of a converted model."""
    model.meta[RECORD_KEY] = replace(record_of(model), converted_bytes=model_bytes(model), biases=biases)


def refresh_biases(model: GraphModule) -> None:
    """Takes channels off the record of biases that round to 0 which a later correction has lifted off it."""
    layers = {node.name: node for node in model.graph.nodes}
    kept: list[BiasRounding] = []
    for bias in record_of(model).biases:
        read = argument(layers[bias.node], "bias") if bias.node in layers else None
        if isinstance(read, Node) and read.op == "get_attr":
            values = get_attribute(model, str(read.target)).detach().flatten()
            bias = replace(bias, to_zero=tuple(c for c in bias.to_zero if values[c] == 0))
        kept.append(bias)
    model.meta[RECORD_KEY] = replace(record_of(model), biases=tuple(kept))


def model_bytes(model: GraphModule) -> int:
    """Returns the size of all parameters and buffers in bytes, a tied tensor once."""
    storages = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_of(model).values()}
    return sum(storages.values())


def policy_of(quantizer: Any) -> BackendPolicy | None:
    """Returns the policy of a quantizer, or the one that all the quantizers it is composed of agree on."""
    policy = getattr(quantizer, "policy", None)
    if policy is not None:
        return policy
    children = {policy_of(child) for child in getattr(quantizer, "quantizers", ())}
    return children.pop() if len(children) == 1 else None
