"""What ``verify`` takes for right, what for wrong, and which operator it names."""

from __future__ import annotations

import importlib
import math
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from tests.backends.q_dq import Graph, Layer, exported, fake
from zeropoint.backends.xnnpack import lower
from zeropoint.core.errors import FileError, RuntimeFailure, VerificationError
from zeropoint.runtime import child
from zeropoint.runtime.agreement import Agreement, agreement
from zeropoint.runtime.verify import Verification, verify

lower_module = importlib.import_module("zeropoint.backends.xnnpack.lower")
verify_module = importlib.import_module("zeropoint.runtime.verify")
OUT, PICTURE = 0.06, (1, 4, 6, 7)


def verified(function: Callable[..., Any], *inputs: Any, layers: tuple[nn.Module, ...] = ()) -> Verification:
    with torch.no_grad():
        model = torch.export.export(Graph(function, *layers).eval(), inputs).module()
    assert isinstance(model, GraphModule)
    return verify(lower(model, inputs), model, [inputs], lower)


def conv() -> Layer:
    torch.manual_seed(0)
    return Layer((6, 4, 3, 3), F.conv2d)


def picture() -> torch.Tensor:
    return torch.randn(PICTURE, generator=torch.Generator().manual_seed(1))


def halved(x: torch.Tensor) -> torch.Tensor:
    """From a scale to the double: every second value is a tie, which the delegate rounds the other way."""
    return fake(F.max_pool2d(fake(x), 1, 1), OUT)


# -- right -----------------------------------------------------------------------------------------------------------


def test_values_within_one_step_are_right_whatever_their_sqnr():
    found = verified(lambda x: halved(x * 0.1), picture())
    assert found.sqnr_db < 30
    assert found.within_one_step
    assert not verified(lambda x: fake(x), picture()).within_one_step


def test_integers_that_ties_change_are_right():
    found = verified(lambda x: ((y := halved(x)), y.argmax(3), y > 0.03), picture())
    assert not found.integers_equal
    assert verified(lambda x: fake(x).argmax(3), picture()) == Verification(math.inf, False, True, 1)


def test_infinite_values_in_the_same_places_are_equal():
    mask = torch.ones(6, 7).tril().bool()
    assert verified(lambda x: fake(x).exp().masked_fill(~mask, -math.inf), picture()).sqnr_db > 100
    assert verified(lambda x: fake(x).exp() / 0.0, picture()).sqnr_db == math.inf


def test_outputs_of_zeros_and_constants_are_right():
    assert verified(lambda x: fake(x).exp() - fake(x).exp(), picture()).sqnr_db == math.inf
    assert verified(lambda x: (fake(x) * 0, fake(F.relu(fake(x) - 100))), picture()).sqnr_db == math.inf
    assert verified(lambda x: fake(x).exp() * 0 + 3, picture()).sqnr_db == math.inf


def test_rounding_where_all_values_cancel():
    node = exported(Graph(torch.exp), picture()).graph.find_nodes(
        op="call_function", target=torch.ops.aten.exp.default
    )[0]
    assert agreement(node, torch.zeros(3), torch.full((3,), 1e-7)).is_right
    assert not agreement(node, torch.zeros(3), torch.full((3,), 1e-3)).is_right


def scaled(x: torch.Tensor, settings: dict[str, Any], factors: list[Any]) -> tuple[Any, ...]:
    offset, other = settings["offset"], settings["other"]
    y = x if offset is None else x + offset
    return fake(y) * other * factors[0], 3, 2.5, None, factors[1], {"size": x.shape[1]}


def test_inputs_and_outputs_of_every_kind():
    settings = {"offset": None, "other": torch.rand(7)}
    assert verified(scaled, picture(), settings, [2.5, True]).sqnr_db > 100
    assert verified(lambda x, offset, flag: fake(x) if flag else offset, picture(), None, True).sqnr_db == math.inf


def test_a_right_file_costs_no_copy_of_the_model(monkeypatch: pytest.MonkeyPatch):
    def never(*arguments: Any) -> GraphModule:
        raise AssertionError

    monkeypatch.setattr(verify_module, "beginning", never)
    assert verified(lambda x: (fake(x), fake(x).argmax(3)), picture()).integers_equal


# -- wrong -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers whatever the graph says, as it is."""
    monkeypatch.setattr(lower_module, "check_sound", lambda model, rules=None: None)
    monkeypatch.setattr(lower_module.edge, "repair_program", lambda model: None)


def refused(function: Callable[..., Any], *layers: nn.Module) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verified(function, picture(), layers=layers)
    return caught.value


