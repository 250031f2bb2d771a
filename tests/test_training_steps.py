"""Training steps as people write them: checkpointed, in bfloat16, compiled. The oracle is the plain step."""

import copy

import pytest
import torch
from resumable import TRAININGS, inputs, network
from torch.utils.checkpoint import checkpoint

from zeropoint.algorithms.qat_schedule import QATSchedule
from zeropoint.core.errors import CaptureError
from zeropoint.graph import replay
from zeropoint.numerics.fake_quantize import FakeQuantize, disable_observer
from zeropoint.report.trained.check_convert import check_convert
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

LEARNS = {"learn_ranges_after": 1}


def prepared(name, dropout=0.2):
    module = network(0)
    module[4].p = dropout
    exported = torch.export.export(module.train(), (inputs(0),)).module()
    return prepare_qat_pt2e(exported, TRAININGS[name][0]())


def train(model, call, settings, steps=3):
    """Returns the losses, and the gradients of the last step."""
    optimizer, schedule = torch.optim.SGD(model.parameters(), 0.05), QATSchedule(**settings)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        schedule.step(model)
        loss = (call(inputs(step)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "settings"), [("moving average", {}), ("histogram", {}), ("affine", {}), ("learned", LEARNS)]
)
def test_a_checkpointed_step_is_the_plain_step(name, settings):
    """Bit for bit: a range is observed once, and batch norm counts one batch."""
    plain, other = prepared(name), prepared(name)
    losses, gradients = train(plain, plain, settings)
    again, found = train(other, lambda x: checkpoint(other, x, use_reentrant=False), settings)
    assert again == losses
    assert same(found, gradients)
    assert same(other.state_dict(), plain.state_dict())
    batches = [key for key in plain.state_dict() if key.endswith("num_batches_tracked")]
    assert [other.state_dict()[key].item() for key in batches] == [3, 3]
    seen = [[each.batches for each in model.modules() if isinstance(each, FakeQuantize)] for model in (plain, other)]
    assert seen[0] == seen[1]


def test_two_checkpointed_calls_before_one_way_back():
    plain, other = prepared("moving average"), prepared("moving average")
    train(plain, lambda x: plain(x) + plain(2 * x), {})
    train(other, lambda x: sum(checkpoint(other, y, use_reentrant=False) for y in (x, 2 * x)), {})
    assert same(other.state_dict(), plain.state_dict())
    assert not replay._waiting.get(other)


def test_without_checkpointing_nothing_is_kept():
    model = prepared("moving average")
    train(model, model, {})
    assert model not in replay._waiting


@pytest.mark.parametrize(("name", "settings"), [("moving average", {}), ("learned", LEARNS)])
def test_bfloat16_autocast(name, settings):
    model = prepared(name)

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    losses, gradients = train(model, call, settings)
    plain, _ = train(other := prepared(name), other, settings)
    assert losses[0] == pytest.approx(plain[0], rel=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    fakes = [each for each in model.modules() if isinstance(each, FakeQuantize)]
    dtypes = {(each.scale.dtype, each.activation_post_process.min_val.dtype) for each in fakes}
    assert dtypes == {(torch.float32, torch.float32)}
    assert check_convert(model, convert_pt2e(copy.deepcopy(model)), inputs(1)).agrees


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles.
def test_a_compiled_step_is_the_plain_step():
    """With batch norm frozen; in train mode torch refuses, since fake quantizers split the graph around it."""
    settings = {"freeze_batch_norm_after": 0, "freeze_ranges_after": 2}
    plain, other = prepared("moving average", dropout=0.0), prepared("moving average", dropout=0.0)
    losses, gradients = train(plain, plain, settings)
    torch._dynamo.reset()
    again, found = train(other, torch.compile(other, backend="aot_eager"), settings)
    assert again == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(found[name], gradients[name], atol=1e-5) for name in gradients)


def test_averaged_weights_and_evaluation_between_steps():
    """As docs/training.md has it: averaged after the first step, evaluated with ranges that stay, on data not seen."""
    model = prepared("moving average")
    train(model, model, {}, steps=1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for step in range(1, 4):
        train(model, model, {}, steps=step)
        averaged.update_parameters(model)
    for each in (model, averaged.module):
        converted = convert_pt2e(copy.deepcopy(each))
        assert check_convert(each, converted, (inputs(0),)).largest_steps == 0
        evaluated = copy.deepcopy(each).eval().apply(disable_observer)
        for step in range(10, 13):
            assert torch.equal(evaluated(inputs(step) * 3), converted(inputs(step) * 3))
    weights = [dict(each.named_parameters())["0.weight"] for each in (model, averaged.module)]
    assert not torch.equal(*weights)


def test_a_model_that_was_pickled_trains_on_and_says_why_it_cannot_be_converted(tmp_path):
    """Metadata of the graph does not survive ``torch.save(model)``; what is computed of running statistics does."""
    model = prepared("moving average")
    train(model, model, {}, steps=1)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.state_dict().keys() <= model.state_dict().keys()
    (losses, gradients), (expected, wanted) = train(loaded, loaded, {}), train(model, model, {})
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(torch.allclose(gradients[name], wanted[name], atol=1e-5) for name in wanted)
    results = [copy.deepcopy(each).eval().apply(disable_observer)(inputs(9)) for each in (model, loaded)]
    assert torch.allclose(*results, atol=1e-3)
    with pytest.raises(CaptureError, match=r"was pickled, as torch.save\(model\) does, .* Save its state_dict\(\)"):
        convert_pt2e(loaded)


def test_a_converted_model_that_was_pickled_keeps_its_integers(tmp_path):
    model = prepared("moving average")
    train(model, model, {}, steps=1)
    converted = convert_pt2e(model)
    torch.save(converted, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(inputs(9)), converted(inputs(9)))
    types = [sorted(str(each.dtype) for each in m.state_dict().values()) for m in (loaded, converted)]
    assert types[0] == types[1]
    assert "torch.int8" in types[0]
