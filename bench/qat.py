"""What does training with quantization give, and what does a step of it cost? On handwritten digits, beside torchao's.

python -m bench.qat [--seeds N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import copy
import statistics
import warnings
from typing import Any

import torch

import zeropoint as zp
from bench import qat_prepare
from bench._measure import alternate, median_ratio, parser, seconds, write_json
from bench._qat_training import (
    BATCH,
    METHODS,
    Method,
    accuracy,
    calibrated,
    exported,
    float_network,
    predictions,
    train_step,
    trained,
)
from zeropoint.backends.xnnpack import lower
from zeropoint.numerics.fake_quantize import disable_observer
from zeropoint.numerics.learnable_fake_quantize import enable_range_learning
from zeropoint.runtime.executorch import Program
from zoo import architectures
from zoo.mnist import Digits, digits

BITS = (8, 4)
WANTED = {
    "float": 97.5,
    "lost_8_bit": 0.2,
    "recovered_4_bit": 0.8,
    "steps": 1,
    "same_predictions": 1.0,
    "runtime_agrees": 0.995,
    "step_over_torchao": 0.8,
    "step_over_float": 2.0,
    "prepare_and_convert_times_faster": 50,
    "resnet18_s": 3.0,
}
"""What is to be reached: at least, or at most for losses, steps and times."""


def one_run(method: Method, prepared: Any, bits: int, train: Digits, test: Digits, seed: int) -> dict[str, Any]:
    """Returns what one training gives. Of torchao's, the prepared model in eval mode is measured: its convert takes a
    minute each time.
    """
    model = trained(method, prepared, train, seed)
    if method.is_torchao:
        return {"seed": seed, "accuracy": accuracy(predictions(_in_eval_mode(model), test), test)}
    converted = zp.convert_pt2e(copy.deepcopy(model))
    check = zp.check_convert(model, converted, (test.pictures[:BATCH],))
    evaluated = model.eval().apply(disable_observer)
    of_prepared, of_converted = predictions(evaluated, test), predictions(converted, test)
    program = Program(lower(converted, (test.pictures[:BATCH],)))
    of_runtime = predictions(lambda x: program(x)[0].clone(), test)
    return {
        "seed": seed,
        "accuracy": accuracy(of_converted, test),
        "steps": max(site.own_steps for site in check.sites),
        "steps_in_all": check.largest_steps,
        "agrees": check.agrees,
        "same_predictions": _share(of_prepared == of_converted),
        "runtime_agrees": _share(of_runtime == of_converted),
        "bits": bits,
    }


def _in_eval_mode(model: Any) -> Any:
    from torchao.quantization.pt2e import disable_observer as disable
    from torchao.quantization.pt2e import move_exported_model_to_eval

    return move_exported_model_to_eval(model).apply(disable)


def _share(same: torch.Tensor) -> float:
    return float(same.double().mean())


def accuracies(model: torch.nn.Module, train: Digits, test: Digits, seeds: int) -> dict[str, Any]:
    """Trains by every method, prints a row for each, and returns the figures by bits and method."""
    base = accuracy(predictions(copy.deepcopy(model).eval(), test), test)
    print(f"float: {base:.1f} % of {len(test.labels)} digits (wanted {WANTED['float']})\n")
    heads = "weights", "", "accuracy %", "mean", "lost", "converted", "same", "runtime"
    print("{:<9}{:<22}{:>18}{:>9}{:>7}{:>12}{:>9}{:>9}".format(*heads))
    figures: dict[str, Any] = {"float": base}
    for bits in BITS:
        found = accuracy(predictions(calibrated(model, train, bits), test), test)
        figures[f"{bits} bits"] = {"PTQ": {"accuracy": found}}
        _print_row(bits, "PTQ", [{"accuracy": found}], base)
        for method in METHODS:
            prepared = method.prepare(exported(model, train, training=True), bits)
            runs = [one_run(method, prepared, bits, train, test, seed) for seed in range(seeds)]
            mean = statistics.mean(run["accuracy"] for run in runs)
            figures[f"{bits} bits"][method.name] = {"accuracy": mean, "runs": runs}
            _print_row(bits, method.name, runs, base)
    return figures


def _print_row(bits: int, name: str, runs: list[dict[str, Any]], base: float) -> None:
    found = [run["accuracy"] for run in runs]
    mean = statistics.mean(found)
    row = f"{f'{bits} bits':<9}{name:<22}{' '.join(f'{each:.1f}' for each in found):>18}{mean:>9.2f}{base - mean:>7.2f}"
    if "steps" in runs[0]:
        worst = max(run["steps"] for run in runs)
        same, agrees = (min(run[key] for run in runs) for key in ("same_predictions", "runtime_agrees"))
        row += f"{f'{worst:.2f} LSB':>12}{same:>9.1%}{agrees:>9.1%}"
    print(row, flush=True)


def recovered(figures: dict[str, Any], name: str) -> float:
    """Returns which share of what 4-bit PTQ lost a method wins back."""
    lost = figures["float"] - figures["4 bits"]["PTQ"]["accuracy"]
    return (figures["4 bits"][name]["accuracy"] - figures["4 bits"]["PTQ"]["accuracy"]) / lost


def step_times(model: torch.nn.Module, train: Digits, rounds: int) -> dict[str, float]:
    """Returns the median time of a training step in ms, and its ratios to the float model's and to torchao's."""
    models = {"float": exported(model, train, training=True)}
    models |= {method.name: method.prepare(exported(model, train, training=True), 8) for method in METHODS}
    pictures, labels = train.pictures[:BATCH], train.labels[:BATCH]
    functions = {}
    for name, each in models.items():
        optimizer = torch.optim.SGD(each.parameters(), 0.001, momentum=0.9)
        functions[name] = lambda m=each, o=optimizer: train_step(m, o, pictures, labels)
    learner = models["QAT, learned (LSQ)"]
    functions["QAT, learned (LSQ)"]()  # Ranges begin with the first batch.
    learner.apply(enable_range_learning)
    times = alternate(functions, rounds)
    theirs = METHODS[-1].name
    print(f"\n{'a training step':<22}{'ms':>8}{'to float':>10}{'to torchao':>12}")
    figures: dict[str, float] = {}
    for name in models:
        to_float, to_theirs = (median_ratio(times, name, reference) for reference in ("float", theirs))
        figures |= {f"{name}, ms": statistics.median(times[name]) * 1e3}
        figures |= {f"{name}, to float": to_float, f"{name}, to torchao": to_theirs}
        print(f"{name:<22}{statistics.median(times[name]) * 1e3:>8.1f}{to_float:>10.2f}{to_theirs:>12.2f}")
    return figures


def workflow_times() -> dict[str, float]:
    """Returns the seconds of prepare and convert, of one block beside torchao's and of ResNet-18."""
    x = torch.randn(2, 8, 8, 8)
    graph = torch.export.export(qat_prepare.blocks(1).train(), (x,)).module()
    mine, theirs = qat_prepare.run_ours(graph, x), qat_prepare.run_torchao(graph, x)
    ratio = sum(theirs.values()) / sum(mine.values())
    module, inputs = architectures.resnet18(batch=2, size=64)
    network = torch.export.export(module.train(), inputs).module()
    resnet, _ = seconds(lambda: qat_prepare.run_ours(network, inputs[0]))
    print(
        f"\nprepare and convert one block: {sum(mine.values()):.2f} s, torchao {sum(theirs.values()):.1f} s: ", end=""
    )
    print(f"{ratio:.0f} times faster (wanted {WANTED['prepare_and_convert_times_faster']})")
    print(f"prepare, one forward and convert of ResNet-18: {resnet:.2f} s (wanted {WANTED['resnet18_s']})")
    return {"one_block_s": sum(mine.values()), "torchao_s": sum(theirs.values()), "times": ratio, "resnet18_s": resnet}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=3, help="trainings by each method")
    arguments.add_argument("--rounds", type=int, default=60, help="training steps that are timed of each model")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    train, test = digits()
    took, model = seconds(lambda: float_network(train))
    print(f"trained the float network in {took:.0f} s")
    figures = {"accuracy": accuracies(model, train, test, options.seeds)}
    shares = {method.name: recovered(figures["accuracy"], method.name) for method in METHODS}
    print("\nof what 4-bit PTQ lost, won back: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    steps = step_times(model, train, options.rounds)
    figures |= {"recovered": shares, "steps": steps, "workflow": workflow_times(), "wanted": WANTED}
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
