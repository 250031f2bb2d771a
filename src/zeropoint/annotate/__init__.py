"""What is to be quantized: annotations, the plan read from them, groups that share a scale, patterns, quantizers."""
