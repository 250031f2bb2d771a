"""What happened to a model, and why."""
