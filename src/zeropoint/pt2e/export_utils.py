"""Train and eval mode of exported models, as in ``torchao.quantization.pt2e.export_utils``."""

from zeropoint.graph.capture import WrapperModule
from zeropoint.graph.capture import is_exported as model_is_exported
from zeropoint.graph.train_eval import allow_exported_model_train_eval as _allow_exported_model_train_eval
from zeropoint.graph.train_eval import move_exported_model_to_eval as _move_exported_model_to_eval
from zeropoint.graph.train_eval import move_exported_model_to_train as _move_exported_model_to_train

__all__ = [
    "WrapperModule",
    "_allow_exported_model_train_eval",
    "_move_exported_model_to_eval",
    "_move_exported_model_to_train",
    "model_is_exported",
]
