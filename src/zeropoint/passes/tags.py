"""The ``quantization_tag`` of what convert makes: that of the operator whose quantizer asked for it."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from zeropoint.annotate.annotation import Q_ANNOTATION_KEY
from zeropoint.numerics import ops

TAG_KEY = "quantization_tag"
"""Metadata by which a quantizer marks the operators of one pattern; partitioners find the pattern by it again."""


def give_tag(node: Node, owner: Node | None) -> None:
    """Gives a node the owner's tag; none where it has no owner, or that has no tag."""
    node.meta.pop(TAG_KEY, None)
    if owner is not None and TAG_KEY in owner.meta:
        node.meta[TAG_KEY] = owner.meta[TAG_KEY]


def asking(readers: Iterable[Node], source: Node) -> Node | None:
    """Returns the first reader whose annotation has a spec for what it reads from the source."""
    while source.target in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS) and isinstance(source.args[0], Node):
        source = source.args[0]  # An observer behind another one looks at what the first has become.
    for reader in readers:
        asked = getattr(reader.meta.get(Q_ANNOTATION_KEY), "input_qspec_map", None) or {}
        if asked.get(source) is not None:
            return reader
    return None


def asks_for_output(node: Node) -> bool:
    """True for a node whose annotation has a spec for what it returns."""
    return getattr(node.meta.get(Q_ANNOTATION_KEY), "output_qspec", None) is not None
