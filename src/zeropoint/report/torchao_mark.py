"""What torchao leaves on a model that it prepared, and looks for when it converts one.

A program whose imports were changed in part prepares with one package and converts with the other. torchao's observers
convert here; what it cannot be given, and what cannot be taken from it, is refused in words.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch.fx import GraphModule

from zeropoint.core.errors import GraphError
from zeropoint.graph.batch_norms import BATCH_NORMS

MARK = "_observed_graph_module_attrs"
"""Key of ``model.meta`` under which torchao's prepare leaves its settings."""


class PreparedHere:
    """Stands where torchao's convert reads the settings of its own prepare, and says where to convert instead."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        what = "the model was prepared by zeropoint, and torchao's convert does not know its observers"
        remedy = "Convert it with zeropoint.convert_pt2e; for_torchao(quantizer) is for torchao's prepare and convert."
        raise GraphError(what, where="convert_pt2e of torchao", remedy=remedy)


def leave_mark(model: GraphModule) -> None:
    """Marks a model that was prepared here."""
    model.meta[MARK] = PreparedHere()


def take_mark(model: GraphModule) -> bool:
    """Takes off the mark of either package; returns True where torchao prepared the model for training.

    Raises:
        GraphError: it did so with batch norm, which only torchao's convert folds in the form that it has then.
    """
    settings: Any = model.meta.pop(MARK, None)
    if settings is None or isinstance(settings, PreparedHere):
        return False
    is_qat = bool(getattr(settings, "is_qat", False))
    norm = next((node for node in model.graph.nodes if node.target in BATCH_NORMS), None)
    if is_qat and norm is not None:
        what = f"torchao prepared the model for training, and {norm.name} is not folded into its layer"
        remedy = "Convert it with torchao's convert_pt2e, or prepare it with zeropoint.prepare_qat_pt2e."
        raise GraphError(what, where="convert_pt2e", remedy=remedy)
    return is_qat
