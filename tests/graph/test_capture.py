"""From a model to an exported graph module."""

import models
import pytest
import torch
from torch import nn
from torch.export import Dim

from zeropoint.core.errors import CaptureError, SpecError
from zeropoint.graph.capture import capture, is_exported, require_exported


@pytest.fixture(scope="module")
def program():
    module, inputs = models.linear()
    return torch.export.export(module, inputs)


def test_a_module_is_exported():
    module, inputs = models.linear()
    model = capture(module, inputs)
    assert is_exported(model)
    assert torch.equal(model(*inputs), module(*inputs))


def test_a_program_and_its_module_are_taken_as_they_are(program):
    _, inputs = models.linear()
    assert is_exported(capture(program, inputs))
    model = program.module()
    assert capture(model, inputs) is model


@pytest.mark.parametrize("kind", ["ExportedProgram", "GraphModule"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("dynamic_shapes", {"dynamic_shapes": ({0: Dim.DYNAMIC},)}), ("strict=True", {"strict": True})],
)
def test_what_export_settles_is_refused_for_an_exported_model(program, kind, name, settings):
    model = {"ExportedProgram": program, "GraphModule": program.module()}[kind]
    words = rf"capture: {name} is given, .* exported already \({kind}\).* Give {name} to torch\.export\.export, or the"
    with pytest.raises(SpecError, match=words):
        capture(model, models.linear()[1], **settings)


def test_strict_is_a_bool():
    with pytest.raises(SpecError, match=r"capture: strict=1 is no bool"):
        capture(*models.linear(), strict=1)


def test_a_program_of_a_training_model_stays_one():
    inputs = (torch.ones(2, 4),)
    program = torch.export.export(nn.Dropout(0.5).train(), inputs)
    assert models.find(capture(program, inputs), "dropout").args[2] is True


def test_strict_export():
    module, inputs = models.mlp()
    assert models.count(capture(module, inputs, strict=True), "linear") == 2


def test_the_models_own_mode_comes_back_on_every_submodule():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    module[2].eval()
    model = capture(module, (torch.randn(3, 2),))
    assert [m.training for m in module.modules()] == [True, True, True, False]
    assert models.find(model, "dropout").args[2] is False
    assert models.find(model, "batch_norm").args[5] is False


def test_the_mode_comes_back_when_export_fails():
    module, _ = models.linear()
    module.train()
    with pytest.raises(CaptureError):
        capture(module, (torch.randn(2, 5),))
    assert module.training


def test_data_dependent_control_flow_is_an_error_that_says_what_torch_said():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(
        CaptureError, match=r"Branch: torch\.export could not export the model: .*[Dd]ata-dependent"
    ) as e:
        capture(Branch(), (torch.randn(2),))
    assert e.value.__cause__ is not None
    assert isinstance(e.value, RuntimeError)


@pytest.mark.parametrize("nested", [False, True])
def test_one_tensor_object_twice_is_an_error(nested):
    class Sum(nn.Module):
        def forward(self, first, *others):
            return first[0] + others[-1]

    x = torch.randn(2)
    inputs = ([x, torch.randn(2)], x) if nested else (x, torch.randn(2), x)
    with pytest.raises(CaptureError, match=r"0 and 2 are one tensor object.*x\.clone"):
        capture(Sum(), inputs)


@pytest.mark.parametrize("inputs", [torch.randn(2, 4), [torch.randn(2, 4)]])
def test_inputs_that_are_no_tuple(inputs):
    with pytest.raises(CaptureError, match=r"example_inputs is (Tensor|list), not a tuple.*\(x,\)"):
        capture(models.linear()[0], inputs)


def test_something_else_is_no_model():
    with pytest.raises(CaptureError, match=r"got function, not a model"):
        capture(models.linear, ())


def test_a_traced_but_not_exported_module_is_exported():
    module, inputs = models.linear()
    model = capture(torch.fx.symbolic_trace(module), inputs)
    assert models.count(model, "linear") == 1


def test_a_dynamic_batch_stays_dynamic():
    module, inputs = models.linear()
    model = capture(module, inputs, dynamic_shapes=({0: Dim.DYNAMIC},))
    assert model(torch.randn(7, 4)).shape == (7, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: models.linear()[0], r"got Linear, .*torch\.export\.export"),
        (lambda p: p, r"got ExportedProgram, .*exported_program\.module\(\)"),
        (lambda p: torch.fx.symbolic_trace(models.linear()[0]), "not an exported graph module"),
    ],
)
def test_require_exported_says_how_to_export(program, make, words):
    with pytest.raises(CaptureError, match=words):
        require_exported(make(program))
