"""Warnings of other packages that tell a user nothing."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quiet_tree_specs() -> Generator[None]:
    """Leaves out what torch 2.13 warns of a call of its own, each time that it copies the tree spec of a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
        yield
