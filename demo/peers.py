"""The same model through torchao and ExecuTorch's own quantizer, as they are used today."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn


def torchao_pte(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    calibration: list[tuple[Any, ...]],
    is_dynamic: bool = False,
    keep_scalars: bool = False,
) -> bytes:
    """Returns torchao's int8 ``.pte`` of a model for the XNNPACK delegate, with per-channel weights.

    Activations have histogram observers, or get their scale at run time. ``keep_scalars`` switches off that its
    quantizer turns the numbers of additions and products into float tensors, those of positions and masks too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from executorch.backends.xnnpack.utils.configs import get_transform_passes
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        graph = torch.export.export(copy.deepcopy(model).eval(), example_inputs).module()
        config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
        quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
        if keep_scalars:
            quantizer.transform_for_annotation = _unchanged
        prepared = prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for inputs in calibration:
                prepared(*inputs)
        exported = torch.export.export(convert_pt2e(prepared), example_inputs)
        edge = to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()], transform_passes=get_transform_passes()
        )
        return bytes(edge.to_executorch().buffer)


def _unchanged(model: Any) -> Any:
    return model
