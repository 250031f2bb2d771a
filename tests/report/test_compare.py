"""``compare``: a site that was ruined on purpose comes first, and its cure gains what was predicted."""

import json
import math

import pytest
import torch
from models import called_twice, counter
from quantizers import ByHand
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CalibrationError, ComparisonError, NonFiniteError
from zeropoint.numerics.granularity import PerBlock, PerTensor
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers import AffineQuantizedMinMaxObserver
from zeropoint.report.compare.cures import Cure


def quantizer(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))


def quantized(model, data, of):
    prepared = zp.prepare_pt2e(zp.capture(model, data[0]), of)
    with torch.no_grad():
        for batch in data:
            prepared(*batch)
    return zp.convert_pt2e(prepared)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 16, 1), Residual(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


DATA = [(torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
PLACES = {
    "before depthwise": ("0", "2"), "after depthwise": ("2", "4"), "in a residual": ("5.first.0", "5.second"),
    "linear": ("7", "9"),
}  # fmt: skip


def ruined(first, second, channel=3):
    """Returns a network with one channel scaled by 100 and undone after it."""
    model = network()
    before, after = model.get_submodule(first), model.get_submodule(second)
    with torch.no_grad():
        before.bias[channel] = before.bias[channel].abs() + 0.5
        before.weight[channel] *= 100
        before.bias[channel] *= 100
        undone = after.weight[channel] if after.weight.shape[1] == 1 else after.weight[:, channel]
        undone /= 100
    return model


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_per_channel", [True, False])
def test_the_ruined_site_is_first_and_its_cure_gains_what_is_predicted(place, is_per_channel):
    first, second = PLACES[place]
    model = ruined(*PLACES[place])
    options = {"is_per_channel": is_per_channel}
    found = zp.compare(model, quantized(model, DATA, quantizer(**options)), DATA)
    clamp = str(int(first) + 1) if first.isdigit() else "5.first.1"
    assert found.worst.module == (clamp if is_per_channel else first), str(found)
    assert "channel 3 is" in found.worst.why
    assert {first, second} <= set(found.cure.modules)
    cured = zp.compare(model, quantized(model, DATA, found.apply(quantizer(**options))), DATA, measure=0)
    assert found.gain_db > 6
    assert abs(cured.sqnr_db - found.sqnr_db - found.gain_db) < 1


def test_the_table_and_the_data():
    model = network()
    found = zp.compare(model, quantized(model, DATA, quantizer(is_per_channel=True)), DATA)
    text = str(found)
    assert "worst" in text
    assert found.worst.site in text
    read = json.loads(found.to_json())
    assert [row["site"] for row in read["sites"]] == [row.site for row in found.sites]
    assert sum(row.noise for row in found.sites) == pytest.approx(1)
    assert found.batches == len(DATA)
    assert all(0.9 < row.cosine <= 1.0001 for row in found.sites)
    assert all(0 <= row.unused_codes < 1 for row in found.sites)


@torch.no_grad()
def test_numbers_are_those_of_an_eager_computation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    data = [(torch.randn(16, 8),)]
    converted = quantized(model, data, quantizer())
    found = zp.compare(model, converted, data)
    (x,) = data[0]
    expected, actual = model(x), converted(x)
    noise = (actual - expected).square().sum() / expected.square().sum()
    assert found.sqnr_db == pytest.approx(float(-10 * noise.log10()), abs=0.01)
    row = next(row for row in found.sites if row.site == "linear.weight")
    weight = model[0].weight
    rounded = torch.fake_quantize_per_tensor_affine(weight, row.scale[0], 0, -127, 127)
    ratio = weight.square().sum() / (weight - rounded).square().sum()
    assert row.sqnr_db == pytest.approx(float(10 * ratio.log10()), abs=0.01)
    assert row.largest_error == pytest.approx(float((weight - rounded).abs().max()), rel=1e-4)
    (node,) = found.nodes
    by_weight = nn.functional.linear(x, rounded, model[0].bias) - expected
    rows = slice(0, 4)
    ratio = expected[rows].square().sum() / by_weight[rows].square().sum()
    assert node.weight_sqnr_db == pytest.approx(float(10 * ratio.log10()), abs=0.01)
    assert node.carried_sqnr_db > 120


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_dynamic_models_and_the_result_of_quantize(is_dynamic):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [(torch.randn(4, 16),) for _ in range(3)]
    if is_dynamic:
        result = quantized(model, data, quantizer(is_dynamic=True, is_per_channel=True))
    else:
        result = zp.quantize(model, data[0], data, verify=False)
        assert result.accuracy.equalized
    found = zp.compare(model, result, data)
    assert found.sqnr_db > 25
    assert min(row.sqnr_db for row in found.sites if row.kind == "weight") > 30


@pytest.mark.parametrize("build", [called_twice, counter])
def test_other_models(build):
    model, inputs = build()
    data = [inputs] * 3
    found = zp.compare(model, quantized(model, data, quantizer()), data)
    assert found.sites
    assert str(found)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.second(hidden), hidden.mean()


def test_an_operator_that_returns_one_value():
    torch.manual_seed(0)
    model = Scalar().eval()
    found = zp.compare(model, quantized(model, DATA, quantizer()), DATA)
    (row,) = [row for row in found.nodes if row.operator == "mean"]
    assert row.sqnr_db > 30
    assert sum(row.noise for row in found.sites) == pytest.approx(1)


def test_a_float_model_that_was_exported_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1))
    exported = torch.export.export(model.train(), DATA[0])
    before = {name: value.clone() for name, value in exported.state_dict.items()}
    result = zp.quantize(exported, DATA[0], DATA, verify=False)
    assert zp.compare(exported, result, DATA, measure=0).sqnr_db > 25
    assert zp.bench(exported, result, runs=1, warmup=0).ratio > 0
    assert all(torch.equal(value, before[name]) for name, value in exported.state_dict.items())


def test_a_scale_for_each_block():
    affine = {"target_dtype": torch.int8, "mapping_type": MappingType.SYMMETRIC, "quant_min": -128, "quant_max": 127}

    def annotated(model):
        (node,) = [node for node in model.graph.nodes if node.target is torch.ops.aten.linear.default]
        kinds = PerTensor(), PerBlock((2, 4))
        specs = [
            zp.QuantizationSpec(torch.int8, AffineQuantizedMinMaxObserver.with_args(granularity=kind, **affine))
            for kind in kinds
        ]
        reads = dict(zip(node.args[:2], specs, strict=True))
        node.meta["quantization_annotation"] = zp.QuantizationAnnotation(input_qspec_map=reads, _annotated=True)

    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 6)).eval(), [(torch.randn(4, 8),) for _ in range(3)]
    found = zp.compare(model, quantized(model, data, ByHand(annotated)), data, measure=0)
    (row,) = [row for row in found.sites if row.kind == "weight"]
    blocks = model[0].weight.detach().reshape(3, 2, 2, 4).abs().amax((1, 3)).flatten()
    torch.testing.assert_close(torch.tensor(row.scale), blocks / 127.5)
    assert 0.4 < row.largest_error_steps < 0.51


