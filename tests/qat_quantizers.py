"""Quantizers written by hand for training: inputs annotated on the layer, the output on what comes after it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import quantizers
import torch
from quantizers import KEY, activation, weight
from torch.fx import GraphModule, Node

from zeropoint.graph.bind import argument
from zeropoint.graph.layers import CLAMPS, LAYERS, TRANSPOSED
from zeropoint.numerics.fake_quantize import FakeQuantize, disable_observer
from zeropoint.numerics.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from zeropoint.passes.end_training import to_eval

OURS = SimpleNamespace(
    **vars(quantizers.OURS),
    FakeQuantize=FakeQuantize,
    MovingAverageMinMaxObserver=MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver=MovingAveragePerChannelMinMaxObserver,
)
aten = torch.ops.aten
NORMS = (aten.batch_norm.default,)


def fake_activation(kind=OURS, **changes):
    """8 bits, affine, per tensor, by moving average."""
    fake = kind.FakeQuantize.with_args(observer=kind.MovingAverageMinMaxObserver, eps=2**-12)
    return activation(kind, observer_or_fake_quant_ctr=fake, **changes)


def fake_weight(kind=OURS, ch_axis: int = 0, **changes):
    """8 bits, symmetric, per channel, by moving average."""
    fake = kind.FakeQuantize.with_args(observer=kind.MovingAveragePerChannelMinMaxObserver, eps=2**-12)
    return weight(kind, ch_axis, **{"observer_or_fake_quant_ctr": fake, **changes})


def fake_weight_per_tensor(kind=OURS, **changes):
    fake = kind.FakeQuantize.with_args(observer=kind.MovingAverageMinMaxObserver, eps=2**-12)
    fields = {"observer_or_fake_quant_ctr": fake, "qscheme": torch.per_tensor_symmetric, "ch_axis": None}
    return weight(kind, **fields, **changes)


def bias_of(observers):
    x, w = observers
    scale = x.calculate_qparams()[0] * w.calculate_qparams()[0]
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def derived_bias(layer: Node, kind=OURS, scheme=torch.per_channel_symmetric):
    """The bias as int32 of input scale times weight scale."""
    edges = [(argument(layer, name), layer) for name in ("input", "weight")]
    axis = 0 if scheme == torch.per_channel_symmetric else None
    return kind.DerivedQuantizationSpec(edges, bias_of, torch.int32, -(2**31), 2**31 - 1, scheme, axis)


def only_reader(node: Node, operators) -> Node:
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    return reader if reader.target in operators else node


def qat(model: GraphModule, kind=OURS, *, per_tensor=False, bias=None, act=None) -> None:
    """Annotates each layer with the batch norm and clamp after it; ``bias`` gives the spec of a layer's bias."""
    act = fake_activation(kind) if act is None else act
    for node in model.graph.nodes:
        if node.target not in LAYERS:
            continue
        of_weight = fake_weight_per_tensor(kind) if per_tensor else fake_weight(kind, int(node.target in TRANSPOSED))
        inputs = {argument(node, "input"): act, argument(node, "weight"): of_weight}
        if bias is not None and argument(node, "bias") is not None:
            inputs[argument(node, "bias")] = bias(node, kind)
        node.meta[KEY] = kind.QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
        last = only_reader(only_reader(node, NORMS), CLAMPS)
        if last is node:
            node.meta[KEY].output_qspec = act
        else:
            last.meta[KEY] = kind.QuantizationAnnotation(output_qspec=act, _annotated=True)


def in_eval_mode(prepared):
    """Returns a copy that uses the running statistics; scales stay as they are."""
    model = copy.deepcopy(prepared)
    to_eval(model)
    model.recompile()
    return model.apply(disable_observer)
