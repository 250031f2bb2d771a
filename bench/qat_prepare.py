"""Prepare for training and convert, beside torchao's: the same graph and settings. torchao takes a minute a model.

python -m bench.qat_prepare [--models NAME ...] [--json FILE]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zeropoint as zp
from bench._measure import parser, seconds, write_json
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def blocks(count: int) -> nn.Module:
    """Returns ``count`` blocks of convolution, batch norm and relu."""
    layers = ((nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(count))
    return nn.Sequential(*(layer for block in layers for layer in block))


MODELS = {"1 block": 1, "4 blocks": 4, "16 blocks": 16}


def run(graph: torch.fx.GraphModule, x: torch.Tensor, prepare: Callable[[Any], Any], convert: Any) -> dict[str, float]:
    copied = copy.deepcopy(graph)
    prepare_s, prepared = seconds(lambda: prepare(copied))
    prepared(x)
    convert_s, _ = seconds(lambda: convert(prepared))
    return {"prepare_s": prepare_s, "convert_s": convert_s}


def run_ours(graph: torch.fx.GraphModule, x: torch.Tensor) -> dict[str, float]:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = XNNPACKQuantizer().set_global(config)
    return run(graph, x, lambda model: zp.prepare_qat_pt2e(model, quantizer), zp.convert_pt2e)


def run_torchao(graph: torch.fx.GraphModule, x: torch.Tensor) -> dict[str, float]:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    config = theirs.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = theirs.XNNPACKQuantizer().set_global(config)
    return run(graph, x, lambda model: prepare_qat_pt2e(model, quantizer), convert_pt2e)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    x, figures = torch.randn(2, 8, 8, 8), {}
    run_ours(torch.export.export(blocks(1).train(), (x,)).module(), x)
    print(f"{'model':<12}{'ours: prepare + convert':>26}{'torchao':>12}{'times faster':>14}")
    for name in options.models:
        graph = torch.export.export(blocks(MODELS[name]).train(), (x,)).module()
        mine, other = run_ours(graph, x), run_torchao(graph, x)
        ratio = sum(other.values()) / sum(mine.values())
        figures[name] = {"ours": mine, "torchao": other, "times_faster": ratio}
        split = f"{mine['prepare_s']:.2f} + {mine['convert_s']:.2f} s"
        print(f"{name:<12}{split:>26}{sum(other.values()):>10.1f} s{ratio:>13.0f}x", flush=True)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
