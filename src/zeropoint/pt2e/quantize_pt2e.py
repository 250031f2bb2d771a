"""The workflow, as in ``torchao.quantization.pt2e.quantize_pt2e``."""

from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__all__ = ["convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"]
