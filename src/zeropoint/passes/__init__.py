"""Passes over graphs, one per file. They act; what is to be done was decided in the layers below."""
