"""How long do prepare, calibration and convert take, beside torchao's?

Both get the same exported graph and data, with their XNNPACKQuantizer and default (histogram) observers, in one run.
The code of our models is generated when they are first called: that is printed beside it, for both models together.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import zeropoint as zp
from bench._measure import alternate, median_ratio, parser, seconds, write_json
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.numerics.observers import MinMaxObserver
from zoo import architectures, crepe, efficientnet_lite0

Inputs = tuple[Any, ...]
MODELS: dict[str, tuple[Callable[[], tuple[torch.nn.Module, Inputs]], float]] = {
    "efficientnet_lite0": (lambda: (efficientnet_lite0.load()[0], (torch.randn(4, 3, 224, 224),)), 10),
    "resnet18": (architectures.resnet18, 10),
    "bert_encoder": (architectures.bert_encoder, 10),
    "crepe_tiny": (crepe.load, 50),
    "mobilenet_v2": (architectures.mobilenet_v2, 50),
}
"""Each model, and how many times faster than torchao it is to be."""
SLOW_S = 20.0


def ours() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def with_min_max() -> XNNPACKQuantizer:
    config = get_symmetric_quantization_config(is_per_channel=True)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    return XNNPACKQuantizer().set_global(replace(config, input_activation=activation, output_activation=activation))


@torch.no_grad()
def run_ours(graph: torch.fx.GraphModule, inputs: Inputs) -> dict[str, float]:
    copied = copy.deepcopy(graph)
    prepare_s, prepared = seconds(lambda: zp.prepare_pt2e(copied, ours()))
    first_code_s, _ = seconds(prepared.recompile)
    calibrate_s, _ = seconds(lambda: prepared(*inputs))
    convert_s, converted = seconds(lambda: zp.convert_pt2e(prepared))
    second_code_s, _ = seconds(converted.recompile)
    code_s = first_code_s + second_code_s
    return {"prepare_s": prepare_s, "calibrate_s": calibrate_s, "convert_s": convert_s, "code_s": code_s}


@torch.no_grad()
def run_torchao(graph: torch.fx.GraphModule, inputs: Inputs) -> dict[str, float]:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = theirs.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = theirs.XNNPACKQuantizer().set_global(config)
    copied = copy.deepcopy(graph)
    prepare_s, prepared = seconds(lambda: prepare_pt2e(copied, quantizer))
    calibrate_s, _ = seconds(lambda: prepared(*inputs))
    convert_s, _ = seconds(lambda: convert_pt2e(prepared))
    return {"prepare_s": prepare_s, "calibrate_s": calibrate_s, "convert_s": convert_s}


def run_both(graph: torch.fx.GraphModule, inputs: Inputs) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the best of three alternating runs of each; one is made where torchao takes longer than ``SLOW_S``."""
    mine, other = [run_ours(graph, inputs)], [run_torchao(graph, inputs)]
    while len(mine) < 3 and sum(other[0].values()) < SLOW_S:
        mine.append(run_ours(graph, inputs))
        other.append(run_torchao(graph, inputs))
    return min(mine, key=_prepare_and_convert), min(other, key=_prepare_and_convert)


def _prepare_and_convert(run: dict[str, float]) -> float:
    return run["prepare_s"] + run["convert_s"]


@torch.no_grad()
def calibration_ratios(graph: torch.fx.GraphModule, inputs: Inputs, rounds: int) -> dict[str, float]:
    """Returns the time of a forward of the prepared model over one of the float model, by observer."""
    prepared = {
        "min_max": zp.prepare_pt2e(copy.deepcopy(graph), with_min_max()),
        "histogram": zp.prepare_pt2e(copy.deepcopy(graph), ours()),
    }
    functions = {name: (lambda m=model: m(*inputs)) for name, model in {"float": graph, **prepared}.items()}
    times = alternate(functions, rounds)
    return {name: median_ratio(times, name, "float") for name in prepared}


def compare_models(names: list[str], rounds: int) -> dict[str, Any]:
    print(f"{'model':<20}{'ours: prepare + convert':>28}{'torchao':>12}{'times faster':>14}{'calibration / float':>34}")
    figures: dict[str, Any] = {}
    for name in names:
        load, wanted = MODELS[name]
        module, inputs = load()
        graph = torch.export.export(module.eval(), inputs).module()
        mine, other = run_both(graph, inputs)
        ratio = _prepare_and_convert(other) / _prepare_and_convert(mine)
        calibration = calibration_ratios(graph, inputs, rounds)
        figures[name] = {"ours": mine, "torchao": other, "times_faster": ratio, "wanted": wanted, **calibration}
        split = f"{mine['prepare_s']:.2f} + {mine['convert_s']:.2f} s, code {mine['code_s']:.2f}"
        theirs = f"{other['prepare_s'] + other['convert_s']:.1f} s"
        forward = f"min-max {calibration['min_max']:.2f}, histogram {calibration['histogram']:.2f}"
        print(f"{name:<20}{split:>28}{theirs:>12}{ratio:>13.0f}x{forward:>34}", flush=True)
    return figures


def scaling(sizes: tuple[int, ...]) -> dict[str, float]:
    """Returns the seconds of prepare and convert by number of linear layers: the best of five runs."""
    figures: dict[str, float] = {}
    for size in sizes:
        module, inputs = architectures.linears(size)
        graph = torch.export.export(module.eval(), inputs).module()
        runs = [run_ours(graph, inputs) for _ in range(5)]
        figures[str(size)] = min(_prepare_and_convert(run) for run in runs)
    values = list(figures.values())
    growth = ", ".join(f"{b / a:.2f}" for a, b in itertools.pairwise(values))
    print(f"{', '.join(map(str, sizes))} linears: {', '.join(f'{v:.2f} s' for v in values)}; per doubling: {growth}")
    return figures


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--rounds", type=int, default=9, help="forwards of each model for the calibration ratio")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    run_ours(torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),)).module(), (torch.randn(1, 4),))
    figures = {"models": compare_models(options.models, options.rounds), "linears": scaling((100, 200, 400, 800))}
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