def test_a_cure_keeps_what_the_rules_say_of_the_module():
    cure = Cure("per_channel", ("encoder.0",), (), 1.0, 0, 1.0)
    training = get_symmetric_quantization_config(is_qat=True)
    rules = cure.apply(XNNPACKQuantizer().set_module_name("enc*", training)).rules
    config = rules.by_module_name["encoder.0"]
    assert config.is_qat
    assert config.input_activation == training.input_activation
    weight = config.weight.observer_or_fake_quant_ctr()
    assert config.weight.qscheme == torch.per_channel_symmetric
    assert hasattr(weight, "fake_quant_enabled")
    with pytest.raises(ComparisonError, match="no configuration"):
        cure.apply(XNNPACKQuantizer().set_module_name("decoder", training))


def test_were_there_enough_samples():
    model = network()
    converted = quantized(model, DATA, quantizer())
    assert zp.compare(model, converted, DATA[:1]).convergence.is_settled is None
    assert zp.compare(model, converted, DATA[:1] * 4).convergence.is_settled
    growing = [(DATA[0][0] * factor,) for factor in (0.1, 0.1, 1.0, 1.0)]
    found = zp.compare(model, converted, growing).convergence
    assert not found.is_settled
    assert found.ranges[0].last_batch == 2
    assert "too few" in str(found)


def test_what_cannot_be_compared_is_refused_in_words():
    model = network()
    converted = quantized(model, DATA, quantizer())
    with pytest.raises(ComparisonError, match="data is empty"):
        zp.compare(model, converted, [])
    with pytest.raises(ComparisonError, match="Tensor, not an iterable"):
        zp.compare(model, converted, DATA[0][0])
    with pytest.raises(ComparisonError, match="no dequantize operators"):
        zp.compare(model, zp.capture(model, DATA[0]), DATA)
    with pytest.raises(ComparisonError, match="it is prepared, not converted"):
        zp.compare(model, zp.prepare_pt2e(zp.capture(model, DATA[0]), quantizer()), DATA)
    with pytest.raises(ComparisonError, match="0 exported graphs"):
        zp.compare(model, 3, DATA)
    with pytest.raises(ComparisonError, match="prepared or converted"):
        zp.compare(converted, converted, DATA)
    other = nn.Sequential(nn.Conv2d(8, 16, 5, padding=2)).eval()
    with pytest.raises(ComparisonError, match="Give the float model that the quantized one was made of"):
        zp.compare(other, converted, DATA)
    with pytest.raises(NonFiniteError, match="NaN"):
        zp.compare(model, converted, [(torch.full((4, 8, 6, 6), math.nan),)])
    with pytest.raises(CalibrationError, match="shape"):
        zp.compare(model, converted, [(torch.zeros(4, 8, 5, 5),)])


def test_a_rule_for_a_module_that_is_called_again_elsewhere():
    """One relu module ends a linear layer and a sum: a rule for it would take the sum apart, which costs accuracy."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.last, self.act = nn.Linear(32, 5), nn.ReLU()

        def forward(self, x):
            return self.last(self.act(x + self.second(self.act(self.first(self.norm(x))))))

    torch.manual_seed(1)
    model, data = Twice().eval(), [(torch.randn(8, 32),) for _ in range(6)]
    with torch.no_grad():
        model.first.weight[5] *= 100
        model.first.bias[5] *= 100
        model.second.weight[:, 5] /= 100
    of = quantizer(is_per_channel=True)
    found = zp.compare(model, quantized(model, data, of), data, measure=1)
    (cure,) = found.cures
    assert found.worst.module == "act"
    assert (sorted(cure.modules), cure.nodes) == (["first", "second"], ("relu",))
    cured = zp.compare(model, quantized(model, data, found.apply(of)), data, measure=0)
    assert cured.sqnr_db - found.sqnr_db == pytest.approx(found.gain_db, abs=1)
