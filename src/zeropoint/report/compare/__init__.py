"""Which sites of a quantized model cost its accuracy, why, and what cures it."""
