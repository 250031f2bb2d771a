"""What a report needs of a converted model's state: that it is float."""

from __future__ import annotations

from torch.fx import GraphModule

from zeropoint.core.dtypes import is_float
from zeropoint.core.errors import ComparisonError
from zeropoint.graph.attributes import get_attribute
from zeropoint.graph.constants import attributes_behind, mutated_attributes
from zeropoint.report.conversions import is_dequantize


def require_float_state(model: GraphModule, where: str) -> None:
    """Refuses a model that writes integers to a buffer and dequantizes it: it has no site there, nor a float value.

    Raises:
        ComparisonError: names the buffers.
    """
    read: set[str] = set()
    for node in filter(is_dequantize, model.graph.nodes):
        read |= attributes_behind(node.all_input_nodes[0])
    written = mutated_attributes(model.graph) & read
    integers = sorted(path for path in written if not is_float(get_attribute(model, path)))
    if integers:
        what = f"the converted model keeps its state as integers: {', '.join(integers)}"
        remedy = "Convert a copy without fold_quantize_into_mutable_buffers=True."
        raise ComparisonError(what, where=where, remedy=remedy)
