"""The quantizer for the XNNPACK delegate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from zeropoint.annotate.rules import note_erased, origin_of
from zeropoint.annotate.table_quantizer import TableQuantizer
from zeropoint.backends.xnnpack.config import POLICY
from zeropoint.backends.xnnpack.table import TABLE
from zeropoint.backends.xnnpack.transform import TO_ANNOTATE, spell
from zeropoint.core.errors import RuleError
from zeropoint.graph.no_ops import erase_no_ops

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11


class XNNPACKQuantizer(TableQuantizer):
    """Annotates every operator that the XNNPACK delegate computes in int8, with the activations fused into it.

    Use::

        XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    """

    table = TABLE
    policy = POLICY

    def set_float_tables(self, dtype: torch.dtype) -> Self:
        """Sets how embedding tables that stay float are stored in models of which no activation has a fixed scale.

        Args:
            dtype: float16, as without this call: half the bytes; or float32, as they are.

        Raises:
            RuleError: another type.
        """
        if dtype not in (torch.float16, torch.float32):
            remedy = "Use torch.float16 or torch.float32; tables of bytes are EmbeddingQuantizer's."
            raise RuleError(f"{dtype} is no type of float tables", where="set_float_tables", remedy=remedy)
        self.policy = replace(POLICY, tables="float16" if dtype == torch.float16 else "float32")
        return self

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Returns the graph with operators spelled as the delegate takes them; for training, dropout is kept."""
        if not self.rules.is_for_training():
            note_erased(model, map(origin_of, erase_no_ops(model)))
        spell(model, TO_ANNOTATE)
        return model
