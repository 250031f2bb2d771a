"""How long does ``compare`` take, in float forward passes for each batch?

python -m bench.compare [--models NAME ...] [--batches N] [--json FILE]

CPU time on one thread; ``measure=0``, so without the search for cures; the models are exported before. Beside it
stands what a forward pass of the converted model takes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zeropoint as zp
from bench._measure import parser, write_json
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zoo import architectures

LIMIT = 4.0
MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "resnet18": lambda: architectures.resnet18(batch=4, size=160),
    "mobilenet_v2": lambda: architectures.mobilenet_v2(batch=4, size=160),
    "bert_encoder": lambda: architectures.bert_encoder(batch=4, tokens=64, layers=4),
}


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the CPU time of a call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measured(name: str, batches: int) -> dict[str, float]:
    """Returns the figures of a model."""
    model, inputs = MODELS[name]()
    graph = torch.export.export(model.eval(), inputs).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = zp.prepare_pt2e(torch.export.export(model.eval(), inputs).module(), quantizer)
    data = [inputs] * batches
    with torch.no_grad():
        prepared(*inputs)
        converted = zp.convert_pt2e(prepared)
        model(*inputs)
        times = [cpu_seconds(lambda: model(*inputs))[0] for _ in range(batches)]
        quantized = [cpu_seconds(lambda: converted(*inputs))[0] for _ in range(3)]
    forward = sorted(times)[batches // 2]
    one, _ = cpu_seconds(lambda: zp.compare(graph, converted, data[:1], measure=0))
    whole, found = cpu_seconds(lambda: zp.compare(graph, converted, data, measure=0))
    return {
        "forward_s": forward,
        "quantized_forwards": sorted(quantized)[1] / forward,
        "forwards_per_batch": whole / batches / forward,
        "first_batch_forwards": one / forward,
        "sites": len(found.sites),
    }


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--batches", type=int, default=16)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    for name in options.models:
        one = figures[name] = measured(name, options.batches)
        print(
            f"{name:<14}{one['forwards_per_batch']:>6.2f} forwards a batch (limit {LIMIT:g}), {one['sites']} sites; "
            f"a forward {one['forward_s']:.3f} s, quantized {one['quantized_forwards']:.2f}; "
            f"the first batch alone {one['first_batch_forwards']:.1f}",
            flush=True,
        )
    write_json(options.json, {"batches": options.batches, "limit": LIMIT, "models": figures})


if __name__ == "__main__":
    main()
