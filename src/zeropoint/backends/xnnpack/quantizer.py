"""The quantizer for the XNNPACK delegate."""

from __future__ import annotations

from torch.fx import GraphModule

from zeropoint.annotate.rules import note_erased, origin_of
from zeropoint.annotate.table_quantizer import TableQuantizer
from zeropoint.backends.xnnpack.config import POLICY
from zeropoint.backends.xnnpack.table import TABLE
from zeropoint.backends.xnnpack.transform import TO_ANNOTATE, spell
from zeropoint.graph.no_ops import erase_no_ops


class XNNPACKQuantizer(TableQuantizer):
    """Annotates every operator that the XNNPACK delegate computes in int8, with the activations fused into it.

    Use::

        XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    """

    table = TABLE
    policy = POLICY

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Returns the graph with operators spelled as the delegate takes them; for training, dropout is kept."""
        if not self.rules.is_for_training():
            note_erased(model, map(origin_of, erase_no_ops(model)))
        spell(model, TO_ANNOTATE)
        return model
