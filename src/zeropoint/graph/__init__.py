"""torch.fx graphs without quantization: binding arguments, constants, chains, passes, capture."""