def test_a_file_of_another_model():
    right, wrong = (exported(Graph(lambda x, f=f: f(fake(x), 3)), picture()) for f in (torch.argmax, torch.argmin))
    with pytest.raises(VerificationError, match="the file's integers are not what its values give") as caught:
        verify(lower(wrong, (picture(),)), right, [(picture(),)], lower)
    assert "argmax" in caught.value.where
    two = exported(Graph(lambda x: (fake(x), fake(x))), picture())
    with pytest.raises(VerificationError, match=r"-inf dB(.|\n)*Every operator alone is right"):
        verify(lower(two, (picture(),)), right, [(picture(),)], lower)


def test_a_single_integer_of_another_model():
    """A file that classifies one input returns one integer, and that may not differ because it is only one."""
    x = torch.tensor([[0.4, 0.1, -0.3, 0.37]])
    right, wrong = (exported(Graph(lambda x, f=f: f(fake(x), 1)), x) for f in (torch.argmax, torch.argmin))
    with pytest.raises(VerificationError, match="the file's integers are not what its values give"):
        verify(lower(wrong, (x,)), right, [(x,)], lower)


def test_integers_of_wrong_values_are_wrong(unchecked: None):
    error = refused(lambda layer, x: layer(fake(x)).argmax(1), conv())
    assert "conv2d" in error.where
    assert "leave it float (set_module_name or set_operator_type None)" in error.remedy


def test_two_steps_are_too_many():
    node = exported(Graph(fake), picture()).graph.find_nodes(op="output")[0].all_input_nodes[0]
    zeros, scale = torch.zeros(3), node.args[1]
    assert agreement(node, zeros, zeros + scale).is_right
    assert not agreement(node, zeros, zeros + 2 * scale).is_right
    assert not agreement(node, zeros, zeros + math.nan).is_right
    assert not Agreement(20.0).is_right


def test_float_operator_that_reads_quantized_values(unchecked: None):
    error = refused(lambda layer, x: F.softplus(fake(layer(fake(F.pad(x, (0, 1, 0, 2)))), OUT)), conv())
    assert "softplus" in error.where
    assert "it is float already. Leave the operators before it float as well, write it with other" in error.remedy


def test_operator_that_is_wrong_in_float_as_well(unchecked: None):
    error = refused(lambda layer, x: torch.softmax(layer(x), -1) + 1, nn.Conv2d(4, 6, 3))
    assert "softmax" in error.where
    assert "ExecuTorch gets it wrong in float as well: write it with other operators, or report it" in error.remedy


# -- not running -----------------------------------------------------------------------------------------------------


def failure(function: Callable[..., Any], *layers: nn.Module) -> RuntimeFailure:
    with pytest.raises(RuntimeFailure) as caught:
        verified(function, picture(), layers=layers)
    return caught.value


def test_file_that_does_not_load_names_the_float_operator(unchecked: None):
    error = failure(lambda layer, x: F.unfold(fake(layer(fake(x)), OUT), 2).exp(), conv())
    assert "im2col" in error.where
    assert "the runtime did not load it" in error.what
    assert "the file does not run is im2col" in error.remedy
    assert "it is float already" in error.remedy


def test_file_that_does_not_load_names_the_quantized_operator(unchecked: None):
    error = failure(lambda layer, x: fake(fake(layer(fake(x)), 1e-6).relu(), 1e-6), Layer((6, 7)))
    assert "linear" in error.where
    assert "linear" in error.remedy
    assert "leave it float (set_module_name or set_operator_type None)" in error.remedy


def test_inputs_of_another_shape_are_no_operators_fault():
    model = exported(Graph(lambda x: fake(x).exp()), picture())
    pte = lower(model, (picture(),))
    with pytest.raises(RuntimeFailure, match=r"input 0 is torch\.float32 of shape \(2, 4, 6, 7\)") as caught:
        verify(pte, model, [(picture().repeat(2, 1, 1, 1),)], lower)
    assert "first operator" not in str(caught.value)


def test_a_runtime_that_does_not_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    model = exported(Graph(lambda x: fake(x).exp()), picture())
    pte = lower(model, (picture(),))

    def late(*arguments: Any, **settings: Any) -> None:
        raise subprocess.TimeoutExpired("python", 600)

    def never(*arguments: Any) -> bytes:
        raise AssertionError

    monkeypatch.setattr(child, "_run", late)
    with pytest.raises(RuntimeFailure, match="did not answer in 600 s"):
        verify(pte, model, [(picture(),)], never)


def test_what_is_no_file():
    model = exported(Graph(lambda x: fake(x).exp()), picture())
    with pytest.raises(FileError, match=r"verify: is no \.pte file"):
        verify(b"PK\x03\x04 an archive", model, [(picture(),)], lower)
