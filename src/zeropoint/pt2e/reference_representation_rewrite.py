"""Integer arithmetic in place of dequantize, operator, quantize, as ``convert_pt2e`` writes it where asked."""

from zeropoint.passes.reference.rewrite import in_integers as reference_representation_rewrite

__all__ = ["reference_representation_rewrite"]
