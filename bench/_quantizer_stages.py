"""One quantizer of the executorch package through every stage, in zeropoint and in torchao, on a small network."""

from __future__ import annotations

import copy
import importlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench._quantizer_lowering import LOWERINGS
from bench._quantizer_policies import Policy
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.pt2e import quantize_pt2e as ours

SAMPLES = 8
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KEY = "quantization_annotation"
Report = Callable[[str, Any], None]


class Convolutions(nn.Module):
    """Convolutions with batch norm, relu and relu6, depthwise too, an addition, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.residual = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.residual(x))
        return self.classify(torch.flatten(self.pool(self.depthwise(x)), 1))


class Attention(nn.Module):
    """A convolution and its greatest values as tokens, norms, products of matrices, softmax, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.MaxPool2d(2))
        self.norm, self.scale = nn.LayerNorm(16), nn.Parameter(torch.rand(32) + 0.5)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.classify = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2)) * 0.25
        x = torch.cat([x, torch.matmul(torch.softmax(scores, -1), self.value(x))], -1)
        x = F.gelu(self.up(F.rms_norm(x, (32,), self.scale)))
        return self.classify(x.mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutions": Convolutions, "attention": Attention}


def pictures(number: int) -> list[torch.Tensor]:
    """Returns pictures of (1, 3, 32, 32) of blurred noise, which has the spectrum of photographs, roughly."""
    generator = torch.Generator().manual_seed(0)
    made = torch.zeros(number, 3, 32, 32)
    for size in (2, 4, 8, 16, 32):
        noise = torch.randn(number, 3, size, size, generator=generator)
        made += F.interpolate(noise, size=(32, 32), mode="bilinear", align_corners=False) / size
    return list((2 * made).split(1))


@cache
def network(name: str) -> nn.Module:
    """Returns the network, its batch norms fitted to the pictures."""
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.cat(pictures(SAMPLES)))
    return model.eval()


def data(policy: Policy) -> list[torch.Tensor]:
    return [x.to(memory_format=FORMATS[policy.layout]) for x in pictures(SAMPLES)]


@cache
def program(name: str, layout: str, strict: bool) -> torch.export.ExportedProgram:
    example = pictures(1)[0].to(memory_format=FORMATS[layout])
    return torch.export.export(network(name).to(memory_format=FORMATS[layout]), (example,), strict=strict)


def export(name: str, policy: Policy, **settings: bool) -> Any:
    """Returns the network exported as the policy wants it, anew."""
    return copy.deepcopy(program(name, policy.layout, policy.strict)).module(**settings)


def outputs(model: Callable[..., Any], policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in data(policy)])


def quantized_nodes(model: torch.fx.GraphModule) -> Counter[str]:
    """Returns how often each quantize and dequantize operator is called."""
    return Counter(str(node.target) for node in model.graph.nodes if "quantize" in str(node.target))


def annotated(model: torch.fx.GraphModule) -> int:
    """Returns how many nodes have an annotation that quantizes something."""
    found = [node.meta[KEY] for node in model.graph.nodes if KEY in node.meta]
    return sum(bool(a.output_qspec or any(a.input_qspec_map.values())) for a in found)


def bias_of(model: torch.fx.GraphModule) -> str:
    """Returns the type of the biases of layers whose weight is quantized: "float", "int32", ..., or ""."""
    kinds = {_kind(node.args[2]) for node in model.graph.nodes if _is_layer(node) and _kind(node.args[1]) != "float"}
    return ", ".join(sorted(kinds))


def _is_layer(node: torch.fx.Node) -> bool:
    named = str(node.target).startswith(("aten.conv", "aten.linear", "aten.addmm"))
    return named and len(node.args) > 2 and isinstance(node.args[2], torch.fx.Node)


def _kind(node: Any) -> str:
    """Returns the type that a parameter is stored in."""
    if "dequantize" not in str(node.target):
        return "float"
    dtype = node.args[0].meta["val"].dtype if "val" in node.args[0].meta else node.args[-1]
    return str(dtype).removeprefix("torch.")


