"""The workflow, as in ``torchao.quantization.pt2e.quantize_pt2e``."""

from torch.fx import GraphModule

from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__all__ = ["_convert_to_reference_decomposed_fx", "convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"]


def _convert_to_reference_decomposed_fx(graph_module: GraphModule) -> GraphModule:
    """Returns the model with quantize and dequantize operators, weights float before them."""
    return convert_pt2e(graph_module, fold_quantize=False)
