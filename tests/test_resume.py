"""A prepared model's state is all there is: another process goes on with the same steps, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import resumable
import torch
from resumable import AT, CALIBRATIONS, SEEN, TRAININGS, Loop

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves every training and calibration part of the way, lets a fresh process go on, and holds what each gave."""
    folder = tmp_path_factory.mktemp("resume")
    for index, name in enumerate(TRAININGS):
        loop, losses = Loop(name, seed=0), []
        for number in range(resumable.STEPS):
            if number in AT:
                torch.save(loop.state(), folder / f"{index} at {number}.pt")
            losses.append(loop.step(number))
        torch.save((losses, dict(loop.model.state_dict())), folder / f"{index}.pt")
    for index, name in enumerate(CALIBRATIONS):
        model = resumable.calibrated(resumable.prepared(name, seed=0), 0, SEEN)
        torch.save(model.state_dict(), folder / f"calibration {index}.pt")
        torch.save(resumable.outcome(model), folder / f"expected {index}.pt")
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    command = [sys.executable, "-W", "ignore", "-m", "resumable", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_training_goes_on_with_the_same_steps_in_another_process(folder, name):
    index = list(TRAININGS).index(name)
    losses, state = torch.load(folder / f"{index}.pt")
    assert len(set(losses)) > resumable.STEPS // 2
    for at in AT:
        found, again = torch.load(folder / f"{index} from {at}.pt")
        assert found == losses[at:]
        assert again.keys() == state.keys()
        assert not [key for key in state if not same(state[key], again[key])]


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration_goes_on_in_another_process(folder, name):
    index = list(CALIBRATIONS).index(name)
    assert torch.equal(torch.load(folder / f"calibrated {index}.pt"), torch.load(folder / f"expected {index}.pt"))


@pytest.mark.parametrize("name", [name for name in CALIBRATIONS if name != "affine weights"])
def test_what_was_seen_before_counts(name):
    """Else the test above would hold of a state that is empty."""
    whole = resumable.calibrated(resumable.prepared(name, seed=0), 0, SEEN)
    assert not torch.equal(resumable.outcome(whole), resumable.outcome(resumable.prepared(name, seed=0)))


@pytest.mark.parametrize("name", TRAININGS)
def test_switches_are_in_the_state(name):
    loop = Loop(name, seed=0)
    state = loop.model.state_dict()
    fakes = {key.rpartition(".")[0] for key in state if key.endswith(".fake_quant_enabled")}
    assert len(fakes) > 5
    assert fakes == {key.rpartition(".")[0] for key in state if key.endswith(".observer_enabled")}
    learned = {key.rpartition(".")[0] for key in state if key.endswith(".learning_enabled")}
    assert bool(learned) == name.startswith("learned")
    loop.run(0, 4)
    state = loop.model.state_dict()
    assert {f"{fake}.{part}" for fake in learned for part in ("scale", "zero_point")} <= set(state)
    fresh = Loop(name, seed=1)
    fresh.model.load_state_dict(state)
    for path in fakes:
        mine, other = (each.model.get_submodule(path) for each in (loop, fresh))
        assert mine.scale.requires_grad == other.scale.requires_grad == (path in learned)
        assert getattr(mine, "_initialized", None) == getattr(other, "_initialized", None)
