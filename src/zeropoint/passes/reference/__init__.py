"""The reference representation: a graph of quantize and dequantize operators rewritten in integer arithmetic."""
