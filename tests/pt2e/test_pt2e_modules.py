"""Each module has names of torchao's module of that name, and all of its public ones but for ``utils``."""

import importlib

import pytest

pytest.importorskip("torchao.quantization.pt2e")


@pytest.mark.parametrize("name", ["export_utils", "graph_utils", "_numeric_debugger", "utils"])
def test_names_are_torchaos(name):
    ours, theirs = (
        importlib.import_module(f"{package}.pt2e.{name}") for package in ("zeropoint", "torchao.quantization")
    )
    assert not [each for each in ours.__all__ if not hasattr(theirs, each)]
    assert name == "utils" or not set(getattr(theirs, "__all__", ())) - set(ours.__all__)
