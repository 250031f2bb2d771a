"""Time and memory of files, in child processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeropoint.backends.xnnpack import lower_float
from zeropoint.core.errors import RuntimeFailure
from zeropoint.runtime import measure as module
from zeropoint.runtime.measure import alternate, measure, median_ratio

INPUTS = (torch.randn(1, 256),)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    torch.manual_seed(0)
    return {
        "small": lower_float(nn.Linear(256, 8), INPUTS).pte,
        "large": lower_float(nn.Sequential(nn.Linear(256, 16384), nn.Linear(16384, 256)), INPUTS).pte,
    }


def test_a_larger_file_takes_more_time_and_memory(files):
    found = measure(files, INPUTS, runs=7, warmup=1, threads=1)
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {"small": 7, "large": 7}
    assert found.threads == 1
    assert median_ratio(found.seconds, "large", "small") > 5
    small, large = found.peak_bytes["small"], found.peak_bytes["large"]
    assert small is not None
    assert large is not None
    assert small < 20e6
    assert len(files["large"]) < large < 6 * len(files["large"])


def test_failures_of_the_runtime_are_told(files):
    with pytest.raises(RuntimeFailure, match=r"bench: .* the program takes torch.float32 of shape \(1, 256\)"):
        measure(files, (torch.randn(1, 257),), runs=1, warmup=0, threads=None)
    with pytest.raises(RuntimeFailure, match=r"did not answer in 0.1 s. Ask for fewer runs"):
        measure(files, INPUTS, runs=10**6, warmup=0, threads=None, timeout=0.1)


def test_runs_alternate():
    order: list[str] = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, warm_up=1)
    assert "".join(order) == "abababab"
    assert [len(found) for found in times.values()] == [3, 3]


def test_a_system_without_figures_of_memory(monkeypatch, tmp_path, files):
    path = tmp_path / "small.pte"
    path.write_bytes(files["small"])
    monkeypatch.setattr(module, "REFERENCES", tmp_path / "none" / "clear_refs")
    assert module._peak_growth(path, list(INPUTS)) is None
    monkeypatch.setattr(module, "REFERENCES", tmp_path / "clear_refs")
    monkeypatch.setattr(module, "STATUS", tmp_path / "status")
    assert module._peak_growth(path, list(INPUTS)) is None
