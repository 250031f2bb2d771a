"""``make demo``: float, int8 by zeropoint and int8 by torchao, each as a file on the ExecuTorch runtime."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import zeropoint as zp
from demo.networks import NETWORKS, Network
from demo.peers import torchao_pte
from zeropoint.backends.xnnpack import lower_float
from zeropoint.core.processor import integer_dot_product
from zeropoint.runtime.executorch import Program
from zeropoint.runtime.measure import alternate, median_ratio

BUILD = Path("build")
ROUNDS = 31
console = Console(width=100)
EQUAL_DB = 300.0
"""What the file of figures says for outputs that are equal bit for bit: JSON has no infinity."""


def single(program: Program) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the program as a function of one tensor to one tensor."""
    return lambda x: program(x)[0].clone()


def show(network: Network) -> dict[str, Any]:
    """Quantizes a network, measures the three files and prints the table; returns the figures."""
    console.rule(network.title)
    model, inputs = network.load()
    calibration = network.calibration()
    print(f"quantizing with {len(calibration)} calibration samples ...", flush=True)
    result = zp.quantize(model, inputs, calibration)
    saved = result.save(BUILD / f"{network.name}_int8.pte")
    print(result)
    print(f"wrote {saved}\nlowering the float model, and torchao's int8 for comparison ...", flush=True)
    start = time.perf_counter()
    files = {"float": lower_float(model, inputs).pte, "int8": result.pte}
    files["torchao"] = torchao_pte(model, inputs, calibration)
    result.stages_s["lower float, and all of torchao"] = time.perf_counter() - start
    figures, latencies = measure(network, files, inputs)
    figures["int8"] |= {
        "runtime_sqnr_db": min(result.runtime_sqnr_db or 0.0, EQUAL_DB),
        "float_sqnr_db": min(result.float_sqnr_db, EQUAL_DB),
        "delegates": result.delegates,
        "outside": [name for name, _ in result.outside],
    }
    figures["stages_s"] = dict(result.stages_s)
    print_table(network, figures)
    benchmark = zp.bench(model, result, inputs, runs=ROUNDS)
    explain_speed(figures, latencies, benchmark)
    page = result.report(BUILD / f"{network.name}.html", benchmark=benchmark, title=network.title)
    print(f"wrote {page}")
    return figures


def measure(
    network: Network, files: dict[str, bytes], inputs: tuple[Any, ...]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Returns the figures of each file, and its latencies in alternating runs."""
    programs = {name: Program(pte) for name, pte in files.items()}
    figures: dict[str, Any] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, program in programs.items():
        judged, outputs[name] = network.judge(single(program))
        figures[name] = judged | {"bytes": len(files[name])}
    times = alternate({name: (lambda p=program: p(*inputs)) for name, program in programs.items()}, ROUNDS, warm_up=5)
    for name in programs:
        figures[name]["latency_ms"] = statistics.median(times[name]) * 1e3
        figures[name]["latency_over_float"] = median_ratio(times, name, "float")
        figures[name]["latency_over_torchao"] = median_ratio(times, name, "torchao")
        figures[name]["agreement"] = network.agreement(outputs["float"], outputs[name])
    if network.picture is not None:
        path = BUILD / f"{network.name}.png"
        network.picture(single(programs["float"]), single(programs["int8"]), path)
        print(f"wrote {path}: float and int8 side by side")
    return figures, times


def print_table(network: Network, figures: dict[str, Any]) -> None:
    """Prints the three columns."""
    table = Table("", "float", "int8 (zeropoint)", "int8 (torchao)")
    columns = ("float", "int8", "torchao")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        (network.metric_name, lambda f: f"{f['metric']:.4g}"),
        ("agreement with float", lambda f: f["agreement"]),
        ("file (bytes)", lambda f: f"{f['bytes']:,} ({f['bytes'] / figures['float']['bytes']:.3f})"),
        ("latency, median (ms)", lambda f: f"{f['latency_ms']:.1f} ({f['latency_over_float']:.2f} of float)"),
    ]
    if "nll" in figures["float"]:
        rows.insert(1, ("negative log-likelihood", lambda f: f"{f['nll']:.4f}"))
    for title, text in rows:
        table.add_row(title, *(text(figures[name]) for name in columns))
    int8 = figures["int8"]
    table.add_row("SQNR, file / converted", "", decibels(int8["runtime_sqnr_db"]), "")
    table.add_row("SQNR, converted / float", "", decibels(int8["float_sqnr_db"]), "")
    console.print(table)
    print("stages: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in figures["stages_s"].items()))


def decibels(value: float) -> str:
    return "equal bit for bit" if value == EQUAL_DB else f"{value:.1f} dB"


def explain_speed(figures: dict[str, Any], times: dict[str, list[float]], benchmark: zp.Benchmark) -> None:
    """Says why int8 is not faster, where it is not."""
    print(f"latency against torchao's file: {figures['int8']['latency_over_torchao']:.2f}")
    if benchmark.why:
        over_float = median_ratio(times, "int8", "float")
        print(f"int8 takes {over_float:.2f} of the float time here: {'; '.join(benchmark.why)}")


def main() -> None:
    warnings.simplefilter("ignore")
    BUILD.mkdir(exist_ok=True)
    instruction = integer_dot_product()
    print(f"processor: {torch.get_num_threads()} threads, integer dot product: {instruction or 'none known'}")
    figures = {network.name: show(network) for network in NETWORKS}
    (BUILD / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"all figures: {BUILD / 'demo.json'}")


if __name__ == "__main__":
    main()
