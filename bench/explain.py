"""How long does ``explain`` take on a BERT encoder of 12 layers, once it is exported?"""

from __future__ import annotations

import statistics
import warnings

import torch

import zeropoint as zp
from bench._measure import parser, seconds, write_json
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_default_quantization_config
from zoo import architectures

LIMIT_S = 2.0


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    model, inputs = architectures.bert_encoder()
    graph = torch.export.export(model, inputs).module()
    quantizer = XNNPACKQuantizer().set_global(get_default_quantization_config())
    times, explanation = [], None
    for _ in range(options.rounds):
        elapsed, explanation = seconds(lambda: zp.explain(graph, quantizer))
        times.append(elapsed)
    assert explanation is not None
    text_s, text = seconds(lambda: str(explanation))
    figures = {
        "operators": len(explanation),
        "explain_s": statistics.median(times),
        "first_s": times[0],
        "text_s": text_s,
        "lines": len(text.splitlines()),
        "limit_s": LIMIT_S,
    }
    print(f"{len(explanation)} operators: {figures['explain_s']:.2f} s (limit {LIMIT_S:g} s), text {text_s:.3f} s")
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
