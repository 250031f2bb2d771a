"""``compare``, ``bench`` and ``report``: what they find is what the rules that they write change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from zeropoint.cli.app import app
from zeropoint.cli.cure_rules import lines_of, rules_of
from zeropoint.cli.schema import read_toml
from zeropoint.cli.settings import RuleSettings, Settings
from zeropoint.report.compare.cures import Cure

COMPARE = ("compare", "model.pt2", "--data", "data.npz")
QUANTIZE = ("quantize", "model.pt2", "--data", "data.npz")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's with data and a network, one channel of which is 100 times the others and then undone.

    GELU keeps equalization from undoing it; biases are corrected for the noise, and must not be after the cure.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 4)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 100
        model[0].bias[3] = 50
        model[2].weight[:, 3] /= 100
    torch.export.save(torch.export.export(model, (torch.randn(16, 3, 8, 8),)), "model.pt2")
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(128, 3, 8, 8)).astype("float32"))
    Path("plain.toml").write_text(
        'accuracy = ["correct_biases"]\nverify = false\nobserver = "histogram"\n[data]\nsamples = 64\n'
    )
    return tmp_path


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def found_in(*arguments: str):
    return json.loads(run(*arguments, "--json").stdout)


def test_the_cure_that_compare_writes_gains_what_it_predicts(folder):
    before = found_in(*QUANTIZE, "--config", "plain.toml", "-o", "before")
    found = found_in(*COMPARE, "--config", "plain.toml", "--write-config", "cured.toml")
    after = found_in(*QUANTIZE, "--config", "cured.toml", "-o", "after")
    assert {row["site"] for row in found["sites"][:2]} == {"conv2d", "gelu"}
    assert found["gain_db"] > 10
    gained = found_in(*COMPARE, "--config", "cured.toml", "--measure", "0")["sqnr_db"] - found["sqnr_db"]
    assert abs(gained - found["gain_db"]) < 1
    assert after["compared"]["sqnr_db"] > before["compared"]["sqnr_db"] + 10  # Of the worst batch, of other samples.
    plain, cured = (read_toml(Path(name), Settings) for name in ("plain.toml", "cured.toml"))
    assert (plain.accuracy, plain.verify, plain.observer, plain.data) == (
        cured.accuracy, cured.verify, cured.observer, cured.data
    )  # fmt: skip
    assert [RuleSettings(**rule) for rule in found["rules"]] == list(cured.rules)


def test_what_compare_prints_can_be_pasted(folder):
    text = run(*COMPARE, "--config", "plain.toml", "--rows", "2").stdout
    lines = text.partition("(--config FILE):\n\n")[2]
    Path("pasted.toml").write_text(Path("plain.toml").read_text() + lines)
    assert read_toml(Path("pasted.toml"), Settings).rules
    assert "... and " in text
    run("explain", "model.pt2", "--config", "pasted.toml")


def test_where_no_cure_is_looked_for_the_configuration_is_as_it_was(folder):
    written = "plain.toml", "--write-config", "same.toml"
    result = run(*COMPARE, "--measure", "0", "--config", *written)
    assert "no cure was found" in result.stderr
    assert read_toml(Path("same.toml"), Settings) == read_toml(Path("plain.toml"), Settings)
    assert "the file is there" in run(*COMPARE, "--config", *written, code=2).stderr
    assert "no data to compare on" in run("compare", "model.pt2", code=2).stderr


def test_cures_of_nodes_and_modules_as_rules():
    parts = ("float", ("a", "b"), (), 3.0, 0, 1.0), ("float", ("b",), ("add", "cat_1"), 2.0, 0, 1.0)
    rules = rules_of([Cure(*each) for each in parts], Settings())
    assert rules == (*(RuleSettings(module=each) for each in "ab"), *(RuleSettings(node=e) for e in ("add", "cat_1")))
    assert lines_of(rules[2:3]) == '[[rules]]\nnode = "add"\nscheme = "float"'
    (each,) = rules_of([Cure("per_channel", ("",), (), 3.0, 0, 1.0)], Settings(scheme="dynamic", weights="per_tensor"))
    assert each == RuleSettings(module="*", scheme="dynamic", weights="per_channel")


def test_weights_of_one_scale(folder):
    Path("c.toml").write_text(
        'weights = "per_tensor"\n[[rules]]\nmodule = "2"\nscheme = "static"\nweights = "per_channel"\n'
    )
    nodes = {node["name"]: node for node in found_in("explain", "model.pt2", "--config", "c.toml")["nodes"]}
    schemes = {name: str(node) for name, node in nodes.items() if "conv2d" in name}
    assert ["per_channel" in schemes[name] for name in ("conv2d", "conv2d_1", "conv2d_2")] == [False, True, False]
    Path("c.toml").write_text('[[rules]]\nmodule = "2"\nweights = "per_channel"\n')
    stderr = run("explain", "model.pt2", "--config", "c.toml", code=2).stderr
    assert "rules[0] has weights = 'per_channel', but its scheme is float" in stderr


def test_a_rule_for_one_node(folder):
    Path("c.toml").write_text('[[rules]]\nnode = "conv2d_1"\n')
    nodes = found_in("explain", "model.pt2", "--config", "c.toml")["nodes"]
    reasons = {node["name"]: node["reason"] for node in nodes}
    assert reasons["conv2d_1"] == "set_node_name('conv2d_1', None) leaves it out"
    assert not reasons["conv2d_2"]
    Path("c.toml").write_text('[[rules]]\nnode = "conv2d_9"\n')
    stderr = run("explain", "model.pt2", "--config", "c.toml", code=2).stderr
    assert "set_node_name('conv2d_9'): the rule matches no node of the model. The model's nodes: conv2d," in stderr


def test_bench(folder):
    options = "--config", "plain.toml", "--runs", "3", "--warmup", "1", "--threads", "1"
    found = found_in("bench", "model.pt2", "--data", "data.npz", *options)
    assert (found["runs"], found["warmup"], found["threads"]) == (3, 1, 1)
    assert found["multiply_accumulates"]["float"] == 0
    assert found["quantized"]["size"] < found["float"]["size"]
    assert "no data to measure" in run("bench", "model.pt2", code=2).stderr
    assert run("bench", "model.pt2", "--data", "data.npz", "--runs", "0", code=2)


def test_report(folder):
    options = "--config", "plain.toml", "--runs", "3", "--title", "T<1>"
    found = found_in("report", "model.pt2", "--data", "data.npz", "-o", "page.html", *options)
    page = Path("page.html").read_text()
    assert found["out"] == "page.html"
    assert 0 < found["sqnr_db"] < 20
    for text in ("T&lt;1&gt;", "conv2d_1.weight", "90th percentile"):
        assert text in page
    assert "the file is there" in run("report", "model.pt2", "--data", "data.npz", "-o", "page.html", code=2).stderr
    assert "where the page goes" in run("report", "model.pt2", "--data", "data.npz", code=2).stderr


def test_quantize_with_a_report_writes_it_beside_the_file(folder):
    run(*QUANTIZE, "--config", "plain.toml", "-o", "out", "--report")
    assert sorted(os.listdir("out")) == ["config.toml", "explain.txt", "model.pte", "report.html", "summary.json"]
    assert "conv2d_1.weight" in Path("out/report.html").read_text()
