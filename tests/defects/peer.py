"""torchao's PT2E quantization and ExecuTorch's quantizer for XNNPACK, and how to count what a function does."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import qat_quantizers
import quantizers
import torch
import torch._dynamo
import torch.export._trace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    affine = pytest.importorskip("torchao.quantization.pt2e._affine_quantization")
    their_prepare = pytest.importorskip("torchao.quantization.pt2e.prepare")
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer")
    workflow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")

THEIRS = SimpleNamespace(**vars(pt2e), **{k: v for k, v in vars(quantizer).items() if k not in vars(pt2e)})
"""The classes that an annotation is made of, torchao's."""
BY_TORCHAO = quantizers.ByHand(lambda model: quantizers.static(model, THEIRS))
BY_TORCHAO_FOR_TRAINING = quantizers.ByHand(lambda model: qat_quantizers.qat(model, THEIRS))


class Exported(Exception):
    """A model was exported."""


@contextlib.contextmanager
def exports_raise():
    """An export raises ``Exported``: what does not raise makes none, and a peer stops at its first."""

    def refuse(*args, **kwargs):
        raise Exported

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch.export, "export"), (torch.export._trace, "_export"), (torch._dynamo, "export")):
            patch.setattr(place, name, refuse)
        yield


def calls_of(function: Callable[[], object]) -> int:
    """Returns how many functions, of Python or built in, are called when this one is."""
    count, before = 0, sys.getprofile()

    def on_event(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
