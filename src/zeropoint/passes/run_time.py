"""What an observer without statistics becomes: scale and zero point chosen at run time, or a change of float type."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch.fx import Node

from zeropoint.core.dtypes import plain_dtype
from zeropoint.core.errors import SpecError
from zeropoint.core.specs import PER_CHANNEL
from zeropoint.graph.emit import Emitter
from zeropoint.graph.source import describe
from zeropoint.numerics import ops
from zeropoint.numerics.granularity import PerToken
from zeropoint.numerics.observers import AffineQuantizedObserverBase
from zeropoint.passes.affine_blocks import affine_of, blocks_of, is_symmetric, run_time, torchao_ops
from zeropoint.passes.qparams_of import eps_of, limits_of

PASS = "convert"
SYM_SIZE = torch.ops.aten.sym_size.int
CONVERT_ELEMENT_TYPE = torch.ops.quantized_decomposed.convert_element_type.no_fuse


def check_run_time(source: Node, observer: Any) -> None:
    """Raises when there are no operators that quantize at run time as an observer says.

    Raises:
        SpecError: names the scheme and the dtype.
    """
    if affine_of(observer) is not None:
        return  # ``check_layout`` says it.
    if observer.qscheme in PER_CHANNEL or plain_dtype(observer.dtype) not in (torch.int8, torch.uint8):
        what = f"dynamic quantization to {observer.dtype}, {observer.qscheme}"
        raise SpecError(what, where=describe(source), remedy="Use int8 or uint8 and a per-tensor scheme.")


def quantize_at_run_time(node: Node, source: Node, observer: Any) -> Node:
    """Replaces the call of an observer by choose_qparams, quantize and dequantize, with scales that are tensors.

    Returns the dequantize.
    """
    affine, emit = affine_of(observer), Emitter(node, PASS)
    limits, dtype = limits_of(observer), plain_dtype(observer.dtype)
    match run_time(affine, source) if affine is not None else _granularity(observer, source):
        case "per tensor":
            symmetric = observer.qscheme == torch.per_tensor_symmetric if affine is None else is_symmetric(affine)
            choose = ops.CHOOSE_QPARAMS_SYMMETRIC if symmetric else ops.CHOOSE_QPARAMS
            scale, zero_point = _pair(emit, emit.call(choose, source, *limits, eps_of(observer), dtype))
            q_dq = (ops.QUANTIZE_PER_TENSOR_TENSOR, ops.DEQUANTIZE_PER_TENSOR_TENSOR)
            arguments, last, named = (scale, zero_point, *limits, dtype), (), out_dtype(source)
        case "per token":
            scale, zero_point = _pair(emit, emit.call(ops.CHOOSE_QPARAMS_PER_TOKEN_ASYMMETRIC, source, dtype))
            q_dq = (ops.QUANTIZE_PER_TOKEN, ops.DEQUANTIZE_PER_TOKEN)
            arguments, last, named = (scale, zero_point, *limits, dtype), (value_dtype(source),), {}
        case "by torchao":
            assert affine is not None
            q_dq = (torchao_ops().quantize_affine.default, torchao_ops().dequantize_affine.default)
            arguments = _chosen_by_torchao(emit, source, affine)
            last, named = (), {"output_dtype": value_dtype(source)}
    quantized = emit.call(q_dq[0], source, *arguments)
    dequantized = emit.call(q_dq[1], quantized, *arguments, *last, **named)
    node.replace_all_uses_with(dequantized)
    return dequantized


def _granularity(observer: Any, source: Node) -> Literal["per tensor", "per token"]:
    by_token = isinstance(getattr(observer, "granularity", None), PerToken) and source.meta["val"].dim() > 1
    return "per token" if by_token else "per tensor"


def _chosen_by_torchao(emit: Emitter, source: Node, affine: AffineQuantizedObserverBase) -> tuple[Any, ...]:
    """Returns the arguments of torchao's operators after the tensor, with sizes that are free in the graph."""
    limits, blocks = (affine.quant_min, affine.quant_max), blocks_of(affine, tuple(source.meta["val"].shape))
    sizes = [b if isinstance(b, int) else emit.call(SYM_SIZE, source, axis) for axis, b in enumerate(blocks)]
    settings = (affine.dtype, *limits, eps_of(affine), affine.scale_dtype, affine.zero_point_dtype)
    choose = torchao_ops().choose_qparams_affine.default
    chosen = emit.call(choose, source, affine.mapping_type.name, sizes, *settings)
    return (sizes, *_pair(emit, chosen), affine.dtype, *limits)


def _pair(emit: Emitter, chosen: Node) -> tuple[Node, Node]:
    return emit.call(operator.getitem, chosen, 0), emit.call(operator.getitem, chosen, 1)


def to_half_and_back(node: Node, source: Node) -> Node:
    """Replaces the call of an observer by a conversion to float16 and one to the type that the source is of.

    Returns the latter.
    """
    emit = Emitter(node, PASS)
    half = emit.call(CONVERT_ELEMENT_TYPE, source, torch.float16)
    back = emit.call(CONVERT_ELEMENT_TYPE, half, value_dtype(source))
    node.replace_all_uses_with(back)
    return back


def out_dtype(source: Node) -> dict[str, Any]:
    """Returns the keyword by which a dequantize gives the type that the source is of; none for float32."""
    dtype = value_dtype(source)
    return {} if dtype == torch.float32 else {"out_dtype": dtype}


def value_dtype(source: Node) -> torch.dtype:
    """Returns the type that a node's tensor is of; float32 where that is not known."""
    value = source.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32
