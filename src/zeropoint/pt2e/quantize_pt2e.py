"""The workflow, as in ``torchao.quantization.pt2e.quantize_pt2e``."""

import functools

from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__all__ = ["convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"]

_convert_to_reference_decomposed_fx = functools.partial(convert_pt2e, fold_quantize=False)
"""Gives quantize and dequantize operators, weights float before them. Other packages import it from here."""