def scales(model: torch.fx.GraphModule) -> torch.Tensor:
    """Returns the scales of all quantize operators and dequantized weights, in the order of the graph."""
    found: list[torch.Tensor] = []
    for node in model.graph.nodes:
        if "quantize_per" in str(node.target):
            scale = node.args[1]
            found.append(_tensor(model, scale.target) if isinstance(scale, torch.fx.Node) else torch.tensor([scale]))
    return torch.cat([scale.double().flatten() for scale in found]) if found else torch.zeros(0)


def _tensor(model: torch.fx.GraphModule, target: Any) -> torch.Tensor:
    return operator.attrgetter(target)(model) if isinstance(target, str) else torch.zeros(0)


def through_zeropoint(name: str, policy: Policy, quantizer: Any, report: Report) -> Any:
    """Returns the converted network; reports what each stage gave."""
    prepared = ours.prepare_pt2e(export(name, policy), quantizer)
    report("annotate", annotated(prepared))
    report("prepare", sum(node.op == "call_module" for node in prepared.graph.nodes))
    outputs(prepared, policy)
    report("calibrate", SAMPLES)
    converted = ours.convert_pt2e(prepared, fold_quantize=policy.folded)
    report("convert", quantized_nodes(converted).total())
    require_bias(policy, converted)
    return converted


def require_bias(policy: Policy, converted: torch.fx.GraphModule) -> None:
    """Raises when biases of quantized layers are not of the type that the policy says."""
    found = bias_of(converted)
    if found not in ("", policy.bias):
        raise ValueError(f"biases are {found}, and the policy says {policy.bias or 'that none is quantized'}")


def construct(policy: Policy, defining: Any) -> Any:
    """Returns a new quantizer of the policy."""
    from torchao.quantization.pt2e.quantizer import Quantizer

    made = policy.make(defining)
    if type(made).__name__ != policy.quantizer or not isinstance(made, Quantizer):
        raise TypeError(f"the policy of {policy.quantizer} makes {type(made).__name__}")
    return made


def through_torchao(name: str, policy: Policy, quantizer: Any, report: Report) -> Any:
    """Returns the network that torchao converts, or None; reports how many operators it has, or why there is none."""
    from torchao.quantization.pt2e import quantize_pt2e as theirs

    try:
        prepared = theirs.prepare_pt2e(export(name, policy, check_guards=False), quantizer)
        outputs(prepared, policy)
        converted = theirs.convert_pt2e(prepared, fold_quantize=policy.folded)
    except Exception as error:
        report("torchao", f"{type(error).__name__}: {error}")
        return None
    report("torchao", quantized_nodes(converted).total())
    return converted


def compare(policy: Policy, converted: Any, theirs: Any) -> dict[str, float]:
    """Returns how far scales and outputs are from torchao's."""
    ours_scales, their_scales = scales(converted).sort().values, scales(theirs).sort().values
    same = ours_scales.shape == their_scales.shape
    return {
        "scales": max((ours_scales / their_scales - 1).abs().tolist(), default=0.0) if same else math.nan,
        "sqnr": sqnr_db(outputs(theirs, policy), outputs(converted, policy)),
    }


def lower(policy: Policy, converted: Any, report: Report) -> None:
    """Reports what lowering gave, and how near what runs is to the converted network."""
    lowered = LOWERINGS[policy.lower or ""](converted, (data(policy)[0],))
    report("lower", {name: getattr(lowered, name) for name in ("delegates", "outside", "custom", "size")})
    if lowered.run is not None:
        executed = torch.cat([lowered.run((x,)) for x in data(policy)])
        report("run", sqnr_db(outputs(converted, policy), executed))


def run_stages(policy: Policy, module: str, name: str, stages: Sequence[str], report: Report) -> None:
    """Reports what each stage gave for one network, as soon as it did; "torchao" and "lower" where asked for."""
    defining = importlib.import_module(module)
    report("import", True)
    report("construct", type(construct(policy, defining)).__name__)
    theirs = through_torchao(name, policy, construct(policy, defining), report) if "torchao" in stages else None
    converted = through_zeropoint(name, policy, construct(policy, defining), report)
    report("sqnr", sqnr_db(outputs(network(name), policy), outputs(converted, policy)))
    if theirs is not None:
        report("beside", compare(policy, converted, theirs))
    if "lower" in stages and policy.lower is not None:
        lower(policy, converted, report)
