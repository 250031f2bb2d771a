"""Two processes that train in DistributedDataParallel: what is the same on both, and that rank 0 converts."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES
from resumable import TRAININGS, inputs, network

from zeropoint.report.trained.check_convert import check_convert
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

TESTS = Path(__file__).parent
OBSERVED = "activation_post_process"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, "-W", "ignore", "-m", "ranks", str(folder), str(rank)] for rank in range(2)]
    started = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for each in started:
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors[-2000:]
    return folder


@pytest.fixture(params=CASES)
def both(folder, request):
    """Returns the name of a case and what each rank has."""
    return request.param, [torch.load(folder / f"{request.param} {rank}.pt") for rank in range(2)]


def different(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_weights_are_the_same_and_the_data_was_not(both):
    _, (one, other) = both
    assert one["losses"] != other["losses"]
    changed = different(one["state"], other["state"])
    assert not [name for name in changed if name.endswith(("weight", "bias"))]
    start = network(0).state_dict()
    assert not torch.equal(one["state"]["0.weight"], start["0.weight"])


def test_ranges_are_those_of_rank_0(both):
    """In between, each rank observes its own data; the next forward pass broadcasts. Once frozen they stay equal."""
    name, (one, other) = both
    changed = different(one["state"], other["state"])
    assert not different(one["after"], other["after"])
    assert torch.equal(one["output"], other["output"])
    if name == "observing":
        assert any(OBSERVED in each and each.endswith("scale") for each in changed)
    elif name == "frozen":
        assert not changed
    else:
        assert not [each for each in changed if each.endswith((".scale", ".zero_point"))]


def test_rank_0_converts_to_what_was_trained(both, folder):
    name, _ = both
    exported = torch.export.export(network(1).train(), (inputs(0),)).module()
    prepared = prepare_qat_pt2e(exported, TRAININGS[CASES[name][0]][0]())
    prepared.load_state_dict(torch.load(folder / f"{name} model.pt"))
    check = check_convert(prepared, convert_pt2e(copy.deepcopy(prepared)), inputs(3))
    assert check.agrees, check
