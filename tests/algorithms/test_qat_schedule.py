"""A schedule of training: what is switched when, and that a saved one goes on where it was."""

import copy

import models
import pytest
import qat_quantizers as qat
import torch
from quantizers import ByHand, activation, annotate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zeropoint
from zeropoint.algorithms.qat_schedule import QATSchedule
from zeropoint.core.errors import CalibrationError, GraphError, RuleError, SpecError
from zeropoint.graph.batch_norms import BATCH_NORMS, is_in_train_mode
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.learnable_fake_quantize import LearnableFakeQuantize, enable_range_learning
from zeropoint.numerics.observers import MovingAverageMinMaxObserver
from zeropoint.report.trained.check_convert import check_convert
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

SIZES = (4, 3, 6, 6)
LEARNED = LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU6(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def prepared_of(module=None, act=None, sizes=SIZES):
    module = network() if module is None else module
    exported = torch.export.export(module.train(), (torch.randn(sizes),)).module()
    return prepare_qat_pt2e(exported, ByHand(lambda model: qat.qat(model, act=act)))


def learning():
    return prepared_of(act=activation(observer_or_fake_quant_ctr=LEARNED))


class Loop:
    """A plain loop with momentum, which may be saved and go on."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step(self, number):
        torch.manual_seed(number)
        self.schedule.step(self.model)
        loss = self.model(torch.randn(SIZES)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self):
        return copy.deepcopy([each.state_dict() for each in (self.model, self.schedule, self.optimizer)])

    def load(self, state):
        for each, saved in zip((self.model, self.schedule, self.optimizer), state, strict=True):
            each.load_state_dict(copy.deepcopy(saved))


def fakes(model):
    return [each for each in model.modules() if isinstance(each, FakeQuantize)]


def switches(model):
    """Returns rounding and observing of all fake quantizers, which are alike."""
    (found,) = {(each.fake_quant_enabled.item(), each.observer_enabled.item()) for each in fakes(model)}
    return found


def ranges(model):
    return [(each.scale.clone(), each.zero_point.clone()) for each in fakes(model)]


def statistics(model):
    return {name: t.clone() for name, t in model.named_buffers() if "running" in name or "num_batches" in name}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def norms(model):
    return [node for node in model.graph.nodes if node.target in BATCH_NORMS]


def test_each_switch_at_its_step():
    model = prepared_of()
    loop = Loop(model, QATSchedule(2, freeze_ranges_after=4, freeze_batch_norm_after=5))
    found = []
    for number in range(7):
        before = [scale for scale, _ in ranges(model)], statistics(model)
        loop.step(number)
        moved = any(not torch.equal(*pair) for pair in zip(before[0], [s for s, _ in ranges(model)], strict=True))
        found.append((*switches(model), moved, not same(before[1], statistics(model))))
    observing, rounding = (0, 1, True, True), (1, 1, True, True)
    assert found == [observing, observing, rounding, rounding, (1, 0, False, True), *[(1, 0, False, False)] * 2]
    assert loop.schedule.steps == 7


def test_while_it_observes_the_float_network_trains():
    module = network()
    module[3].p = 0.0
    float_module = copy.deepcopy(module).train()
    prepared = prepared_of(module)
    schedule, x = QATSchedule(observe_steps=1), torch.randn(SIZES)
    schedule.step(prepared)
    assert torch.allclose(prepared(x), float_module(x), atol=1e-5)
    schedule.step(prepared)
    assert not torch.allclose(prepared(x), float_module(x), atol=1e-5)


def test_frozen_batch_norms_normalize_by_their_statistics_and_train():
    module = network()
    module[3].p = 0.0
    models.randomize_norms(module)
    wanted = copy.deepcopy(module).train()
    for each in wanted.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()
    prepared = prepared_of(module)
    QATSchedule(1, freeze_batch_norm_after=0).step(prepared)
    x = torch.randn(SIZES)
    for model in (wanted, prepared):
        model(x).square().mean().backward()
    assert torch.allclose(prepared(x), wanted(x), atol=1e-5)
    gradients = dict(prepared.named_parameters())
    for name, parameter in wanted.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4), name
    assert same(statistics(prepared), statistics(wanted))


def test_frozen_batch_norms_stay_frozen_in_train_mode_and_dropout_drops():
    prepared = prepared_of()
    QATSchedule(freeze_batch_norm_after=0).step(prepared)
    for model in (prepared, copy.deepcopy(prepared)):
        model.eval().train()
        before = statistics(model)
        torch.manual_seed(0)
        assert not torch.equal(model(torch.ones(SIZES)), model(torch.ones(SIZES)))
        assert same(before, statistics(model))
        assert not any(map(is_in_train_mode, norms(model)))


def test_one_that_the_user_froze_stays_so_when_an_earlier_state_is_loaded():
    module = network()
    module[5].eval()
    exported = torch.export.export(module, (torch.randn(SIZES),)).module()
    prepared = prepare_qat_pt2e(exported, ByHand(qat.qat))
    modes = [is_in_train_mode(norm) for norm in norms(prepared)]
    assert modes == [True, False, True]
    schedule = QATSchedule(freeze_batch_norm_after=1)
    schedule.step(prepared)
    saved, before = schedule.state_dict(), [node.format_node() for node in prepared.graph.nodes]
    schedule.step(prepared)
    assert not any(map(is_in_train_mode, norms(prepared)))
    schedule.load_state_dict({"steps": 0})
    schedule.step(prepared)
    assert [is_in_train_mode(norm) for norm in norms(prepared)] == modes
    assert saved == schedule.state_dict()
    counters = [line for line in before if "add_" in line]
    assert len([n for n in prepared.graph.nodes if "add_" in n.format_node()]) == len(counters)


@pytest.mark.parametrize("build", [prepared_of, learning])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_saved_training_goes_on_with_the_same_steps(build, at):
    settings = {"freeze_ranges_after": 5, "freeze_batch_norm_after": 4}
    if build is learning:
        settings["learn_ranges_after"] = 2
    loop = Loop(build(), QATSchedule(1, **settings))
    for number in range(at):
        loop.step(number)
    state = loop.state()
    wanted = [loop.step(number) for number in range(at, 8)]
    again = Loop(build(), QATSchedule(1, **settings))
    again.load(state)
    assert [again.step(number) for number in range(at, 8)] == wanted
    assert same(loop.model.state_dict(), again.model.state_dict())
    loop.load(state)  # Back to an earlier state of the same model.
    assert [loop.step(number) for number in range(at, 8)] == wanted


def test_what_was_trained_by_a_schedule_is_what_is_converted():
    loop = Loop(prepared_of(), QATSchedule(1, freeze_ranges_after=3, freeze_batch_norm_after=4))
    for number in range(6):
        loop.step(number)
    check = check_convert(loop.model, convert_pt2e(copy.deepcopy(loop.model)), torch.randn(SIZES))
    assert check.agrees
    assert check.largest_steps <= 1.001


def test_ranges_are_learned_between_two_steps():
    loop = Loop(learning(), QATSchedule(1, learn_ranges_after=2, freeze_ranges_after=4))
    learners = [each for each in fakes(loop.model) if isinstance(each, LearnableFakeQuantize)]
    others = [each for each in fakes(loop.model) if not isinstance(each, LearnableFakeQuantize)]
    found = []
    for number in range(6):
        loop.step(number)
        flags = {(each.learning_enabled.item(), each.observer_enabled.item()) for each in learners}
        found.append((flags, {each.observer_enabled.item() for each in others}))
    assert found == [*[({(0, 1)}, {1})] * 2, *[({(1, 0)}, {1})] * 2, *[({(0, 0)}, {0})] * 2]


def test_ranges_that_learn_already_go_on():
    model = learning()
    model(torch.randn(SIZES))
    model.apply(enable_range_learning)
    schedule = QATSchedule(freeze_ranges_after=1)
    learners = [each for each in fakes(model) if isinstance(each, LearnableFakeQuantize)]
    schedule.step(model)
    assert all(each.scale.requires_grad and not each.observer_enabled.item() for each in learners)
    schedule.step(model)
    assert not any(each.scale.requires_grad or each.observer_enabled.item() for each in learners)


def test_ranges_chosen_at_run_time_are_never_frozen():
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=1)
    act = activation(observer_or_fake_quant_ctr=fake, is_dynamic=True)

    def dynamic(model):
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                annotate(node, {"input": act, "weight": qat.fake_weight()})

    module, inputs = models.mlp()
    prepared = prepare_qat_pt2e(models.export(module.train(), *inputs), ByHand(dynamic))
    prepared(*inputs)
    QATSchedule(freeze_ranges_after=0).step(prepared)
    assert {(each.is_dynamic, each.observer_enabled.item()) for each in fakes(prepared)} == {(True, 1), (False, 0)}
    converted = convert_pt2e(copy.deepcopy(prepared))
    assert check_convert(prepared, converted, inputs[0] * 20).agrees


def test_between_changes_the_model_is_left_alone():
    model, schedule = prepared_of(), QATSchedule(freeze_ranges_after=3)
    schedule.step(model)
    fakes(model)[0].disable_fake_quant()
    schedule.step(model)
    assert not fakes(model)[0].fake_quant_enabled.item()
    schedule.step(prepared_of())
    model(torch.randn(SIZES))
    schedule.step(model)
    assert switches(model) == (1, 0)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_training_gives_the_same():
    found = []
    for wrap in (lambda model: model, DistributedDataParallel):
        loop = Loop(wrap(prepared_of()), QATSchedule(1, freeze_ranges_after=3, freeze_batch_norm_after=2))
        losses = [loop.step(number) for number in range(5)]
        inner = getattr(loop.model, "module", loop.model)
        found.append((losses, switches(inner), [is_in_train_mode(norm) for norm in norms(inner)]))
    assert found[0] == found[1]
    assert found[0][1:] == ((1, 0), [False] * 3)


@pytest.mark.usefixtures("process_group")
def test_learning_begins_before_the_model_is_wrapped():
    model, schedule = learning(), QATSchedule(learn_ranges_after=0, freeze_ranges_after=2)
    with pytest.raises(GraphError, match=r"at step 0 ranges begin or end to learn.*wrap that anew"):
        schedule.step(DistributedDataParallel(model))
    schedule.step(model)
    loop = Loop(DistributedDataParallel(model), schedule)
    scale = next(each for each in fakes(model) if isinstance(each, LearnableFakeQuantize)).scale
    before = scale.clone()
    for number in range(1):
        loop.step(number)
    assert not torch.equal(before, scale)
    with pytest.raises(GraphError, match="at step 2"):
        loop.step(2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"observe_steps": -1}, "observe_steps=-1 is no number of steps"),
        ({"observe_steps": True}, "observe_steps=True"),
        ({"observe_steps": None}, "observe_steps=None"),
        ({"freeze_ranges_after": 1.5}, "freeze_ranges_after=1.5"),
        ({"freeze_batch_norm_after": "3"}, "freeze_batch_norm_after='3'"),
        ({"observe_steps": 5, "freeze_ranges_after": 4}, "observe_steps=5 is after freeze_ranges_after=4"),
        ({"observe_steps": 5, "learn_ranges_after": 4}, "observe_steps=5 is after learn_ranges_after=4"),
        ({"learn_ranges_after": 5, "freeze_ranges_after": 4}, "learn_ranges_after=5 is after freeze_ranges_after=4"),
    ],
)
def test_numbers_that_are_none_or_out_of_order(settings, words):
    with pytest.raises(SpecError, match=words):
        QATSchedule(**settings)


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": 1, "more": 2}, {"steps": 1.0}])
def test_a_state_of_something_else(state):
    with pytest.raises(SpecError, match="steps"):
        QATSchedule().load_state_dict(state)


def test_a_model_without_what_is_switched():
    with pytest.raises(GraphError, match="Sequential has no fake quantizers"):
        QATSchedule().step(network())
    module, inputs = models.mlp()
    prepared = prepare_qat_pt2e(models.export(module.train(), *inputs), ByHand(qat.qat))
    with pytest.raises(RuleError, match="freeze_batch_norm_after=3, and no batch norm"):
        QATSchedule(freeze_batch_norm_after=3).step(prepared)
    with pytest.raises(RuleError, match="learn_ranges_after=3, and there is no LearnableFakeQuantize"):
        QATSchedule(learn_ranges_after=3).step(prepared)
    with pytest.raises(CalibrationError, match=r"linear.*no data reached it"):
        QATSchedule(freeze_ranges_after=0).step(prepared)


def test_it_is_public():
    assert zeropoint.QATSchedule is QATSchedule
    text = repr(QATSchedule(2, freeze_batch_norm_after=3))
    assert "observe_steps=2" in text
    assert "freeze_batch_norm_after=3" in text
