"""``compare`` on models of many kinds: trained, weight-only, dynamic, with branches, several outputs, torchao's."""

import math
from dataclasses import replace

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import ComparisonError
from zeropoint.pt2e import move_exported_model_to_eval


def of(config):
    return XNNPACKQuantizer().set_global(config)


def quantized(model, data, quantizer):
    prepared = zp.prepare_pt2e(zp.capture(model, data[0]), quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(*batch)
    return zp.convert_pt2e(prepared)


def inputs(*shape, count=4):
    return [(torch.randn(shape, generator=torch.Generator().manual_seed(index)),) for index in range(count)]


def images_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip


def mean_sqnr(model, converted, data):
    """Returns the SQNR in dB of the first output over all batches, in eager mode."""
    with torch.no_grad():
        expected = torch.cat([model(*batch) for batch in data])
        noise = torch.cat([converted(*batch) for batch in data]) - expected
    return float(10 * (expected.square().sum() / noise.square().sum()).log10())


def test_branches():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.one, self.other, self.after = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = self.before(x)
            return self.after(torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,)))

    torch.manual_seed(0)
    model, data = Branches().eval(), inputs(4, 8, count=8)
    assert len({bool(model.before(*batch).sum() > 0) for batch in data}) == 2
    converted = quantized(model, data, of(get_symmetric_quantization_config()))
    found = zp.compare(model, converted, data)
    assert {row.module for row in found.sites} >= {"before", "after"}
    assert any("inside of control flow" in note for note in found.notes)
    assert found.sqnr_db == pytest.approx(mean_sqnr(model, converted, data), abs=0.05)


def test_a_model_whose_integers_are_all_inside_of_branches_is_refused():
    model, (x,) = models.conditional()
    data = [(x,), (-x,)]
    converted = quantized(model, data, of(get_symmetric_quantization_config()))
    with pytest.raises(ComparisonError, match="inside of control flow"):
        zp.compare(model, converted, data)


def test_a_model_that_was_trained_quantized():
    model, data = images_network(), inputs(8, 3, 8, 8)
    quantizer = of(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    prepared = zp.prepare_qat_pt2e(torch.export.export(model.train(), data[0]).module(), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for batch in data[:2]:
        optimizer.zero_grad()
        prepared(*batch).square().mean().backward()
        optimizer.step()
    trained = images_network().eval()
    state = prepared.state_dict()
    trained.load_state_dict({name: state[name] for name in trained.state_dict()})
    move_exported_model_to_eval(prepared)
    converted = zp.convert_pt2e(prepared)
    found = zp.compare(trained, converted, data)
    assert found.sqnr_db == pytest.approx(mean_sqnr(trained, converted, data), abs=0.05)
    assert min(row.sqnr_db for row in found.sites if row.kind == "weight") > 28
    before = zp.compare(images_network().eval(), converted, data, measure=0)
    assert "trained after that float model" in before.worst.why
    assert before.worst.kind == "weight"


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_dynamic_and_weights_alone(is_dynamic):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), inputs(4, 16)
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
    if not is_dynamic:
        config = replace(config, input_activation=None, output_activation=None)
    converted = quantized(model, data, of(config))
    found = zp.compare(model, converted, data, measure=1)
    assert found.sqnr_db == pytest.approx(mean_sqnr(model, converted, data), abs=0.05)
    assert {row.kind for row in found.sites} == ({"weight", "activation"} if is_dynamic else {"weight"})
    assert not found.convergence.ranges
    assert (found.cure.lost > 0) == is_dynamic
    cured = zp.compare(model, quantized(model, data, found.apply(of(config))), data, measure=0)
    assert found.gain_db > 1
    assert cured.sqnr_db - found.sqnr_db == pytest.approx(found.gain_db, abs=0.5)


def test_several_outputs_by_name():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            hidden = self.hidden(x).relu()
            return {"first": self.first(hidden), "rest": (hidden.argmax(-1), self.second(hidden), x.shape[0])}

    torch.manual_seed(0)
    model, data = Several().eval(), inputs(4, 8)
    converted = quantized(model, data, of(get_symmetric_quantization_config()))
    found = zp.compare(model, converted, data)
    first = mean_sqnr(lambda x: model(x)["first"], lambda x: converted(x)["first"], data)
    second = mean_sqnr(lambda x: model(x)["rest"][1], lambda x: converted(x)["rest"][1], data)
    assert [each for each in found.outputs_sqnr_db if not math.isnan(each)] == pytest.approx([first, second], abs=0.05)
    assert found.sqnr_db == pytest.approx((first + second) / 2, abs=0.05)
    assert {row.module for row in found.sites} >= {"hidden", "first", "second"}


def test_a_model_that_torchao_converted():
    theirs = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    workflow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    model, data = images_network().eval(), inputs(8, 3, 8, 8)
    quantizer = theirs.XNNPACKQuantizer().set_global(theirs.get_symmetric_quantization_config(is_per_channel=True))
    prepared = workflow.prepare_pt2e(torch.export.export(model, data[0]).module(), quantizer)
    for batch in data:
        prepared(*batch)
    converted = workflow.convert_pt2e(prepared)
    marks = {node.name: set(node.meta) for node in converted.graph.nodes}
    found = zp.compare(model, converted, data)
    assert found.sqnr_db == pytest.approx(mean_sqnr(model, converted, data), abs=0.05)
    assert {row.module for row in found.sites if row.kind == "weight"} == {"0", "3", "6"}
    assert min(row.sqnr_db for row in found.sites) > 30
    assert {node.name: set(node.meta) for node in converted.graph.nodes} == marks


def test_without_gradients_sites_are_ranked_by_their_own_noise():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.round(self.second(F.relu(self.first(x))) * 4)

    torch.manual_seed(0)
    model, data = Rounded().eval(), inputs(16, 8)
    with torch.no_grad():
        model.first.weight[3] *= 200
        model.second.weight[:, 3] /= 200
    found = zp.compare(model, quantized(model, data, of(get_symmetric_quantization_config())), data, measure=0)
    assert any("noise and gain are those of each tensor by itself" in note for note in found.notes)
    noise = [row.noise for row in found.sites]
    assert sum(noise) == pytest.approx(1)
    assert found.worst.own_sqnr_db == min(row.own_sqnr_db for row in found.sites)


def test_a_channel_of_tiny_weights_is_named():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), inputs(16, 8)
    with torch.no_grad():
        model[0].weight[5] /= 1000
        model[0].bias[5] /= 1000
        model[2].weight[:, 5] *= 1000
    found = zp.compare(model, quantized(model, data, of(get_symmetric_quantization_config())), data)
    (row,) = (row for row in found.sites if row.site == "linear.weight")
    assert "channel 5 is tiny for its one scale" in row.why
