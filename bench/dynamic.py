"""MiniLM with activations quantized at run time: accuracy, size and latency of its files on the ExecuTorch runtime."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import zeropoint as zp
from bench._measure import alternate, median_ratio, parser, write_json
from demo.peers import torchao_pte
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.backends import xnnpack
from zeropoint.runtime.executorch import Program
from zoo import minilm

BATCH, TOKENS = 32, 64
ROUNDS = 9
TORCHAO = "torchao, scalars kept"
"""Its file once the step of ExecuTorch's quantizer that breaks this model is switched off."""


def dynamic_int8() -> Quantizer:
    """Returns a quantizer of linear layers: one weight scale per channel, one activation scale per token."""
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return xnnpack.XNNPACKQuantizer().set_global(config)


def dynamic_int8_and_table() -> Quantizer:
    """Returns the same with the embedding tables in bytes."""
    return zp.ComposableQuantizer([dynamic_int8(), zp.EmbeddingQuantizer()])


def files() -> tuple[dict[str, bytes], dict[str, str]]:
    """Returns the files by name, and why others could not be made."""
    model, inputs = minilm.load(BATCH, TOKENS)
    made = {"float": xnnpack.lower_float(model, inputs).pte}
    made["int8"] = zp.quantize(model, inputs, quantizer=dynamic_int8()).pte
    made["int8, tables too"] = zp.quantize(model, inputs, quantizer=dynamic_int8_and_table()).pte
    failed: dict[str, str] = {}
    for name, keep_scalars in (("torchao", False), (TORCHAO, True)):
        try:
            made[name] = torchao_pte(model, inputs, [inputs], is_dynamic=True, keep_scalars=keep_scalars)
        except Exception as error:  # Whatever it is, it is what a user of torchao sees.
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return made, failed


def measure() -> dict[str, Any]:
    """Returns accuracy, bytes and latency of each file, and the two ratios to the float file."""
    made, failed = files()
    model, _ = minilm.load(BATCH, TOKENS)
    probe = minilm.Probe(model, BATCH, TOKENS)
    programs = {name: Program(pte) for name, pte in made.items()}
    inputs = minilm.calibration(1, BATCH, TOKENS)[0]
    times = alternate({name: lambda run=run: run(*inputs) for name, run in programs.items()}, ROUNDS)
    figures: dict[str, Any] = {}
    for name, program in programs.items():
        figures[name] = {
            "accuracy": probe.accuracy(lambda *chunk, run=program: run(*chunk)[0]),
            "bytes": len(made[name]),
            "size_ratio": len(made[name]) / len(made["float"]),
            "latency_ratio": median_ratio(times, name, "float"),
        }
        if TORCHAO in programs:
            figures[name]["latency_ratio_to_torchao"] = median_ratio(times, name, TORCHAO)
    return {"files": figures, "failed": failed}


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        figures = measure()
    print(f"{'file':22} {'probe':>7} {'MB':>7} {'size':>6} {'latency':>8} {'to torchao':>11}")
    for name, each in figures["files"].items():
        ratio = each.get("latency_ratio_to_torchao")
        to_torchao = "" if ratio is None else f"{ratio:.2f}"
        print(
            f"{name:22} {each['accuracy']:7.4f} {each['bytes'] / 1e6:7.1f} {each['size_ratio']:6.3f} "
            f"{each['latency_ratio']:8.2f} {to_torchao:>11}"
        )
    for name, reason in figures["failed"].items():
        print(f"{name}: not made: {reason}")
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
