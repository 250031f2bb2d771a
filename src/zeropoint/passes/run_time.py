"""What an observer without statistics becomes: scale and zero point chosen at run time, or a change of float type."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from zeropoint.core.dtypes import plain_dtype
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.graph.emit import Emitter
from zeropoint.graph.source import describe
from zeropoint.numerics import ops
from zeropoint.passes.qparams_of import eps_of, limits_of

PASS = "convert"
CONVERT_ELEMENT_TYPE = torch.ops.quantized_decomposed.convert_element_type.no_fuse


def check_run_time(source: Node, observer: Any) -> None:
    """Raises when there are no operators that quantize at run time as an observer says.

    Raises:
        SpecError: names the scheme and the dtype.
    """
    if observer.qscheme in PER_CHANNEL or plain_dtype(observer.dtype) not in (torch.int8, torch.uint8):
        what = f"dynamic quantization to {observer.dtype}, {observer.qscheme}"
        raise SpecError(what, where=describe(source), remedy="Use int8 or uint8 and a per-tensor scheme.")


def quantize_at_run_time(node: Node, source: Node, observer: Any) -> None:
    """Replaces the call of an observer by choose_qparams, quantize and dequantize, with scales that are tensors."""
    symmetric = observer.qscheme == torch.per_tensor_symmetric
    choose = ops.CHOOSE_QPARAMS_SYMMETRIC if symmetric else ops.CHOOSE_QPARAMS
    limits = limits_of(observer)
    eps = eps_of(observer)
    dtype = plain_dtype(observer.dtype)
    emit = Emitter(node, PASS)
    chosen = emit.call(choose, source, *limits, eps, dtype)
    scale, zero_point = emit.call(operator.getitem, chosen, 0), emit.call(operator.getitem, chosen, 1)
    quantized = emit.call(ops.QUANTIZE_PER_TENSOR_TENSOR, source, scale, zero_point, *limits, dtype)
    back = emit.call(
        ops.DEQUANTIZE_PER_TENSOR_TENSOR, quantized, scale, zero_point, *limits, dtype, **out_dtype(source)
    )
    node.replace_all_uses_with(back)


def to_half_and_back(node: Node, source: Node) -> None:
    """Replaces the call of an observer by a conversion to float16 and one to the type that the source is of."""
    emit = Emitter(node, PASS)
    half = emit.call(CONVERT_ELEMENT_TYPE, source, torch.float16)
    dtype = out_dtype(source).get("out_dtype", torch.float32)
    node.replace_all_uses_with(emit.call(CONVERT_ELEMENT_TYPE, half, dtype))


def out_dtype(source: Node) -> dict[str, Any]:
    """Returns the keyword by which a dequantize gives the type that the source is of; none for float32."""
    value = source.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        return {"out_dtype": value.dtype}
    return {}
