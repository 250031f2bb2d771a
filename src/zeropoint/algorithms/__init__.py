"""Accuracy: what is changed in a model, or in its quantized form, so that quantizing costs less."""
