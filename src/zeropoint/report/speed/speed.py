"""What speed to expect of a quantized model on this processor."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from zeropoint.core.processor import has_integer_dot_product
from zeropoint.report.speed.borders import borders_of
from zeropoint.report.speed.work import integer_and_float, node_work


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-accumulates of a converted model for its example inputs, by where they run.

    Args:
        integer: in layers whose input and weight are quantized.
        floating: in the others.
        depthwise_layers: how many quantized convolutions have one input channel per group.
        conversions: quantize operators at run time.
    """

    integer: int
    floating: int
    depthwise_layers: int
    conversions: int


def work_of(converted: GraphModule) -> Work:
    """Returns the multiply-accumulates of a converted model, for the sizes that it was exported with."""
    nodes = node_work(converted)
    depthwise = sum(node.is_integer and node.is_depthwise for node in nodes)
    return Work(*integer_and_float(nodes), depthwise, borders_of(converted).quantizes)


def speed_note(work: Work) -> str:
    """Returns why int8 may not be faster than float on this processor; empty where nothing speaks against it."""
    notes = processor_notes(work.depthwise_layers, "here")
    if work.floating > work.integer:
        notes.append(f"{work.floating / (work.floating + work.integer):.0%} of the multiply-accumulates stay float")
    return "; ".join(notes) if work.integer else ""


def processor_notes(depthwise_layers: int, share: str) -> list[str]:
    """Returns what the processor has to do with it; nothing where it has an integer dot product instruction.

    Measured with executorch 1.4.1: without a dot product instruction (AVX2), int8 convolutions of XNNPACK take 0.35 to
    1.7 of the float time, depthwise ones more than the float ones; with one (AVX512 VNNI), all gain.

    Args:
        depthwise_layers: integer convolutions with one input channel per group.
        share: how much that is.
    """
    found = has_integer_dot_product()
    if found:
        return []
    unknown = "it is not known whether this processor has an integer dot product instruction; without one"
    none = "this processor has no integer dot product instruction, so"
    notes = [f"{none if found is False else unknown} int8 gains little over float"]
    if depthwise_layers:
        convolutions = f"int8 depthwise convolutions ({depthwise_layers} {share})"
        notes.append(f"without one, XNNPACK's {convolutions} are slower than float ones")
    return notes
