"""Arithmetic of quantization: tensors in, tensors out. Knows nothing of graphs."""
