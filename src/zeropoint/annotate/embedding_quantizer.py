"""A quantizer of embedding tables: each row gets 8 bits, a scale and a float zero point of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

from zeropoint.annotate.annotation import annotate_input_qspec_map, annotation_of, is_annotated
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.core.configs import OperatorConfig, OperatorPatternType, QuantizationConfig
from zeropoint.core.specs import QuantizationSpec
from zeropoint.graph.bind import argument
from zeropoint.numerics.observers import PerChannelMinMaxObserver

EMBEDDING = torch.ops.aten.embedding.default
WEIGHT = QuantizationSpec(
    dtype=torch.uint8,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
)
"""The range of a row need not hold zero: ``x = (q - zero_point) * scale`` with a float zero point."""


def get_embedding_operators_config() -> OperatorConfig:
    """Returns the one configuration of EmbeddingQuantizer, and what it is for."""
    config = QuantizationConfig(None, None, WEIGHT, None)
    return OperatorConfig(config=config, operators=[[nn.Embedding], [functional.embedding]])


class EmbeddingQuantizer(Quantizer):
    """Annotates the table of each ``aten.embedding`` that no other quantizer has dealt with. Needs no calibration.

    Source: ExecuTorch's kernel ``quantized_decomposed::embedding_byte``, which looks up rows of such a table.
    """

    fits_any_backend = True

    @classmethod
    def get_supported_quantization_configs(cls) -> list[QuantizationConfig]:
        """Returns the configurations that it annotates by."""
        return [supported.config for supported in cls.get_supported_operators()]

    @classmethod
    def get_supported_operator_for_quantization_config(
        cls, quantization_config: QuantizationConfig
    ) -> list[OperatorPatternType]:
        """Returns the operators that it annotates by a configuration; none for one that is not its own."""
        supported = cls.get_supported_operators()
        return next((s.operators for s in supported if s.config == quantization_config), [])

    @classmethod
    def get_supported_operators(cls) -> list[OperatorConfig]:
        """Returns each configuration with the operators that are annotated by it."""
        return [get_embedding_operators_config()]

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates the tables of a graph."""
        for node in model.graph.nodes:
            if node.target is EMBEDDING and not is_annotated(node):
                annotate_input_qspec_map(node, argument(node, "weight"), WEIGHT)
                annotation_of(node)._annotated = True
        return model

    def validate(self, model: GraphModule) -> None:
        """Does nothing: any table can be quantized so."""
