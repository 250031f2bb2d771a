"""Running what came out, on the real runtime."""
