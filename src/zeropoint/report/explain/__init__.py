"""What a quantizer makes of a model, operator by operator, and why."""
