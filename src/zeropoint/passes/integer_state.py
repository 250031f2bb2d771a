"""Keep as integers the buffers that a model reads and writes as quantized tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.errors import SpecError
from zeropoint.graph.attributes import attribute_reads, get_attribute, set_parameter
from zeropoint.graph.bind import argument, set_argument
from zeropoint.graph.constants import mutated_attributes
from zeropoint.graph.emit import Fakes
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.source import describe
from zeropoint.numerics import ops

COPY = torch.ops.aten.copy_.default
QPARAMS = ("scale", "zero_point", "quant_min", "quant_max", "dtype")


@graph_pass
def integer_state(model: GraphModule) -> None:
    """Stores each float buffer that is quantized where it is read, and where it is written, as the integers written.

    Such a buffer is read by quantize operators alone, before it is written or after, and written by one ``copy_`` of
    what was quantized per tensor, by one scale; what it is read with is dequantized by that scale too. Others stay as
    they are: those that an operator writes to in place, and those that are read as float.

    Warns of buffers that are written and stay float, and where a buffer's own values lie outside of the range that is
    written, and so begin clipped.

    Raises:
        SpecError: another buffer is the same memory, which would stay float.
    """
    buffers, fakes = dict(model.named_buffers(remove_duplicate=False)), Fakes()
    reads: dict[str, list[Node]] = {}
    for node in attribute_reads(model.graph):
        if str(node.target) in buffers:
            reads.setdefault(str(node.target), []).append(node)
    for path in sorted(mutated_attributes(model.graph) & reads.keys()):
        if not buffers[path].is_floating_point():
            continue
        write = _write_of(reads[path])
        if isinstance(write, str):
            warnings.warn(f"buffer {path!r} stays float: {write}", stacklevel=2)
            continue
        _require_own_memory(path, buffers)
        _store(model, reads[path], write, fakes)


def _write_of(reads: list[Node]) -> Node | str:
    """Returns the ``copy_`` that writes what was quantized to a buffer; a reason where the buffer is used otherwise."""
    users = [user for read in reads for user in read.users]
    writes = [user for user in users if user.target is COPY and user.args[0] in reads]
    readers = [user for user in users if user not in writes] + [user for write in writes for user in write.users]
    other = next((user for user in readers if not _is_pair(user)), None)
    if other is not None:
        return f"{describe(other)} does not read it quantized per tensor"
    if len(writes) != 1 or not readers:
        return f"{len(writes)} copy_ write to it and {len(readers)} operators read it; one copy_ has to, and a reader"
    written = argument(writes[0], "src")
    if written.target is not ops.DEQUANTIZE_PER_TENSOR or not _is_pair(written.args[0]):
        return f"{describe(writes[0])} writes what is not quantized per tensor"
    return writes[0]


def _is_pair(quantize: Any) -> bool:
    """True for a quantize operator of one scale that dequantize operators of that scale alone read."""
    if quantize.target is not ops.QUANTIZE_PER_TENSOR or not quantize.users:
        return False
    wanted = _qparams(quantize)
    return all(u.target is ops.DEQUANTIZE_PER_TENSOR and _qparams(u) == wanted for u in quantize.users)


def _qparams(node: Node) -> tuple[Any, ...]:
    return tuple(argument(node, name) for name in QPARAMS)


def _require_own_memory(path: str, buffers: dict[str, torch.Tensor]) -> None:
    place = buffers[path].untyped_storage().data_ptr()
    same = [name for name, value in buffers.items() if name != path and value.untyped_storage().data_ptr() == place]
    if same and place:
        what = f"fold_quantize_into_mutable_buffers=True: the buffer aliases registered buffers {sorted(same)}"
        raise SpecError(what, where=path, remedy="Register it once, or leave the option out.")


def _store(model: GraphModule, reads: list[Node], write: Node, fakes: Fakes) -> None:
    """Makes the buffer integers of the scale that is written, each read dequantized by it."""
    path, written = str(reads[0].target), argument(write, "src").args[0]
    value, qparams = get_attribute(model, path), _qparams(written)
    with torch.no_grad():
        integers = torch.empty_like(value, dtype=qparams[-1])  # As it lies in memory: quantize makes it contiguous.
        set_parameter(model, path, integers.copy_(ops.QUANTIZE_PER_TENSOR(value, *qparams)))
        _warn_of_clipping(path, value, ops.DEQUANTIZE_PER_TENSOR(integers, *qparams), qparams[0])
    set_argument(write, "src", written)
    for read in (*reads, write):
        for quantize in [user for user in read.users if user is not write]:
            for dequantize in list(quantize.users):
                set_argument(dequantize, "input", read)
                for name, each in zip(QPARAMS, qparams, strict=True):
                    set_argument(dequantize, name, each)
            model.graph.erase_node(quantize)
    for node in (*reads, write):
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = fakes.like(node.meta["val"], dtype=qparams[-1])
        node.meta.pop("tensor_meta", None)


def _warn_of_clipping(path: str, value: torch.Tensor, stored: torch.Tensor, scale: float) -> None:
    clipped = int((~((value - stored).abs() <= scale)).sum())  # NaN is none that lies inside.
    if clipped:
        what = (
            f"{clipped} of {value.numel()} values of buffer {path!r} lie outside of what calibration saw written to it"
        )
        warnings.warn(f"{what}: they begin clipped. Calibrate from the state that the model starts in.", stacklevel=2)
