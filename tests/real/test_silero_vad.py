"""Silero VAD, whose LSTM is taken apart: the same network in float, and in int8 through the real runtime."""

import json

import pytest
import torch
from typer.testing import CliRunner

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.cli.app import app
from zeropoint.graph.capture import capture
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.runtime.executorch import Program
from zoo import silero_vad


@pytest.fixture(scope="module")
def network():
    return silero_vad.load()


@pytest.fixture(scope="module")
def result(network):
    model, inputs = network
    return zp.quantize(model, inputs, silero_vad.calibration(60))


def test_what_is_taken_apart_equals_the_network(network):
    model, inputs = network
    apart = capture(model, inputs)
    canonicalize(apart)
    apart.recompile()
    assert torch.ops.aten.lstm_cell.default not in {node.target for node in apart.graph.nodes}
    for batch in silero_vad.calibration(8):
        for found, expected in zip(apart(*batch), model(*batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_int8_finds_speech_as_float_does(network, result):
    start = silero_vad.CALIBRATION_SECONDS
    program = Program(result.pte)
    lost = silero_vad.metric(network[0], start) - silero_vad.metric(program, start)
    assert lost < 0.015
    assert result.runtime_sqnr_db >= 30


def test_of_the_cell_only_sigmoid_and_tanh_are_float(result):
    layers = [row for row in result.coverage if row.module == "rnn"]
    assert {row.operator for row in layers if not row.is_quantized} == {"sigmoid", "tanh"}
    assert {"linear", "add", "mul", "slice"} <= {row.operator for row in layers if row.is_quantized}


def converted_by(quantizer, network, batches):
    prepared = zp.prepare_pt2e(capture(*network), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return zp.convert_pt2e(prepared)


def test_compare_finds_what_ruins_int8_per_tensor(network):
    """With one scale for each weight, speech is found no more; the rules that compare names bring it back."""
    start, batches = silero_vad.CALIBRATION_SECONDS, silero_vad.calibration(60)
    stock = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    ruined = converted_by(stock, network, batches)
    assert silero_vad.metric(ruined, start) < 0.5
    found = zp.compare(network[0], ruined, batches[::3])
    assert {row.site for row in found.sites[:2]} == {"add", "conv1d_4.weight"}  # The power spectrum, encoder.3.
    assert found.cures[0].integer_share >= 0.8
    again = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    cured = converted_by(found.apply(again), network, batches)
    assert silero_vad.metric(network[0], start) - silero_vad.metric(cured, start) < 0.01


def test_the_command_alone_cures_it(network, tmp_path, monkeypatch):
    """The stock configuration, what ``compare`` writes, and ``quantize`` with that: no program."""
    monkeypatch.chdir(tmp_path)
    speech = "from zoo import silero_vad\nmodel = silero_vad.load\ndef data(): return silero_vad.calibration(60)\n"
    (tmp_path / "speech.py").write_text(speech)
    stock = 'weights = "per_tensor"\nobserver = "histogram"\naccuracy = []\n\n[data]\nsamples = 480\n'
    (tmp_path / "stock.toml").write_text(stock)

    def run(line):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"

    def found_by(name):
        return silero_vad.metric(Program((tmp_path / name / "model.pte").read_bytes()), silero_vad.CALIBRATION_SECONDS)

    run("quantize speech:model --data speech:data --config stock.toml -o ruined")
    run("compare speech:model --data speech:data --config stock.toml --write-config cured.toml")
    run("quantize speech:model --data speech:data --config cured.toml -o cured")
    float_f1 = silero_vad.metric(network[0], silero_vad.CALIBRATION_SECONDS)
    assert found_by("ruined") < 0.5
    assert float_f1 - found_by("cured") < 0.01
    work = json.loads((tmp_path / "cured" / "summary.json").read_text())["multiply_accumulates"]
    assert work["integer"] >= 0.8 * sum(work.values())
